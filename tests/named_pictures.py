"""A world of named pictures without a package: coloured shapes behind the interface of OpenMoji's."""

from __future__ import annotations

import numpy as np

from emf.data.gallery import DRAWN, Gallery

COLORS = {"red": (230, 20, 20), "blue": (20, 40, 220), "green": (20, 160, 40), "black": (10, 10, 10)}
SHAPES = ("square", "disc", "bar with stripes")


def shapes() -> Gallery:
    """Twelve pictures: a square, a disc and a bar, each in four colours, whose name is "red square" and another name
    "box in red"."""
    y, x = np.mgrid[:DRAWN, :DRAWN] - (DRAWN - 1) / 2
    covers = {
        "square": np.maximum(abs(x), abs(y)) < 7,
        "disc": x**2 + y**2 < 49,
        "bar with stripes": (abs(y) < 3) & (abs(x) < 8) & (x.round() % 3 > 0),
    }
    others = {"square": "box", "disc": "ball", "bar with stripes": "ladder"}
    names, aliases, drawn = [], [], []
    for shape in SHAPES:
        for color, rgb in COLORS.items():
            names.append(f"{color} {shape}")
            aliases.append((f"{others[shape]} in {color}",))
            cover = covers[shape][..., None].astype(np.uint8)
            drawn.append(np.concatenate([cover * np.array(rgb, np.uint8), cover * 255], 2))
    return Gallery("shapes", tuple(names), tuple(aliases), np.stack(drawn), "Drawn by a test.")
