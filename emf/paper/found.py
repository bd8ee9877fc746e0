"""What the runs of the paper in miniature have found, and whether it agrees with the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from emf.analyze.bootstrap import LEVEL, Interval
from emf.evaluate.run_log import read_curve, read_metrics
from emf.files import fits, read_json, write_json
from emf.paper.parts import ENCODERS, Budget, parts
from emf.paper.record import FEW, RESULTS, odd_scores, recorded
from emf.paper.runs import ENCODER, SCORES

MEASURES = ("discriminability", "discriminability, centred", "disentanglement", "disentanglement, centred")
AGAIN = "move its folder and results.json away, and the part is made again"
BySeed = dict[int, float]


def gather(out: Path, budget: Budget) -> dict[str, Any]:
    """What the parts that are done have found, written to results.json too: a row a part, by its name, of this folder
    or of the results.json that was there. Its key `missing` names the parts that are not done."""
    rows, names = recorded(out, budget), [part.name for part in parts(budget)]
    rows |= {name: _row(out / name) for name in names if (out / name / SCORES).is_file()}
    found = {"budget": asdict(budget), "missing": [name for name in names if name not in rows], "parts": rows}
    write_json(out / RESULTS, found)
    return found


def _row(folder: Path) -> dict[str, Any]:
    """What a part has found: its scores, of a base what its text encoder is, and what was scored on the way."""
    row: dict[str, Any] = {"scores": _read(folder / SCORES, dict[str, dict[str, Any]])}
    if said := odd_scores(row["scores"]):
        raise ValueError(f"paper: {folder / SCORES} {said}; {AGAIN}")
    if (folder / ENCODER).is_file():
        row["encoder"] = _read(folder / ENCODER, dict[str, float])
    if (folder / "curve.jsonl").is_file() and (curve := read_curve(folder)):
        metrics = read_metrics(folder)
        if lacks := {*FEW} - curve[0]["overall"].keys():
            raise ValueError(f"paper: {folder / 'curve.jsonl'} has no scores of {min(lacks)} steps; {AGAIN}")
        row["curve"] = {
            "steps": [m["step"] for m in metrics],
            "error": [m["error"] for m in metrics],
            "at": [c["step"] for c in curve],
            "score": {n: [c["overall"][n] for c in curve] for n in FEW},
        }
    return row


def _read(file: Path, kind: Any) -> Any:
    """What a JSON file holds. Raises ValueError where that is not of this kind."""
    tree = read_json(file)
    if not fits(tree, kind):
        raise ValueError(f"paper: {file} is not what a part writes; {AGAIN}")
    return tree


def mean(values: Iterable[float]) -> float:
    """Their mean; nan of none."""
    x = list(values)
    return float(np.mean(x)) if x else float("nan")


class Found:
    """The contents of results.json, of the seeds of its budget: figures are asked for by name, and come by seed. What
    is missing has no seeds."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree

    def of(self, group: str, key: str) -> dict[int, Any]:
        """What the runs of a group, as in emf/trained, have under a key of theirs."""
        rows = {seed: self.tree["parts"].get(f"{group}/{seed}", {}) for seed in self.tree["budget"]["seeds"]}
        return {seed: row[key] for seed, row in rows.items() if key in row}

    def score(self, group: str, steps: int, tag: str | None = None) -> BySeed:
        """The overall score at a number of steps, or that of one task."""
        rows = {seed: scores.get(str(steps)) for seed, scores in self.of(group, "scores").items()}
        return {s: row["overall"] if tag is None else row["by_tag"][tag] for s, row in rows.items() if row}

    def encoder(self, name: str, measure: str) -> BySeed:
        return {seed: row[measure] for seed, row in self.of(f"base/{name}", "encoder").items() if measure in row}

    def kept(self, encoder: str, steps: int) -> BySeed:
        """EMF's score in so many steps as a share of the same base's in 30."""
        many = self.score(f"base/{encoder}", 30)
        return {s: few / many[s] for s, few in self.score(f"emf/{encoder}", steps).items() if many.get(s)}


def gap(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    """The differences of two figures, within every seed that both have."""
    return [x - b[seed] for seed, x in a.items() if seed in b]


def interval(gaps: list[float]) -> Interval:
    """The mean of differences by seed, with Student's interval over seeds; of one seed it is without end, of none
    nan."""
    n = len(gaps)
    if not n:
        return Interval(*3 * [float("nan")])
    half = student.ppf((1 + LEVEL) / 2, n - 1) * np.std(gaps, ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean(gaps), mean(gaps) - half, mean(gaps) + half)


def seeds_to_tell(gaps: list[float], most: int = 1000) -> int | None:
    """How many seeds it would take until the interval leaves 0 out, were their mean and spread those of these; None
    where they are more than `most`, or where one seed says nothing of a spread."""
    if len(gaps) < 2:
        return None
    n = np.arange(2, most + 1)
    half = student.ppf((1 + LEVEL) / 2, n - 1) * np.std(gaps, ddof=1) / np.sqrt(n)
    enough = n[half < abs(mean(gaps))]
    return int(enough[0]) if len(enough) else None


def verdicts(found: Found) -> list[tuple[str, str, str]]:
    """(the paper's claim, agrees | does not | not told apart | not run, the figures here)."""

    def judged(claim: str, gaps: list[float], told: str) -> tuple[str, str, str]:
        """gaps: above 0 where the claim holds, by seed."""
        if not gaps:
            return claim, "not run", ""
        told_apart = interval(gaps)
        whole = "agrees" if told_apart.low > 0 else "does not" if told_apart.high < 0 else "not told apart"
        told += f": {told_apart:+.3f}" if len(gaps) > 1 else f": {gaps[0]:+.3f}, one seed"
        if whole == "not told apart" and len(gaps) > 1:
            told += f"; {seeds_to_tell(gaps) or 'more than 1,000'} seeds would tell"
        return claim, whole, told

    s, few = found.score, "emf/trained"
    every = [
        judged("EMF in one step beats flow matching in one", gap(s(few, 1), s("base/trained", 1)), "EMF 1 - FM 1"),
        judged("EMF gains from one step to two", gap(s(few, 2), s(few, 1)), "EMF 2 - EMF 1"),
        judged("... and from two to four", gap(s(few, 4), s(few, 2)), "EMF 4 - EMF 2"),
        judged("EMF in four steps beats flow matching in four", gap(s(few, 4), s("base/trained", 4)), "EMF 4 - FM 4"),
        judged(
            "EMF in four steps is within 0.02 of flow matching in 30",
            [g + 0.02 for g in gap(s(few, 4), s("base/trained", 30))],
            "EMF 4 - FM 30 + 0.02",
        ),
    ]
    for e in list(ENCODERS)[1:]:
        better = gap(found.encoder("trained", MEASURES[0]), found.encoder(e, MEASURES[0]))
        every.append(judged(f"encoder {e}: less discriminative than trained", better, "difference"))
        lost = gap(found.kept("trained", 1), found.kept(e, 1))
        every.append(
            judged(f"encoder {e}: one step loses more than 30", lost, "share of FM 30 kept by EMF 1, trained - it")
        )
    curves = found.of(few, "curve")
    later = [float(_reached(c["at"], c["score"]["1"]) - _reached(c["at"], c["score"]["4"])) for c in curves.values()]
    every.append(judged("four steps are near their best before one step is", later, "training steps later"))
    return every


def _reached(at: list[int], scores: list[float]) -> int:
    """The first training step with 95 % of the best score."""
    return next(step for step, x in zip(at, scores, strict=True) if x >= 0.95 * max(scores) or x == max(scores))
