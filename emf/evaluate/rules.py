"""GenEval's rules (arXiv 2310.11513; djghosh13/geneval): do these detections show what the metadata asks for?

Apart from any detector. Metadata: {"tag", "include": [{"class", "count"[, "color"][, "position": [relation, index]]}],
["exclude": [{"class", "count"}]], "prompt"}. A key may be null, which is as if it were not there.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SCORE, COUNTING_SCORE = 0.3, 0.9
"""A detection counts above this score; in the counting task, above the second."""
MOST = 16
"""Objects of a class that are looked at, the highest-scored."""
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Detection:
    """One object found in an image."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels."""
    color: str | None = None
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Bool [H, W] over the whole image."""


Colors = Callable[[str, Sequence[Detection]], Sequence[str | None]]
"""(class, objects of it) -> the colour of each."""


def select(detections: Sequence[Detection], tag: str) -> list[Detection]:
    """What GenEval looks at: above the tag's score, at most 16 a class; highest score first.

    As in the official code scores and thresholds are float32, so that a score of 0.3 as float32 has it does not count;
    and of equal scores the later detection comes first, for there the order is that of argsort, reversed.
    """
    least = np.float32(COUNTING_SCORE if tag == "counting" else SCORE)
    kept: list[Detection] = []
    seen: Counter[str] = Counter()
    for d in sorted(reversed(detections), key=lambda d: -np.float32(d.score)):
        if np.float32(d.score) > least and seen[d.label] < MOST:
            seen[d.label] += 1
            kept.append(d)
    return kept


def relations(a: Detection, b: Detection, threshold: float = 0.1) -> set[str]:
    """Where a stands seen from b: of left of, right of, above, below; empty where they overlap too much.

    The offset of the centres is shortened by threshold x (sum of the sizes) along each axis; a direction counts where
    what is left of it exceeds half of the offset's length.
    """
    centres = [((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in (a, b)]
    sizes = [(abs(d.box[2] - d.box[0]), abs(d.box[3] - d.box[1])) for d in (a, b)]
    offset = [centres[0][i] - centres[1][i] for i in (0, 1)]
    slack = [threshold * (sizes[0][i] + sizes[1][i]) for i in (0, 1)]
    kept = [math.copysign(max(abs(offset[i]) - slack[i], 0.0), offset[i]) for i in (0, 1)]
    if all(abs(k) < 1e-3 for k in kept):
        return set()
    length = math.hypot(*offset)
    dx, dy = kept[0] / length, kept[1] / length
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in found.items() if holds}


def check_metadata(metadata: Any, classes: Sequence[str], where: str) -> None:
    """Raises ValueError, naming `where`, on metadata that no detector of these classes could ever satisfy or read."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{where}: {what}; expected GenEval's metadata, one JSON object")

    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise wrong("the object or its prompt is missing")
    if not isinstance(metadata.get("tag"), str) or not isinstance(metadata.get("include"), list):
        raise wrong("tag or include is missing")
    if not isinstance(metadata.get("exclude") or [], list):
        raise wrong("exclude is no list")
    for key in ("include", "exclude"):
        for i, entry in enumerate(metadata.get(key) or ()):
            if not isinstance(entry, dict) or entry.get("class") not in classes:
                raise wrong(f"the class of {key}[{i}] is none that the detector knows")
            if not isinstance(entry.get("count"), int) or entry["count"] < 1:
                raise wrong(f"the count of {key}[{i}] is no positive number")
            if not isinstance(entry.get("color", ""), str | None):
                raise wrong(f"the color of {key}[{i}] is no text")
            if (position := entry.get("position")) is not None:
                relation, index = position if isinstance(position, (list, tuple)) and len(position) == 2 else ("", -1)
                if relation not in RELATIONS or not isinstance(index, int) or not 0 <= index < i:
                    raise wrong(f"the position of {key}[{i}] names no relation to an earlier entry")


def evaluate(
    spec: dict[str, Any], detections: Sequence[Detection], threshold: float = 0.1, colors: Colors | None = None
) -> tuple[bool, str]:
    """(correct, reason) of an image. spec: GenEval metadata; detections: all that count (select); of equal scores the
    first counts more.

    For each included class the `count` highest-scored detections are taken; colours and positions are asked of those,
    positions only where the colours hold. Only `exclude` catches surplus. A position is asked against an earlier entry,
    which must itself hold. colors: asked only where it matters; by default the detections' own.
    """
    colors = colors or (lambda label, found: [d.color for d in found])
    by_label = defaultdict(list)
    for d in sorted(detections, key=lambda d: -np.float32(d.score)):
        by_label[d.label].append(d)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # of each entry, what was found; None where it does not hold
    for wanted in spec.get("include") or ():
        found = by_label[wanted["class"]][: wanted["count"]]
        fault = _fault(wanted, found, groups, threshold, colors)
        groups.append(None if fault else found)
        reasons += [fault] if fault else []
    for unwanted in spec.get("exclude") or ():
        label, count, n = unwanted["class"], unwanted["count"], len(by_label[unwanted["class"]])
        if n >= count:
            reasons.append(f"expected {label}<{count}, found {n}")
    return not reasons, "; ".join(reasons)


def _fault(
    wanted: dict[str, Any],
    found: list[Detection],
    groups: list[list[Detection] | None],
    threshold: float,
    colors: Colors,
) -> str:
    """What keeps an included entry from holding; empty where it holds."""
    label, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {label}>={count}, found {len(found)}"
    if wanted.get("color") is not None:
        shown = colors(label, found)
        if any(color != wanted["color"] for color in shown):
            return f"expected {wanted['color']} {label}>={count}, found {', '.join(map(str, shown))}"
    if wanted.get("position") is not None:
        relation, index = wanted["position"]
        target = groups[index]
        if target is None:
            return f"no target for {label} to be {relation}"
        if any(relation not in relations(d, other, threshold) for d in found for other in target):
            return f"expected {label} {relation} target"
    return ""
