"""SANA's aspect-ratio buckets: which sizes pictures are trained at, and which of them a picture goes to.

The sizes of a base size are those of SANA's training lists (arXiv 2410.10629, released code: ASPECT_RATIO_512 and
ASPECT_RATIO_1024), which are one list in sixteenths of the base. None has more pixels than the base squared, and none
has less than nine tenths of them.
"""

from __future__ import annotations

from collections.abc import Sequence

PARTS = 16
"""Sides are multiples of base / PARTS."""
# fmt: off
LIST: tuple[tuple[float, int, int], ...] = (
    (0.25, 8, 32), (0.26, 8, 31), (0.27, 8, 30), (0.28, 8, 29), (0.32, 9, 28), (0.33, 9, 27), (0.35, 9, 26),
    (0.4, 10, 25), (0.42, 10, 24), (0.48, 11, 23), (0.5, 11, 22), (0.52, 11, 21), (0.57, 12, 21), (0.6, 12, 20),
    (0.68, 13, 19), (0.72, 13, 18), (0.78, 14, 18), (0.82, 14, 17), (0.88, 15, 17), (0.94, 15, 16), (1.0, 16, 16),
    (1.07, 16, 15), (1.13, 17, 15), (1.21, 17, 14), (1.29, 18, 14), (1.38, 18, 13), (1.46, 19, 13), (1.67, 20, 12),
    (1.75, 21, 12), (2.0, 22, 11), (2.09, 23, 11), (2.4, 24, 10), (2.5, 25, 10), (2.89, 26, 9), (3.0, 27, 9),
    (3.11, 28, 9), (3.62, 29, 8), (3.75, 30, 8), (3.88, 31, 8), (4.0, 32, 8),
)
# fmt: on
"""(height / width as SANA's list names it, height, width) of every bucket."""
UNREAD = -1
"""The bucket of a picture whose size cannot be read."""


def sizes(base: int) -> list[tuple[int, int]]:
    """(width, height) of every bucket. Raises ValueError where the base size has none."""
    if base % PARTS:
        near = max(PARTS, round(base / PARTS) * PARTS)
        raise ValueError(f"data: buckets of size {base} have no whole sides; expected a multiple of {PARTS}, as {near}")
    unit = base // PARTS
    return [(width * unit, height * unit) for _, height, width in LIST]


def nearest(width: int, height: int) -> int:
    """The bucket of a picture: that of the nearest height / width, as SANA and diffusers find it."""
    return min(range(len(LIST)), key=lambda bucket: abs(LIST[bucket][0] - height / width))


def told_of(counts: Sequence[int], base: int, batch: int) -> str:
    """What a run says of its buckets. counts: of their samples; batch: samples of a step."""
    held = [(n, width, height) for n, (width, height) in zip(counts, sizes(base), strict=True) if n]
    most, few = max(held), sum(n < batch for n, *_ in held)
    said = f"{len(held)} of {len(counts)} sizes by ratio have pictures, {most[1]}x{most[2]} the most ({most[0]:,})"
    return said + f"; {few} have fewer than a step's {batch}, which then holds some of them again" * (few > 0)
