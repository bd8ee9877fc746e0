"""The paper in miniature as a study: what a row of its results.json holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emf.data.digits import TAGS
from emf.evaluate.run_log import read_curve, read_metrics
from emf.files import fits, misfit
from emf.paper.parts import EMF_STEPS, FM_STEPS, Budget, parts
from emf.paper.record import ENCODER, SCORES, Column, Study

FEW = ("1", "2", "4")
"""Numbers of steps that are scored while EMF is trained."""
STEPS = {"base": FM_STEPS, "emf": EMF_STEPS, "ablation": EMF_STEPS}
CURVE = {"steps": list[int], "error": list[float], "at": list[int], "score": dict[str, list[float]]}


def study(budget: Budget) -> Study:
    columns = {
        "scores": Column(SCORES, odd_scores),
        "encoder": Column(ENCODER, lambda tree: None if fits(tree, dict[str, float]) else "is no object of numbers"),
        "curve": Column("curve.jsonl", odd_curve, curve, lambda file: file.is_file() and bool(read_curve(file.parent))),
    }
    return Study("paper", budget, parts(budget), columns, STEPS)


def odd_scores(rows: Any) -> str | None:
    """What is wrong with a part's scores by number of steps."""
    if not fits(rows, dict[str, dict[str, Any]]):
        return "is no object of scores by number of steps"
    for steps, row in rows.items():
        if not steps.isdecimal():
            return f"has scores of {steps!r} steps"
        tags = row.get("by_tag", {})
        if not (fits(row.get("overall"), float) and fits(tags, dict[str, float]) and tags.keys() >= {*TAGS}):
            return f"has no score of every task at {steps} steps"
        if odd := [x for x in (row["overall"], *tags.values()) if not 0 <= x <= 1]:
            return f"has a score of {odd[0]}; expected 0 to 1"
    return None


def odd_curve(curve: Any) -> str | None:
    """What is wrong with what was scored on the way."""
    if said := misfit(curve, CURVE) or misfit(curve["score"], dict.fromkeys(FEW, list[float])):
        return said
    scored = [len(curve["score"][n]) for n in FEW]
    if not curve["at"] or {*scored} != {len(curve["at"])} or len(curve["steps"]) != len(curve["error"]):
        return "has lists of other lengths"
    return None


def curve(file: Path) -> dict[str, Any]:
    """What was scored on the way of the run whose curve.jsonl this is."""
    every, metrics = read_curve(file.parent), read_metrics(file.parent)
    return {
        "steps": [m["step"] for m in metrics],
        "error": [m["error"] for m in metrics],
        "at": [c["step"] for c in every],
        "score": {n: [c["overall"][n] for c in every] for n in FEW if all(n in c["overall"] for c in every)},
    }
