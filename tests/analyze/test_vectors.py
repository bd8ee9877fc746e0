"""Vectors on disk: what a kill leaves is continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emf.analyze.vectors import VectorCache


def vectors_of(keys: list[str]) -> np.ndarray:
    return np.array([[len(k), ord(k[0]), 0.5] for k in keys], np.float32)


@pytest.mark.parametrize(
    "rows, names, kept", [(-3, 0, 7), (0, -2, 7), (-13, -1, 6), (5, 0, 8), (-10_000, 0, 0), (0, -10_000, 0)]
)
def test_a_torn_cache_is_continued(tmp_path: Path, rows: int, names: int, kept: int) -> None:
    """Bytes lost (or too many) at the end of either file: the same vectors, nothing made twice that was whole."""
    keys, asked = [f"{chr(97 + i)}\n{'x' * i}" for i in range(12)], []

    def compute(part: list[int]) -> np.ndarray:
        asked.extend(part)
        if len(asked) > 8:  # Ctrl-C in the fifth batch
            raise KeyboardInterrupt
        return vectors_of([keys[i] for i in part])

    with pytest.raises(KeyboardInterrupt):
        VectorCache(tmp_path / "v").fill(keys, compute, 2, "")
    assert len(np.load(tmp_path / "v.npy")) == 8
    for path, cut in ((tmp_path / "v.npy", rows), (tmp_path / "v.keys", names)):
        data = path.read_bytes()
        path.write_bytes(data[: max(0, len(data) + cut)] if cut <= 0 else data + b"\0" * cut)
    whole = VectorCache(tmp_path / "v")
    assert len(whole.where) == kept
    redone: list[int] = []

    def rest(part: list[int]) -> np.ndarray:
        redone.extend(part)
        return vectors_of([keys[i] for i in part])

    again = whole.fill(keys + keys[:1], rest, 5, "")
    assert redone == list(range(kept, 12))
    assert again.shape == (13, 3) and np.array_equal(again[:], vectors_of([*keys, keys[0]]))
    assert np.array_equal(again[np.array([12, 3])], vectors_of([keys[0], keys[3]]))
    assert np.load(tmp_path / "v.npy").shape == (12, 3)
    more = VectorCache(tmp_path / "v")
    assert more.missing([*keys, "new", "new"]) == [12]
    with pytest.raises(ValueError, match=r"vectors \(1, 3\).*finite"):
        more.fill(["new"], lambda part: np.full((1, 3), np.nan), 1, "")
    (tmp_path / "v.npy").write_bytes(b"something else" * 20)
    with pytest.raises(ValueError, match="no file of vectors"):
        VectorCache(tmp_path / "v")
