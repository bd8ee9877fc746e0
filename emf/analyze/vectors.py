"""Vectors that were computed before, on disk by key: an interrupted analysis goes on where it was."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emf.files import written
from emf.show.progress import track

HEADER = 128  # bytes of a .npy header, padded so that its row count can grow in place


class Gathered:
    """rows[index] that is never whole in memory: [len(index), C] by slices and index arrays."""

    def __init__(self, rows: np.ndarray, index: np.ndarray) -> None:
        self.rows, self.index = rows, np.asarray(index, np.int64)
        self.shape = (len(self.index), rows.shape[1])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: Any) -> np.ndarray:
        return np.asarray(self.rows[self.index[chosen]])


class VectorCache:
    """float32 vectors of equal width, a file of rows (`STEM.npy`, which numpy.load reads) and one of their keys
    (`STEM.keys`, a JSON string a line). Rows are appended; what a kill left torn is cut off when it is opened."""

    def __init__(self, stem: Path) -> None:
        self.path, self.names = stem.with_name(stem.name + ".npy"), stem.with_name(stem.name + ".keys")
        self.where: dict[str, int] = {}
        self.width = 0
        if not self.path.is_file() or self.path.stat().st_size < HEADER:
            return
        with self.path.open("rb") as file:
            head = file.read(HEADER)
        try:
            if not head.startswith(b"\x93NUMPY\x01\x00"):
                raise ValueError
            self.width = int(head[10:].decode().partition("'shape': (")[2].partition(")")[0].split(",")[1])
        except (ValueError, IndexError, UnicodeDecodeError):
            raise ValueError(f"analyze: {self.path} is no file of vectors; remove it") from None
        self._truncate()

    def _truncate(self) -> None:
        lines = self.names.read_bytes().split(b"\n")[:-1] if self.names.is_file() else []
        n = min(len(lines), (self.path.stat().st_size - HEADER) // (4 * self.width))
        try:
            self.where = {str(json.loads(line)): i for i, line in enumerate(lines[:n])}
        except ValueError:
            raise ValueError(f"analyze: {self.names} is no file of keys; remove it, and {self.path}") from None
        self._cut(n)
        with self.names.open("ab") as names:
            names.truncate(sum(len(line) + 1 for line in lines[:n]))

    def _cut(self, n: int) -> None:
        """The file of rows holds n of them, and says so."""
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({n}, {self.width}), }}"
        with self.path.open("r+b") as file:
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER - 10))
            file.write(text.ljust(HEADER - 11).encode() + b"\n")
            file.truncate(HEADER + 4 * self.width * n)

    @property
    def rows(self) -> np.ndarray:
        """[n, width] float32, on disk."""
        if not self.where:
            return np.zeros((0, self.width), np.float32)
        return np.memmap(self.path, np.float32, "r", HEADER, (len(self.where), self.width))

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the keys that have no vector yet, each key once."""
        return [i for key, i in {key: i for i, key in reversed(list(enumerate(keys)))}.items() if key not in self.where]

    def fill(
        self, keys: Sequence[str], compute: Callable[[list[int]], np.ndarray], batch: int, description: str
    ) -> Gathered:
        """The vectors of keys, [len(keys), width]; compute makes those of a batch of positions in keys, [b, width].

        A kill loses one batch at most. Raises ValueError where compute gives another width than is there, or no
        numbers."""
        missing = sorted(self.missing(keys))
        parts = [missing[i : i + batch] for i in range(0, len(missing), batch)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for part in track(parts, description=description, disable=len(parts) < 2):
                self._append([keys[i] for i in part], np.ascontiguousarray(compute(part), np.float32))
        finally:
            if parts and self.width:
                self._cut(len(self.where))
        return Gathered(self.rows, np.array([self.where[key] for key in keys], np.int64))

    def _append(self, keys: list[str], rows: np.ndarray) -> None:
        if not self.width:
            self.width = rows.shape[1]
            self.path.write_bytes(b"")
            self._cut(0)
            self.names.write_bytes(b"")
        if rows.shape != (len(keys), self.width) or not np.isfinite(rows).all():
            raise ValueError(
                f"analyze: vectors {rows.shape} of {len(keys)} inputs, expected {self.width} finite numbers each; "
                "another --dtype may help"
            )
        # the rows first: a key without its row would be wrong
        with written(self.path), self.path.open("ab") as file:
            file.write(rows.tobytes())
        with written(self.names), self.names.open("a") as names:
            names.write("".join(json.dumps(key) + "\n" for key in keys))
        self.where |= {key: len(self.where) + i for i, key in enumerate(keys)}
