"""What is promised of a picture that is computed twice (emf.sample.sampler.Sampler)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pictures_of(source: Path | Iterable[Any]) -> dict[str, np.ndarray]:
    """The PNG files of a folder by their names, or pictures by their places: each [H, W, 3] as whole numbers."""
    if isinstance(source, Path):
        found: dict[str, Any] = {str(p.relative_to(source)): Image.open(p) for p in sorted(source.rglob("*.png"))}
    else:
        found = {str(i): picture for i, picture in enumerate(source)}
    assert found, f"{source} holds no pictures"
    return {name: np.asarray(picture).astype(int) for name, picture in found.items()}


def assert_same_pictures(a: Path | Iterable[Any], b: Path | Iterable[Any], levels: int = 1) -> None:
    """The same names, the same sizes, and no pixel further apart than so many levels of 255.

    One level is what is promised of pictures from batches of other sizes, from other numbers of threads and from
    other processors, where sums are rounded in another order. In the same batches on one machine the promise is 0.
    """
    one, two = pictures_of(a), pictures_of(b)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape, name
        apart = int(abs(one[name] - two[name]).max())
        assert apart <= levels, f"{name}: {apart} levels apart; expected at most {levels}"
