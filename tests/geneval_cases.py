"""Cases of GenEval's rules on hand-made detections, and folders of images in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emf.evaluate.rules import Detection

# The rules: (tag, include, exclude, detections as (class, score, x, y, colour) of 10 x 10 pixels, correct)


def one(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


def at(label: str, score: float = 0.95, x: float = 0, y: float = 0, color: str = "red") -> Detection:
    return Detection(label, score, (x, y, x + 10, y + 10), color)


def beside(relation: str, **more: Any) -> list[dict[str, Any]]:
    return [one("dog"), one("cat", position=[relation, 0], **more)]


def dogs(n: int, score: float = 0.95) -> list[Detection]:
    return [at("dog", score)] * n


def placed(dx: float, dy: float = 0) -> list[Detection]:
    """A cat whose centre lies (dx, dy) from the dog's; their sizes sum to 20, so that offsets up to 2 are none."""
    return [at("dog", x=100, y=100), at("cat", x=100 + dx, y=100 + dy)]


FOUR = dict(include=[one("dog", 4)], exclude=[one("dog", 5)])
RED = dict(include=[one("dog", color="red")])
TWO_RED = dict(include=[one("dog", 2, color="red")])
CASES: dict[str, tuple[str, dict[str, Any], list[Detection], bool]] = {
    "there": ("single_object", dict(include=[one("dog")]), dogs(1), True),
    "not there": ("single_object", dict(include=[one("dog")]), [], False),
    "another class": ("single_object", dict(include=[one("dog")]), [at("cat")], False),
    "also another class": ("single_object", dict(include=[one("dog")]), [at("cat"), at("dog")], True),
    "surplus without exclude": ("single_object", dict(include=[one("dog")]), dogs(3), True),
    "score above 0.3": ("single_object", dict(include=[one("dog")]), dogs(1, 0.3001), True),
    "score at 0.3": ("single_object", dict(include=[one("dog")]), dogs(1, 0.3), False),
    "score below 0.3": ("single_object", dict(include=[one("dog")]), dogs(1, 0.2999), False),
    "0.9 is for counting only": ("two_object", dict(include=[one("dog")]), dogs(1, 0.5), True),
    "both there": ("two_object", dict(include=[one("dog"), one("cat")]), [at("cat"), at("dog")], True),
    "second missing": ("two_object", dict(include=[one("dog"), one("cat")]), dogs(2), False),
    "first missing": ("two_object", dict(include=[one("dog"), one("cat")]), [at("cat")], False),
    "nothing is asked": ("two_object", dict(include=[]), [], True),
    "count: none": ("counting", FOUR, [], False),
    "count: under by one": ("counting", FOUR, dogs(3), False),
    "count: exact": ("counting", FOUR, dogs(4), True),
    "count: over by one": ("counting", FOUR, dogs(5), False),
    "count: far over": ("counting", FOUR, dogs(20), False),
    "count: one is at 0.9": ("counting", FOUR, dogs(3) + dogs(1, 0.9), False),
    "count: one is above 0.9": ("counting", FOUR, dogs(3) + dogs(1, 0.9001), True),
    "count: surplus below 0.9": ("counting", FOUR, dogs(4) + dogs(3, 0.89), True),
    "count: surplus above 0.9": ("counting", FOUR, dogs(4) + dogs(1, 0.91), False),
    "count: others do not count": ("counting", FOUR, dogs(4) + [at("cat")] * 5, True),
    "exclude alone, kept": ("counting", dict(include=[], exclude=[one("dog", 2)]), dogs(1), True),
    "exclude alone, broken": ("counting", dict(include=[], exclude=[one("dog", 2)]), dogs(2), False),
    "exclude another class": ("two_object", dict(include=[one("cat")], exclude=[one("dog")]), [at("cat")], True),
    "excluded class seen": (
        "two_object",
        dict(include=[one("cat")], exclude=[one("dog")]),
        [at("cat"), *dogs(1)],
        False,
    ),
    "excluded at 0.3": (
        "two_object",
        dict(include=[one("cat")], exclude=[one("dog")]),
        [at("cat"), at("dog", 0.3)],
        True,
    ),
    "sixteen at most": ("counting", dict(include=[one("dog", 16)], exclude=[one("dog", 17)]), dogs(20), True),
    "sixteen, not fifteen": ("counting", dict(include=[one("dog", 16)]), dogs(15), False),
    "seventeen cannot be": ("counting", dict(include=[one("dog", 17)]), dogs(20), False),
    "sixteen of each class": (
        "counting",
        dict(include=[one("dog", 16), one("cat", 16)]),
        dogs(16) + [at("cat")] * 17,
        True,
    ),
    "colour right": ("colors", RED, [at("dog", color="red")], True),
    "colour wrong": ("colors", RED, [at("dog", color="blue")], False),
    "colour of the best alone, right": ("colors", RED, [at("dog", 0.9), at("dog", 0.8, color="blue")], True),
    "colour of the best alone, wrong": ("colors", RED, [at("dog", 0.8), at("dog", 0.9, color="blue")], False),
    "colour of one below 0.3": ("colors", RED, [at("dog", 0.3), at("dog", 0.4, color="blue")], False),
    "colour of both": ("colors", TWO_RED, dogs(2), True),
    "colour of one of two": ("colors", TWO_RED, [at("dog"), at("dog", color="blue")], False),
    "colour of the best two of three": ("colors", TWO_RED, [at("dog", 0.4, color="blue"), *dogs(2)], True),
    "coloured but too few": ("colors", TWO_RED, dogs(1), False),
    "colour of another class": ("colors", RED, [at("dog", color="blue"), at("cat", color="red")], False),
    "two colours right": (
        "color_attr",
        dict(include=[one("dog", color="red"), one("cat", color="blue")]),
        [at("dog"), at("cat", color="blue")],
        True,
    ),
    "two colours swapped": (
        "color_attr",
        dict(include=[one("dog", color="red"), one("cat", color="blue")]),
        [at("dog", color="blue"), at("cat", color="red")],
        False,
    ),
    "one colour of two": (
        "color_attr",
        dict(include=[one("dog", color="red"), one("cat", color="blue")]),
        [at("dog"), at("cat")],
        False,
    ),
    "left": ("position", dict(include=beside("left of")), placed(-30), True),
    "right": ("position", dict(include=beside("right of")), placed(30), True),
    "above": ("position", dict(include=beside("above")), placed(0, -30), True),
    "below": ("position", dict(include=beside("below")), placed(0, 30), True),
    "left, mirrored": ("position", dict(include=beside("left of")), placed(30), False),
    "right, mirrored": ("position", dict(include=beside("right of")), placed(-30), False),
    "above, mirrored": ("position", dict(include=beside("above")), placed(0, 30), False),
    "below, mirrored": ("position", dict(include=beside("below")), placed(0, -30), False),
    # along one axis what is left, d - 2, must exceed d / 2: d > 4
    "left at the threshold": ("position", dict(include=beside("left of")), placed(-4), False),
    "left beyond the threshold": ("position", dict(include=beside("left of")), placed(-4.01), True),
    "right at the threshold": ("position", dict(include=beside("right of")), placed(4), False),
    "right beyond the threshold": ("position", dict(include=beside("right of")), placed(4.01), True),
    "above at the threshold": ("position", dict(include=beside("above")), placed(0, -4), False),
    "above beyond the threshold": ("position", dict(include=beside("above")), placed(0, -4.01), True),
    "below at the threshold": ("position", dict(include=beside("below")), placed(0, 4), False),
    "below beyond the threshold": ("position", dict(include=beside("below")), placed(0, 4.01), True),
    "same place": ("position", dict(include=beside("left of")), placed(0), False),
    "within the slack": ("position", dict(include=beside("left of")), placed(-2), False),
    "diagonal counts as left": ("position", dict(include=beside("left of")), placed(-30, 30), True),
    "diagonal counts as below": ("position", dict(include=beside("below")), placed(-30, 30), True),
    "steep is not left": ("position", dict(include=beside("left of")), placed(-15, 40), False),
    "no target": ("position", dict(include=beside("left of")), [at("cat")], False),
    "nothing at the target": ("position", dict(include=beside("left of")), dogs(1), False),
    "the best cat is asked": (
        "position",
        dict(include=beside("left of")),
        [*placed(30), at("cat", 0.5, x=0, y=100)],
        False,
    ),
    "target of the wrong colour is none": (
        "position",
        dict(include=[one("dog", color="blue"), one("cat", position=["left of", 0])]),
        placed(-30),
        False,
    ),
    "coloured target": (
        "position",
        dict(include=[one("dog", color="red"), one("cat", position=["left of", 0])]),
        placed(-30),
        True,
    ),
    "placed but of the wrong colour": ("position", dict(include=beside("left of", color="blue")), placed(-30), False),
    "a misplaced object is no target": (
        "position",
        dict(include=[*beside("left of"), one("cow", position=["above", 1])]),
        [*placed(30), at("cow", x=130, y=0)],
        False,
    ),
    "a chain of relations": (
        "position",
        dict(include=[*beside("left of"), one("cow", position=["above", 1])]),
        [*placed(-30), at("cow", x=70, y=0)],
        True,
    ),
    "every dog must be passed": (
        "position",
        dict(include=[one("dog", 2), one("cat", position=["left of", 0])]),
        [*placed(-30), at("dog", x=0, y=100)],
        False,
    ),
    "every dog is passed": (
        "position",
        dict(include=[one("dog", 2), one("cat", position=["left of", 0])]),
        [*placed(-30), at("dog", x=200, y=100)],
        True,
    ),
    "every cat must stand there": (
        "position",
        dict(include=[one("dog"), one("cat", 2, position=["left of", 0])]),
        [*placed(-30), at("cat", x=200, y=100)],
        False,
    ),
}


def make_folder(root: Path, specs: list[dict[str, Any]], images: int = 2) -> list[str]:
    """GenEval's layout, every image another; the images' names."""
    rng, names = np.random.default_rng(0), []
    for i, spec in enumerate(specs):
        samples = root / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(spec) + "\n")
        for j in range(images):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(samples / f"{j:04d}.png")
            names.append(f"{i:05d}/samples/{j:04d}.png")
    return names


def record(file: Path, found: dict[str, list[Detection]]) -> Path:
    keys = ("label", "score", "box", "color")
    rows = [{"filename": n, "detections": [{k: getattr(d, k) for k in keys} for d in ds]} for n, ds in found.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
