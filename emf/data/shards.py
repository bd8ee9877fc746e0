"""A file of a cache: some samples in order, each with what an encoder made of it; emf.data.cache says what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emf.data.drops import Dropped
from emf.data.images import Sample
from emf.errors import Torn
from emf.files import check_readable, filled, whole_file, why


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def is_whole(file: Path) -> bool:
    """Whether a shard is there and holds what it should. Raises ValueError on one that may not be read."""
    try:
        return file.exists() and bool(Shard(file))
    except Torn:
        return False


def write_shard(
    file: Path, samples: Iterable[Sample | Dropped], marks: Sequence[int] = (), numbers: Sequence[int] = ()
) -> None:
    """One shard of encoded samples in order, renamed into place when it is whole and on the disk. marks: of all
    of them, see emf.data.images.Images.mark; numbers: their places among all samples, where those are not in turn.
    Raises ValueError where it cannot be written."""
    kept: list[Sample] = []
    row, drops = [], []
    for sample in samples:
        if isinstance(sample, Dropped):
            drops.append((sample.key, sample.source, sample.reason, sample.detail))
            row.append(-1)
        else:
            row.append(len(kept))
            kept.append(sample)
    text: dict[str, Any] = {"keys": [s.key for s in kept], "captions": [s.caption for s in kept], "drops": drops}
    if several := {str(i): s.captions for i, s in enumerate(kept) if s.captions}:
        text["several"] = several
    tensors = {"row": torch.tensor(row, dtype=torch.int32)}
    tensors["text"] = torch.from_numpy(np.frombuffer(json.dumps(text).encode(), np.uint8).copy())
    for name, said in (("mark", marks), ("number", numbers)):
        if said:
            tensors[name] = torch.tensor(said, dtype=torch.int64)
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


@dataclass(frozen=True)
class _Told:
    """What a shard's text holds."""

    keys: list[str]
    captions: list[str]
    drops: list[list[str]]
    several: dict[str, list[str]] = field(default_factory=dict)


class Shard:
    """A shard opened for reading: rows at random. Raises ValueError where it is missing or may not be read, and Torn
    where it does not hold what it should."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            raise ValueError(f"cache: {file} is missing; run emf cache again to complete it")
        try:
            check_readable(file)  # of a file that may not be read safetensors says that it is not there
        except ValueError as error:
            raise ValueError(f"cache: {error}; ask for the right to read it") from None
        try:
            self._file = safe_open(file, "pt")
            self._names = set(self._file.keys())
            self.rows: list[int] = self._file.get_tensor("row").tolist()
            self.marks, self.numbers = self._listed("mark"), self._listed("number")
            text = json.loads(bytes(self._file.get_tensor("text").numpy()))
            filled(_Told, text, "its text")
            self._check(text)
        except (OSError, SafetensorError, ValueError, RecursionError, TypeError) as error:
            raise Torn(f"cache: {file} is torn ({why(error)}); run emf cache again to complete it") from None
        self.keys: list[str] = text["keys"]
        self.captions: list[str] = text["captions"]
        self.drops: list[list[str]] = text["drops"]
        self.several: dict[str, list[str]] = text.get("several", {})

    def _listed(self, name: str) -> list[int]:
        listed: list[int] = self._file.get_tensor(name).tolist() if name in self._names else []
        return listed

    def _check(self, text: dict[str, Any]) -> None:
        """Raises ValueError where the rows, the texts and the tensors do not fit each other."""
        for name, said in (("mark", self.marks), ("number", self.numbers)):
            if said and len(said) != len(self.rows):
                raise ValueError(f"it has not a {name} for every sample")
        kept = sum(row >= 0 for row in self.rows)
        sizes = {len(text["keys"]), len(text["captions"])}
        if kept and "mean" not in self._names:
            raise ValueError("it holds no latents")
        sizes |= {self._file.get_slice(name).get_shape()[0] for name in ("mean", "std", "ids") if name in self._names}
        dropped = [isinstance(drop, list) and [*map(type, drop)] == [str] * 4 for drop in text["drops"]]
        if not all(text.get("several", {}).values()):
            raise ValueError("a sample of several captions has none")
        if sizes != {kept} or max(self.rows, default=-1) >= kept or len(self.rows) - kept != sum(dropped):
            raise ValueError("its rows, texts and tensors do not fit each other")

    def sample(self, row: int, source: str) -> Sample:
        def tensor(name: str) -> Tensor | None:
            return self._file.get_slice(name)[row : row + 1][0] if name in self._names else None

        tensors: Any = {name: tensor(name) for name in ("mean", "std", "ids")}
        captions = tuple(self.several.get(str(row), ()))
        return Sample(self.keys[row], source, self.captions[row], **tensors, captions=captions)
