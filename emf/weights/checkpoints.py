"""A run's checkpoints: which there are, what one holds, reading, writing and removing one.

RUN/checkpoints/step_0000100/ holds model.safetensors (the moving average, whole, float32), config.json (the resolved
config), checkpoint.json (the step, and by how many ranks at which ZeRO stage it was written) and engine/ (what
DeepSpeed needs to go on; emf.train.zero writes it). A folder of that name is always whole: one that is being written
or removed has another name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from emf.config import Config
from emf.errors import Torn
from emf.files import check_readable, files_in, read_fields
from emf.model.text_to_image import TextToImage
from emf.weights.tensors import Weights, items, read_weights, write_file

Read = TypeVar("Read")
FOLDER = "checkpoints"
"""Where a run's folder has them."""
WEIGHTS, SETTINGS, MADE = "model.safetensors", "config.json", "checkpoint.json"
PART, GONE = ".part", ".gone"
"""Endings of a folder that is being written, or removed; it is never read."""


@dataclass(frozen=True)
class Made:
    """How a checkpoint was made."""

    step: int
    world: int
    """Ranks that wrote it."""
    stage: int
    """ZeRO stage of the run."""
    dtype: str = ""
    """What the run computed in, as torch names it; checkpoints of before do not say it."""
    base: str = ""
    """A digest of the base that the run's distribution-matching term asks; it is read from the run's start again."""
    samples: list[str] = field(default_factory=list)
    """Of each source of the data a digest of what its order hangs on (emf.data.images.stamps)."""

    def __post_init__(self) -> None:
        if self.step < 0 or self.world < 1 or not 0 <= self.stage <= 3:
            raise ValueError(f"step {self.step} by {self.world} ranks at stage {self.stage}")


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first. A copy that somebody keeps under another name is none."""
    return [p for p in files_in(run / FOLDER, "step_*") if re.fullmatch(r"step_\d{7}", p.name) and p.is_dir()]


def newest(run: Path) -> Path:
    """The newest whole checkpoint of a run's folder, or the folder itself if it is one. Raises ValueError where there
    is none."""
    if (run / WEIGHTS).is_file():
        return run
    saved = checkpoints(run)
    if not saved:
        if (run / "model_index.json").is_file():
            raise ValueError(
                f"{run} is no run but an export, or a pipeline's folder; this needs the run's folder, or one of its "
                "checkpoints"
            )
        why = "" if run.is_dir() else ", for it is a file" if run.exists() else ", for there is no such folder"
        raise ValueError(
            f"{run} holds no checkpoint{why}; expected a run's folder, one of its checkpoints, or a folder from emf "
            "export or emf convert"
        )
    return saved[-1]


def while_there(find: Callable[[], Path], read: Callable[[Path], Read]) -> Read:
    """What `read` makes of the folder that `find` names. A run that is being trained may remove a checkpoint while it
    is read: then it is asked for the next. Raises as the two do."""
    while True:
        found = find()
        try:
            return read(found)
        except (ValueError, OSError):
            if found.exists():
                raise


def at_newest(run: Path, read: Callable[[Path], Read]) -> Read:
    """What `read` makes of the newest whole checkpoint of a run's folder; see `newest` and `while_there`."""
    return while_there(lambda: newest(run), read)


def step_of(checkpoint: Path) -> int | None:
    """The step after which a checkpoint was saved; None where nothing says it, or it is none."""
    try:
        return read_made(checkpoint).step
    except ValueError:
        return None


def saved_names(network: TextToImage, config: Config) -> set[str]:
    """The weights that a checkpoint holds: all but those of a pretrained encoder that stay as its folder has them, and
    but the two flows of emf.matching, which no sampler needs."""
    pretrained = config.condition.kind != "small"
    return {
        name
        for name, p in network.named_parameters()
        if not name.startswith(("base.", "fake."))
        and (p.requires_grad or name in network.own_encoder or not (pretrained and name.startswith("encoder.")))
    }


def read(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's weights in float32. Raises ValueError where they are missing, may not be read, or are broken."""
    try:
        return read_weights(checkpoint / WEIGHTS)
    except Torn as error:
        raise ValueError(f"checkpoint: {broken(checkpoint, error)}") from None
    except ValueError as error:
        raise ValueError(f"checkpoint: {checkpoint} cannot be used: {error}") from None


def broken(checkpoint: Path, why: object) -> str:
    """What is to be said of a checkpoint whose files could be read and do not hold what they should."""
    return f"{checkpoint} is broken ({why}); move it away to resume from one before"


def stream(checkpoint: Path) -> Weights:
    """A checkpoint's weights, to be read one at a time. Raises ValueError where they are missing or broken."""
    return Weights([checkpoint / WEIGHTS])


def read_made(checkpoint: Path) -> Made:
    """How a checkpoint was made. Raises ValueError where that is missing, may not be read, or is broken."""
    file = checkpoint / MADE
    try:
        check_readable(file)
    except ValueError as error:
        raise ValueError(f"resume: {error}") from None
    try:
        return read_fields(Made, file, "made")
    except ValueError as error:
        raise ValueError(f"resume: {broken(checkpoint, str(error).removeprefix('made: '))}") from None


def begin(run: Path, step: int) -> Path:
    """The empty folder in which the checkpoint of a step is written, until `finish` gives it its name. What an earlier
    process left of it is removed."""
    part = unfinished(run, step)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def unfinished(run: Path, step: int) -> Path:
    """Where `begin` makes a checkpoint's folder."""
    return run / FOLDER / f"step_{step:07d}{PART}"


def write_checkpoint(part: Path, weights: dict[str, Tensor], config: str, made: Made) -> None:
    """Weights, config.json and checkpoint.json of a checkpoint. Raises ValueError where the disk is full."""
    write_file(part / WEIGHTS, items(weights))
    (part / SETTINGS).write_text(config)
    (part / MADE).write_text(json.dumps(asdict(made)))


def finish(part: Path, keep: int) -> Path:
    """The written checkpoint under its name, in the place of one that has it; of the older ones `keep` - 1 stay."""
    final, gone = part.with_suffix(""), part.with_suffix(GONE)
    shutil.rmtree(gone, ignore_errors=True)
    if final.exists():
        final.rename(gone)  # and deleted when the other has its name, so that whoever reads finds one of the two
    part.rename(final)
    shutil.rmtree(gone, ignore_errors=True)
    for old in checkpoints(final.parents[1])[:-keep]:
        remove(old)
    return final


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted one is never taken for whole."""
    gone = checkpoint.with_suffix(GONE)
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)
