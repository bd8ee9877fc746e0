"""GenEval's rules (arXiv 2310.11513): do these detections show what the metadata asks for? Apart from any detector."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Detection:
    """One object found in an image."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels."""
    color: str | None = None


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


def evaluate(spec: dict[str, Any], detections: Sequence[Detection], threshold: float = 0.1) -> tuple[bool, str]:
    """(correct, reason) of an image. spec: GenEval metadata; detections: all that passed the detector's own threshold.

    For each included class the `count` highest-scored detections are taken; colours and positions are asked of those.
    Only `exclude` catches surplus. A position is asked against an earlier entry, which must itself hold.
    """
    by_label = defaultdict(list)
    for d in sorted(detections, key=lambda d: -d.score):
        by_label[d.label].append(d)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # of each entry, what was found; None where it does not hold
    for wanted in spec["include"]:
        found = by_label[wanted["class"]][: wanted["count"]]
        fault = _fault(wanted, found, groups, threshold)
        groups.append(None if fault else found)
        reasons += [fault] if fault else []
    for unwanted in spec.get("exclude", ()):
        label, count, n = unwanted["class"], unwanted["count"], len(by_label[unwanted["class"]])
        if n >= count:
            reasons.append(f"expected {label}<{count}, found {n}")
    return not reasons, "; ".join(reasons)


def _fault(
    wanted: dict[str, Any], found: list[Detection], groups: list[list[Detection] | None], threshold: float
) -> str:
    """What keeps an included entry from holding; empty where it holds."""
    label, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {label}>={count}, found {len(found)}"
    if "color" in wanted and any(d.color != wanted["color"] for d in found):
        return f"expected {wanted['color']} {label}>={count}, found {', '.join(str(d.color) for d in found)}"
    if "position" in wanted:
        relation, index = wanted["position"]
        target = groups[index]
        if target is None:
            return f"no target for {label} to be {relation}"
        if any(relation not in relations(d, other, threshold) for d in found for other in target):
            return f"expected {label} {relation} target"
    return ""
