"""Contact sheets: images with texts in rows and columns, as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emf.files import whole_file
from emf.show.lettering import Lettering

CELL, GAP, UNDER = 176, 10, 3  # pixels: an image's place, between cells, from an image to its text
TEXT = 150  # pixels of a column without images, at least
SMALL = 64  # pixels below which an image is enlarged without smoothing
PAPER, MAT = "white", "#eef0f3"


@dataclass(frozen=True)
class Cell:
    """A place on a sheet: an image above text, or either alone."""

    text: str = ""
    image: Image.Image | np.ndarray | None = None
    """An image, or an array [H, W, 3] uint8."""


def sheet(
    rows: Sequence[Sequence[Cell]], heads: Sequence[str] = (), *, cell: int = CELL, lines: int = 6
) -> Image.Image:
    """Rows of cells, under column heads where there are any. cell: pixels along an image's place. lines: of a cell's
    text at most. Images keep their aspect. Raises ValueError where there is no row."""
    if not rows or not any(rows):
        raise ValueError("sheet: there is nothing to show")
    plain, bold = Lettering(), Lettering(bold=True)
    columns = max(map(len, [*rows, heads]))
    pictured = [any(len(row) > j and row[j].image is not None for row in rows) for j in range(columns)]
    wide = [cell if pictured[j] else max(cell, TEXT) for j in range(columns)]
    texts = [[plain.wrap(c.text, wide[j], lines) if c.text else [] for j, c in enumerate(row)] for row in rows]
    named = [bold.wrap(head, wide[j], 2) for j, head in enumerate(heads)]

    def below(c: Cell) -> int:
        """From a cell's top to its text."""
        return cell + UNDER if c.image is not None else 0

    deep = [
        max(
            (cell if c.image is not None and not t else below(c) + len(t) * plain.line)
            for c, t in zip(*row, strict=True)
        )
        for row in zip(rows, texts, strict=True)
    ]
    top = GAP + (max(map(len, named)) * bold.line + GAP // 2 if named else 0)
    size = GAP + sum(w + GAP for w in wide), top + sum(d + GAP for d in deep)
    made = Image.new("RGB", size, PAPER)
    places = [GAP + sum(w + GAP for w in wide[:j]) for j in range(columns)]
    for x, w, head in zip(places, wide, named, strict=False):
        bold.draw(made, (x, GAP), head, w)
    y = top
    for i, row in enumerate(rows):
        for j, c in enumerate(row):
            if c.image is not None:
                made.paste(_fitted(c.image, cell), (places[j], y))
            plain.draw(made, (places[j], y + below(c)), texts[i][j], wide[j])
        y += deep[i] + GAP
    return made


def write_sheet(path: Path, rows: Sequence[Sequence[Cell]], heads: Sequence[str] = (), **how: Any) -> None:
    """A sheet as a PNG file; see `sheet` and emf.files.whole_file."""
    made = sheet(rows, heads, **how)
    with whole_file(path) as part:
        made.save(part, "png")


def captioned(captions: Sequence[str], columns: dict[str, Any]) -> list[list[Cell]]:
    """Rows for captions down and, by column, an image of each across: arrays [H, W, 3] uint8 or images."""
    return [
        [Cell(caption), *(Cell(image=images[i]) for images in columns.values())] for i, caption in enumerate(captions)
    ]


def _fitted(image: Image.Image | np.ndarray, cell: int) -> Image.Image:
    """Within a square, on its own aspect, in the middle of grey."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, np.uint8))
    image = image.convert("RGB")
    how = Image.Resampling.NEAREST if max(image.size) < SMALL else Image.Resampling.BICUBIC
    scale = cell / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)
    square = Image.new("RGB", (cell, cell), MAT)
    square.paste(small, ((cell - small.width) // 2, (cell - small.height) // 2))
    return square
