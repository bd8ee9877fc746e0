"""Whether a folder can be written to, and a run in it continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emf import config as configs
from emf.config import Config

MAY_CHANGE = ("recipe", "steps", "optim", "zero", "run")  # when a run is resumed


def check_folder_of_run(out: Path, saved: list[Path], config: Config, resume: bool) -> None:
    """Raises ValueError where the folder holds a run that is not to be continued, or of which the newest checkpoint in
    `saved` is of another run than the config's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: {out} is no folder; choose another --out")
    written = [name for name in ("config.json", "metrics.jsonl", "curve.jsonl") if (out / name).exists()]
    if (written or saved) and not resume:
        raise ValueError(f"train: {out} holds a run already; add --resume True to continue it, or choose another --out")
    if resume and saved:
        check_same_run(config, saved[-1])


def check_same_run(config: Config, checkpoint: Path) -> None:
    """Raises ValueError where a checkpoint is of another model than the config's, or of other data or randomness."""
    made, now = configs.read(checkpoint / "config.json"), json.loads(configs.to_json(config))
    # a field that the checkpoint does not know was added since, with a default that changes nothing
    differ = [key for key in now if key in made and key not in MAY_CHANGE and not _agree(made[key], now[key])]
    if differ:
        other = "another model" if {"objective", "transformer", "encoder"} & set(differ) else "another run"
        raise ValueError(
            f"resume: {checkpoint} is a checkpoint of {other} ({', '.join(differ)} differ); choose another --out"
        )


def _agree(made: Any, now: Any) -> bool:
    """Whether two values of a config are the same in every field that both have."""
    if isinstance(made, dict) and isinstance(now, dict):
        return all(_agree(made[k], now[k]) for k in made.keys() & now.keys())
    return bool(made == now)
