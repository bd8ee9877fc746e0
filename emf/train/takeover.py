"""Whether a folder can be written to, and a run in it continued; that one process at a time writes there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emf import config as configs
from emf.config import Config
from emf.files import alone
from emf.train.paths import same_place, same_source
from emf.train.zero import gather
from emf.weights.checkpoints import checkpoints

MAY_CHANGE = ("recipe", "steps", "epochs", "optim", "zero", "run", "compile", "graphs", "data.workers", "data.listings")
"""Settings and sections that may be others when a run is resumed. A path that was moved may too."""


@contextmanager
def own_folder(out: Path, config: Config, resume: bool, rank: int) -> Iterator[list[Path]]:
    """The folder `out` is this run's alone while the block runs, which is given the run's whole checkpoints, oldest
    first. Called on every rank; rank 0 looks and holds the lock. A folder that was made for it goes if nothing was
    written there.

    Raises ValueError, the same on every rank, where another process holds the folder, and what check_folder_of_run
    says of it.
    """
    fault, saved = "", list[Path]()
    with ExitStack() as stack:
        if rank == 0:
            try:
                check_folder_of_run(out, checkpoints(out), config, resume)
                taken = f"train: another process is training in {out}; wait for it, or choose another --out"
                stack.enter_context(alone(out, taken))
                # another process may have written its run between the look and the lock
                saved = checkpoints(out)
                check_folder_of_run(out, saved, config, resume)
            except ValueError as error:
                fault = str(error)
        fault, saved = gather((fault, saved))[0]
        if fault:
            raise ValueError(fault)
        yield saved


def check_folder_of_run(out: Path, saved: list[Path], config: Config, resume: bool) -> None:
    """Raises ValueError where the folder holds a run that is not to be continued, or of which the newest checkpoint in
    `saved` is of another run than the config's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: {out} is no folder; choose another --out")
    written = [name for name in ("config.json", "metrics.jsonl", "curve.jsonl") if (out / name).exists()]
    if (written or saved) and not resume:
        raise ValueError(f"train: {out} holds a run already; add --resume to continue it, or choose another --out")
    if resume and saved:
        check_same_run(config, saved[-1])
    elif resume and "config.json" in written:  # of a run that wrote no checkpoint yet, or of something else
        if "recipe" not in configs.read(out / "config.json"):
            raise ValueError(f"train: {out / 'config.json'} is of something else than a run; choose another --out")
        check_same_run(config, out)


def check_same_run(config: Config, checkpoint: Path) -> None:
    """Raises ValueError where a checkpoint is of another model than the config's, or of other data or randomness."""
    made, now = configs.read(checkpoint / "config.json"), asdict(config)
    condition = made.get("condition")
    if isinstance(condition, dict) and condition.get("kind") == "blip3o" and condition.get("folder") is None:
        condition["folder"] = made.get("init")  # where the encoder lay
    # a field that the checkpoint does not know was added since, with a default that changes nothing
    differ = [name for key in now if key in made for name in _differing(made[key], now[key], key)]
    if differ:
        of_model = {"objective", "transformer", "encoder"} & {name.partition(".")[0] for name in differ}
        other = "another model" if of_model else "another run"
        raise ValueError(
            f"resume: {checkpoint} is of {other} ({', '.join(differ)} differ); say what its config.json has, or choose "
            "another --out"
        )


def _differing(made: Any, now: Any, name: str) -> list[str]:
    """The names of the fields in which two values of a config do not agree."""
    if name not in MAY_CHANGE and isinstance(made, dict) and isinstance(now, dict):
        both = [key for key in now if key in made]
        return [inner for key in both for inner in _differing(made[key], now[key], f"{name}.{key}")]
    return [] if _agree(made, now, name) else [name]


def _agree(made: Any, now: Any, name: str) -> bool:
    """Whether two values of a config, the first read from its file, are the same, or may be others."""
    if name in MAY_CHANGE:
        return True
    if isinstance(made, str) and isinstance(now, Path):
        return same_place(made, now)
    if isinstance(now, tuple):
        if name == "data.sources" and isinstance(made, list) and len(made) == len(now):
            return all(map(same_source, made, now))
        return bool(made == list(now))
    return bool(made == now)
