"""results.json of the paper in miniature: a row a run, which a later call goes on with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from emf.data.digits import TAGS
from emf.files import fits, misfit, read_json
from emf.paper.parts import Budget

RESULTS = "results.json"
FEW = ("1", "2", "4")
"""Numbers of steps that are scored while EMF is trained."""
ROW = {"scores": dict[str, dict[str, Any]], "encoder": dict[str, float] | None, "curve": dict[str, Any] | None}
CURVE = {"steps": list[int], "error": list[float], "at": list[int], "score": dict[str, list[float]]}


def sizes(budget: Budget) -> dict[str, Any]:
    """A budget without its seeds, of which a folder takes more."""
    return {key: value for key, value in asdict(budget).items() if key != "seeds"}


def recorded(out: Path, budget: Budget) -> dict[str, Any]:
    """What results.json in this folder holds of parts, a row each by their names; nothing where there is none, and of
    one by an earlier version, whose figures are not by part. Raises ValueError where it is of another budget or form.
    """
    file = out / RESULTS
    if not file.is_file():
        return {}
    tree = read_json(file)
    if isinstance(tree, dict) and "scores" in tree:
        return {}
    if said := misfit(tree, {"budget": dict[str, Any], "parts": dict[str, dict[str, Any]]}):
        raise ValueError(f"paper: {file} {said}; move it away")
    old = {key: value for key, value in tree["budget"].items() if key != "seeds"}
    if old != sizes(budget):
        raise ValueError(f"paper: {file} is of another budget than this folder; move it away, or choose another --out")
    rows = {
        name: {key: value for key, value in row.items() if value is not None} for name, row in tree["parts"].items()
    }
    for name, row in rows.items():
        if said := _fault(row):
            raise ValueError(f"paper: {file}, {name}: {said}; repair or remove that part's row")
    return rows


def _fault(row: dict[str, Any]) -> str | None:
    """What is wrong with a part's row."""
    if said := misfit(row, ROW) or odd_scores(row["scores"]):
        return f"it {said}"
    if (curve := row.get("curve")) is None:
        return None
    if said := misfit(curve, CURVE) or misfit(curve["score"], dict.fromkeys(FEW, list[float])):
        return f"its curve {said}"
    scored = [len(curve["score"][n]) for n in FEW]
    if not curve["at"] or {*scored} != {len(curve["at"])} or len(curve["steps"]) != len(curve["error"]):
        return "its curve has lists of other lengths"
    return None


def odd_scores(rows: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with a part's scores by number of steps, in words to follow its name."""
    for steps, row in rows.items():
        if not steps.isdecimal():
            return f"has scores of {steps!r} steps"
        tags = row.get("by_tag", {})
        if not (fits(row.get("overall"), float) and fits(tags, dict[str, float]) and tags.keys() >= {*TAGS}):
            return f"has no score of every task at {steps} steps"
        if odd := [x for x in (row["overall"], *tags.values()) if not 0 <= x <= 1]:
            return f"has a score of {odd[0]}; expected 0 to 1"
    return None
