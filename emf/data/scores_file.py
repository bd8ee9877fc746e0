"""scores.json in a run's folder, as `emf evaluate digits` writes it: its form, and that no lesser one replaces it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from emf.data.digits import TAGS
from emf.files import misfit, read_json
from emf.limits import Within

SCORES = "scores.json"
EULER, FEW = (1, 4, 30), (1, 2, 4, 8)
"""Numbers of steps that are scored, of flow matching and of EMF."""
CAPTIONS = 300
"""Of how many `emf evaluate digits` scores by default. Files of earlier versions do not say of how many they are."""
CHECKS = ("ceiling", "noise", "shuffled")
"""What the scorer gives to images that need no model, see emf.evaluate.digits_scorer.calibrate."""
AWAY = "move it and samples.png away first"
Share = Annotated[float, Within(0, 1)]
Natural = Annotated[int, Within(0)]
HOW = {"captions": Annotated[int, Within(1)] | None, "guidance": float | None, "seed": Natural | None}
"""By what scores are comparable, with the kinds of the values; earlier versions wrote less of it."""
WHOLE = {"rows": list[dict[str, Any]], **dict.fromkeys(CHECKS, Share), "step": Natural | None, **HOW}
ROW = {"model": Literal["fm", "emf"], "steps": Annotated[int, Within(1)], "overall": Share, "by_tag": dict[str, Any]}


def read_scores(file: Path, who: str) -> dict[str, Any] | None:
    """What scores.json holds; None where there is none. who: how the error begins. Raises ValueError, saying what is
    wrong with it and what to do."""
    if file.is_dir():
        raise ValueError(f"{who}: {file} is a folder; move it away and call that again")
    if not file.is_file():
        return None
    try:
        scores = read_json(file)
        said = _fault(scores)
    except ValueError as error:
        said = str(error)
    if said:
        advice = "move it away and call that again"
        raise ValueError(f"{who}: {file} is not what `emf evaluate digits` writes: {said}; {advice}")
    return {key: value for key, value in scores.items() if value is not None}


def _fault(scores: Any) -> str | None:
    """What is wrong with the contents of a scores.json."""
    if said := misfit(scores, WHOLE):
        return f"it {said}"
    first = dict[tuple[str, int], int]()
    for number, row in enumerate(scores["rows"], 1):
        if said := misfit(row, ROW):
            return f"row {number} of its rows {said}"
        if said := misfit(row["by_tag"], dict.fromkeys(TAGS, Share)):
            return f"by_tag of row {number} of its rows {said}"
        same = first.setdefault((row["model"], row["steps"]), number)
        if same != number:
            return f"row {number} of its rows has model {row['model']} and steps {row['steps']}, as row {same} has"
    there = {steps for model, steps in first if model == "fm"}
    if missing := [n for n in EULER if n not in there]:
        return f"its rows lack flow matching in {missing[0]} step{'s' * (missing[0] > 1)}"
    return None


def refuse_lesser(run: Path, how: Mapping[str, Any], rows: Iterable[tuple[str, int]]) -> None:
    """Raises ValueError where the run has scores of more captions than `how` says, that were made in another way, or in
    a row that new ones lack, which they would replace. how: captions, guidance and seed of the new ones. rows: model
    and steps of each of theirs. Asked before anything is drawn."""
    if (old := read_scores(run / SCORES, "evaluate")) is None:
        return
    known = {"captions": CAPTIONS, **{key: old[key] for key in HOW if old.get(key) is not None}}
    other = [key for key in known if key != "captions" and known[key] != how[key]]
    if other or known["captions"] > how["captions"]:
        raise ValueError(
            f"evaluate: {run / SCORES} is of {_told(known, [*known])}; scores of {_told(how, [*known])} would replace "
            f"it: score as many captions in the same way, or {AWAY}"
        )
    if lost := {(row["model"], row["steps"]) for row in old["rows"]} - {*rows}:
        model, steps = min(lost)
        raise ValueError(
            f"evaluate: {run / SCORES} has a row of {model} in {steps} step{'s' * (steps > 1)}, which is not scored "
            f"here; {AWAY}"
        )


def _told(how: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The captions, and the other settings of these keys, in words."""
    rest = [f"{key} {how[key]}" for key in keys if key != "captions"]
    return ", ".join([f"{how['captions']} captions", *rest])
