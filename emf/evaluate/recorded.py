"""Scores that runs of the digits' recipes had, by seed and machine: what stands beside a run's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emf.data.scores_file import CAPTIONS
from emf.evaluate.published import FEW_STEP, FLOW_MATCHING, by_steps
from emf.files import read_json
from emf.show.table import markdown

RECORD = Path(__file__).parents[1] / "assets" / "digits-scores.json"
"""{recipe: [{seed, machine, guidance, captions, fm: {steps: overall}, emf: {steps: overall}}, one for each run]}."""
COUNTS = (1, 2, 4, 8, 30)
SEEDS = 3
"""As many a table asks of a recipe: one run says little."""


@dataclass(frozen=True)
class Spread:
    """Scores of several runs."""

    mean: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(sum(values) / len(values), min(values), max(values), len(values))

    def __format__(self, spec: str) -> str:
        """Mean and range; the range is left out where all are one."""
        mean, low, high = (f"{x:{spec}}" for x in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low}–{high})"


def standard_error(row: Mapping[str, Any], captions: int) -> float:
    """By how much an overall score would differ with other noise, and other captions where a task has more: the
    standard error of a mean over tags, a tag's score being a share of captions / tags draws. nan of one draw a tag. How
    training varies is not in it."""
    shares = list(row["by_tag"].values())
    each = captions / len(shares)
    return (sum(p * (1 - p) for p in shares) / (each - 1)) ** 0.5 / len(shares) if each > 1 else math.nan


def share_of_gap(score: float, first: float, last: float) -> float:
    """How much of the gap between flow matching's scores in one step and in 30 a score closes; nan where there is
    none."""
    return (score - first) / (last - first) if last != first else math.nan


def entry(scores: Mapping[str, Any], seed: int, machine: str) -> dict[str, Any]:
    """What is recorded of a run's scores.json."""
    told: dict[str, Any] = {"seed": seed, "machine": machine}
    told |= {"guidance": scores.get("guidance"), "captions": scores.get("captions", CAPTIONS)}
    for model in ("fm", "emf"):
        told[model] = {str(r["steps"]): round(r["overall"], 4) for r in scores["rows"] if r["model"] == model}
    return told


def recorded(recipe: str, scores: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The runs of a recipe that were recorded; with `scores`, a scores.json, those that are scored as it is."""
    runs = list(read_json(RECORD).get(recipe, []))
    asked = None if scores is None else (scores["guidance"], scores["captions"])
    return [run for run in runs if asked in (None, (run["guidance"], run["captions"]))]


def spreads(runs: Sequence[Mapping[str, Any]], model: str) -> dict[int, Spread]:
    """By number of steps, of the runs that have it: overall scores of a model ("fm", "emf"), or "gap": the share of the
    gap from one-step to 30-step flow matching of the same run that EMF closes."""
    found: dict[int, list[float]] = {}
    for run in runs:
        first, last = run["fm"]["1"], run["fm"]["30"]
        for steps, score in run["emf" if model == "gap" else model].items():
            found.setdefault(int(steps), []).append(share_of_gap(score, first, last) if model == "gap" else score)
    return {steps: Spread.of(values) for steps, values in sorted(found.items())}


def about(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many runs, seeds and machines a spread is of."""
    counts = len(runs), len({run["seed"] for run in runs}), len({run["machine"] for run in runs})
    return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in zip(counts, ("run", "seed", "machine"), strict=True))


def table(record: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The record as the lines of Markdown tables, one for each number of captions that runs were scored on: mean and
    range of every score, and of the gap's shares beside the paper's, of the recipes with SEEDS seeds or more; after
    each a line that says of which runs."""
    lines: list[str] = []
    for captions in sorted({run["captions"] for runs in record.values() for run in runs}):
        some = {recipe: [run for run in runs if run["captions"] == captions] for recipe, runs in record.items()}
        lines += ["", *_one_table(captions, {recipe: runs for recipe, runs in some.items() if runs})]
    return lines[1:]


def _one_table(captions: int, record: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    def line(name: str, runs: Sequence[Mapping[str, Any]], model: str, form: str) -> list[str]:
        cells = {}
        for n, spread in spreads(runs, model).items():
            cells[n] = f"{spread:{form}}" + (f" of {spread.runs}" if spread.runs != len(runs) else "")
        return [name, f"{len(runs)} run{'s' * (len(runs) > 1)}", *(cells.get(n, "") for n in COUNTS)]

    every = [run for runs in record.values() for run in runs]
    few = [recipe for recipe, runs in record.items() if len({run["seed"] for run in runs}) < SEEDS]
    record = {recipe: runs for recipe, runs in record.items() if recipe not in few}
    name, _, *scores = line("flow matching (the base)", every, "fm", ".3f")
    rows = [[name, "1 network", *(text.partition(" of ")[0] for text in scores)]]  # the shipped one, in every run
    rows += [line(recipe, runs, "emf", ".3f") for recipe, runs in record.items()]
    rows += [line(f"gap closed, {recipe}", runs, "gap", ".0%") for recipe, runs in record.items()]
    paper, fm = by_steps("GenEval", FEW_STEP), by_steps("GenEval", FLOW_MATCHING)
    share = {n: f"{share_of_gap(score, fm[1], fm[30]):.0%}" for n, score in paper.items()}
    rows.append(["gap closed, the paper's 3B", "", *(share.get(n, "") for n in COUNTS)])
    told = "; ".join(f"`{recipe}`: {about(runs)}" for recipe, runs in record.items())
    last = [f"Of {told}."] * bool(told)
    last += ["Too few seeds to be shown: " + ", ".join(f"`{recipe}`" for recipe in few) + "."] * bool(few)
    heads = (f"{captions:,} captions, mean (range)", "of", *(f"{n}" for n in COUNTS))
    return [*markdown(heads, rows), "", *last]
