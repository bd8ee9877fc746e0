"""A small world with GenEval's six tasks: scikit-learn's 1,797 scanned digits, coloured, in scenes with captions.

A scene is described by GenEval's own metadata ({"tag", "include": [...], "exclude": [...], "prompt"}; classes are the
digits' names) and drawn from it. Training and evaluation use different scans. Everything is a function of a seed: a
resumed run sees the same batches.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from emf.conditioning.words import Words
from emf.data.world import GLYPH, World

Split = Literal["train", "held_out"]
Spec = dict[str, Any]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
# GenEval's ten colours, spread over the RGB cube; the background is none of them.
PALETTE = {
    "red": (220, 20, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 240, 30),
    "green": (20, 160, 50),
    "blue": (20, 40, 230),
    "purple": (130, 20, 180),
    "pink": (255, 150, 200),
    "brown": (110, 55, 10),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
COLORS = tuple(PALETTE)
BACKGROUND = 128
CELLS = 2  # a scene has 2 x 2 cells

VOCAB = ("<pad>", "a", "an", "and", "to", "the", "of", "left", "right", "above", "below", *CLASSES, *PLURALS, *COLORS)
MAX_TOKENS = 10  # "a blue three to the left of a green five"
PAIRS = (*zip(COLORS[::2], COLORS[1::2], strict=True), ("left", "right"), ("above", "below"))
WORDS = Words("digits", VOCAB, MAX_TOKENS, PAIRS)


@cache
def scans(split: Split) -> tuple[np.ndarray, ...]:
    """The scans [n, 8, 8] float32 in [0, 1] of each class 0..9; every fifth of a class is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    by_class = [images[data.target == k] for k in range(10)]
    return tuple(s[(np.arange(len(s)) % 5 == 0) == (split == "held_out")] for s in by_class)


def _entry(digit: str, count: int, color: str | None) -> Spec:
    return {"class": digit, "count": count} | ({"color": color} if color else {})


def _article(color: str | None, digit: str) -> str:
    words = f"{color} {digit}" if color else digit
    return f"{'an' if words[0] in 'aeiou' and words != 'one' else 'a'} {words}"


def sample_spec(rng: np.random.Generator, tag: str | None = None) -> Spec:
    """A random scene description in GenEval's schema. Raises ValueError on an unknown tag."""
    tag = TAGS[rng.integers(len(TAGS))] if tag is None else tag
    if tag not in TAGS:
        raise ValueError(f"digits: tag {tag!r} is unknown; expected one of {', '.join(TAGS)}")
    first, second = (CLASSES[i] for i in rng.permutation(10)[:2])
    one, two = (COLORS[i] for i in rng.permutation(len(COLORS))[:2])
    spec: Spec = {"tag": tag}
    if tag in ("single_object", "colors"):
        color = one if tag == "colors" else None
        return spec | {"include": [_entry(first, 1, color)], "prompt": _article(color, first)}
    if tag == "counting":
        n, color = int(rng.integers(2, 5)), one if rng.random() < 0.5 else None
        words = [NUMBERS[n], *([color] if color else []), PLURALS[CLASSES.index(first)]]
        exclude = [{"class": first, "count": n + 1}]
        return spec | {"include": [_entry(first, n, color)], "exclude": exclude, "prompt": " ".join(words)}
    colored = tag == "color_attr" or (tag == "position" and rng.random() < 0.5)
    colors = (one, two) if colored else (None, None)
    a, b = _entry(first, 1, colors[0]), _entry(second, 1, colors[1])
    names = _article(colors[0], first), _article(colors[1], second)
    if tag != "position":
        return spec | {"include": [a, b], "prompt": f"{names[0]} and {names[1]}"}
    relation = list(RELATIONS)[rng.integers(4)]
    # GenEval: include[0] is the target, the second entry stands in `relation` to it; the caption names that one first.
    prompt = f"{names[0]} {RELATIONS[relation]} {names[1]}"
    return spec | {"include": [b, a | {"position": [relation, 0]}], "prompt": prompt}


def arrange(spec: Spec, rng: np.random.Generator) -> list[tuple[int, str, int, int]]:
    """(digit, colour, row, column) of every object of a scene, what the caption leaves open drawn at random.

    Related objects stand in a random row or column; others fill the cells in reading order, from the upper or the lower
    row.
    """
    objects = [(CLASSES.index(e["class"]), e.get("color")) for e in spec["include"] for _ in range(e["count"])]
    relation = next((e["position"][0] for e in spec["include"] if "position" in e), None)
    line = int(rng.integers(CELLS))
    if relation:
        low, high = ((line, 0), (line, 1)) if relation in ("left of", "right of") else ((0, line), (1, line))
        cells = [high, low] if relation in ("left of", "above") else [low, high]  # target first
    else:
        cells = [(line ^ i // CELLS, i % CELLS) for i in range(len(objects))]
    colors = [color or COLORS[rng.integers(len(COLORS))] for _, color in objects]
    return [(digit, color, *cell) for (digit, _), color, cell in zip(objects, colors, cells, strict=True)]


def render(spec: Spec, rng: np.random.Generator, split: Split = "train", world: World | None = None) -> np.ndarray:
    """The scene [3, size, size], float32 in [-1, 1]: background (1 - a) + colour a, a the scan's ink."""
    world = world or World()
    canvas = np.full((3, world.size, world.size), BACKGROUND / 127.5 - 1, np.float32)
    down, right = rng.integers(world.shift + 1, size=2)
    for digit, color, row, column in arrange(spec, rng):
        pool = scans(split)[digit]
        ink = pool[rng.integers(len(pool))]
        own_down, own_right = rng.integers(world.jitter + 1, size=2)
        y, x = down + own_down + row * world.pitch, right + own_right + column * world.pitch
        patch = canvas[:, y : y + GLYPH, x : x + GLYPH]
        patch += ink * (np.array(PALETTE[color], np.float32)[:, None, None] / 127.5 - 1 - patch)
    return canvas


def make_batch(seed: int, size: int, split: Split = "train", world: World | None = None) -> tuple[Tensor, list[str]]:
    """(images [size, 3, H, W] float32 in [-1, 1], captions): a function of its arguments alone."""
    rng = np.random.default_rng(seed)
    specs = [sample_spec(rng) for _ in range(size)]
    return torch.from_numpy(np.stack([render(s, rng, split, world) for s in specs])), [s["prompt"] for s in specs]


def prompts(per_tag: int, seed: int = 0) -> list[Spec]:
    """The fixed evaluation set: per_tag descriptions of each tag in turn; no prompt twice where there are enough."""
    rng, chosen = np.random.default_rng(seed), []
    for tag in TAGS:
        seen: dict[str, Spec] = {}
        for _ in range(per_tag * 20):
            spec = sample_spec(rng, tag)
            seen.setdefault(spec["prompt"], spec)
            if len(seen) == per_tag:
                break
        pool = list(seen.values())
        chosen += [pool[i % len(pool)] for i in range(per_tag)]
    return chosen
