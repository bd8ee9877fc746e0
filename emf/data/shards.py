"""A file of a cache: some samples in order, each with what an encoder made of it; emf.data.cache says what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emf.data.drops import Dropped
from emf.data.images import Sample
from emf.files import check_readable, whole_file, why


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def is_whole(file: Path) -> bool:
    """Whether a shard is there and as long as its header says. Raises ValueError on one that may not be read."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        _check_readable(file)
        return False


def _check_readable(file: Path) -> None:
    """Raises ValueError where a file is there and may not be read: safetensors says of such a one that it is not."""
    try:
        if file.exists():
            check_readable(file)
    except ValueError as error:
        raise ValueError(f"cache: {error}; ask for the right to read it") from None


def write_shard(file: Path, samples: Iterable[Sample | Dropped]) -> None:
    """One shard of encoded samples in order, renamed into place when it is whole and on the disk. Raises ValueError
    where it cannot be written."""
    kept: list[Sample] = []
    row, drops = [], []
    for sample in samples:
        if isinstance(sample, Dropped):
            drops.append((sample.key, sample.source, sample.reason, sample.detail))
            row.append(-1)
        else:
            row.append(len(kept))
            kept.append(sample)
    text = {"keys": [s.key for s in kept], "captions": [s.caption for s in kept], "drops": drops}
    tensors = {"row": torch.tensor(row, dtype=torch.int32)}
    tensors["text"] = torch.from_numpy(np.frombuffer(json.dumps(text).encode(), np.uint8).copy())
    for name in ("mean", "std", "ids"):
        values = [value for s in kept if (value := getattr(s, name)) is not None]
        if values:
            tensors[name] = torch.stack(values)
    try:
        with whole_file(file) as part:
            save_file(tensors, part)
            with part.open("rb") as written:
                os.fsync(written.fileno())
    except ValueError as error:
        raise ValueError(f"cache: {error}; whole shards are kept") from None


class Shard:
    """A shard opened for reading: rows at random. Raises ValueError on a torn one."""

    def __init__(self, file: Path) -> None:
        try:
            self._file = safe_open(file, "pt")
            self._names = set(self._file.keys())
            self.rows: list[int] = self._file.get_tensor("row").tolist()
            text = json.loads(bytes(self._file.get_tensor("text").numpy()))
        except (OSError, SafetensorError, ValueError) as error:
            _check_readable(file)
            state = "torn" if file.exists() else "missing"
            raise ValueError(f"cache: {file} is {state} ({why(error)}); run emf cache again to complete it") from None
        self.keys: list[str] = text["keys"]
        self.captions: list[str] = text["captions"]
        self.drops: list[list[str]] = text["drops"]

    def sample(self, row: int, source: str) -> Sample:
        def tensor(name: str) -> Tensor | None:
            return self._file.get_slice(name)[row : row + 1][0] if name in self._names else None

        return Sample(
            self.keys[row], source, self.captions[row], mean=tensor("mean"), std=tensor("std"), ids=tensor("ids")
        )
