"""What the runs of the paper in miniature have found, and whether it agrees with the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from emf.data.digits import TAGS
from emf.evaluate.run_log import read_curve, read_metrics
from emf.files import fits, read_json, write_json
from emf.paper.parts import ENCODERS, Budget, parts
from emf.paper.runs import ENCODER, SCORES

MEASURES = ("discriminability", "discriminability, centred", "disentanglement", "disentanglement, centred")
AGAIN = "move its folder away, and the part is made again"
Series = dict[str, list[Any]]


def gather(out: Path, budget: Budget) -> dict[str, Any]:
    """What the parts that are done have found, written to results.json too: every figure as a list over seeds. Its key
    `missing` names the parts that are not done."""
    scores: dict[str, Any] = {}
    encoders: dict[str, Series] = {}
    curves: dict[str, Any] = {}
    missing = []
    for part in parts(budget):
        folder, group = out / part.name, part.name.rpartition("/")[0]
        if not (folder / SCORES).is_file():
            missing.append(part.name)
            continue
        for steps, row in _scores(folder / SCORES).items():
            kept = scores.setdefault(group, {}).setdefault(steps, {"overall": [], "by_tag": {t: [] for t in TAGS}})
            kept["overall"].append(row["overall"])
            for tag in TAGS:
                kept["by_tag"][tag].append(row["by_tag"][tag])
        if (folder / ENCODER).is_file():
            for name, value in _read(folder / ENCODER, dict[str, float]).items():
                encoders.setdefault(group.removeprefix("base/"), {}).setdefault(name, []).append(value)
        if (folder / "curve.jsonl").is_file():
            metrics, curve = read_metrics(folder), read_curve(folder)
            if curve and (lacks := {"1", "2", "4"} - curve[0]["overall"].keys()):
                raise ValueError(f"paper: {folder / 'curve.jsonl'} has no scores of {min(lacks)} steps; {AGAIN}")
            own = curves.setdefault(group, {"steps": [], "error": [], "at": [], "score": {"1": [], "2": [], "4": []}})
            own["steps"], own["at"] = [m["step"] for m in metrics], [c["step"] for c in curve]
            own["error"].append([m["error"] for m in metrics])
            for n, lines in own["score"].items():
                lines.append([c["overall"][n] for c in curve])
    found = {"budget": asdict(budget), "scores": scores, "encoders": encoders, "curves": curves, "missing": missing}
    write_json(out / "results.json", found)
    return found


def _read(file: Path, kind: Any) -> Any:
    """What a JSON file holds. Raises ValueError where that is not of this kind."""
    tree = read_json(file)
    if not fits(tree, kind):
        raise ValueError(f"paper: {file} is not what a part writes; {AGAIN}")
    return tree


def _scores(file: Path) -> dict[str, Any]:
    """A part's scores by number of steps. Raises ValueError where they are of another form."""
    tree: dict[str, Any] = _read(file, dict[str, dict[str, Any]])
    for row in tree.values():
        tags = row.get("by_tag")
        if not (fits(row.get("overall"), float) and fits(tags, dict[str, float]) and tags.keys() >= {*TAGS}):
            raise ValueError(f"paper: {file} is not what a part writes; {AGAIN}")
    return tree


def mean(values: Sequence[float]) -> float:
    """Their mean; nan of none."""
    return float(np.mean(values)) if len(values) else float("nan")


class Found:
    """The contents of results.json, which are asked for by name."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree

    def score(self, group: str, steps: int, tag: str | None = None) -> list[float]:
        """The overall scores at a number of steps by seed, or those of one task; an empty list of a part that is
        missing."""
        row = self.tree["scores"].get(group, {}).get(str(steps))
        if row is None:
            return []
        values: list[float] = row["overall"] if tag is None else row["by_tag"][tag]
        return values

    def encoder(self, name: str, measure: str) -> list[float]:
        values: list[float] = self.tree["encoders"].get(name, {}).get(measure, [])
        return values

    def kept(self, encoder: str, steps: int) -> list[float]:
        """EMF's score in so many steps as a share of the same base's in 30, by seed."""
        pairs = zip(self.score(f"emf/{encoder}", steps), self.score(f"base/{encoder}", 30), strict=False)
        return [few / many for few, many in pairs if many]


def verdicts(found: Found) -> list[tuple[str, str, str]]:
    """(the paper's claim, agrees | does not | not told apart | not run, the figures here)."""

    def judged(claim: str, gaps: Sequence[float], told: str) -> tuple[str, str, str]:
        """gaps: above 0 where the claim holds, by seed."""
        if not len(gaps):
            return claim, "not run", ""
        whole = "agrees" if min(gaps) > 0 else "does not" if max(gaps) < 0 else "not told apart"
        return claim, whole, f"{told}: {mean(gaps):+.3f}, by seed {', '.join(f'{g:+.3f}' for g in gaps)}"

    def gap(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=False)]

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
    if curve := found.tree["curves"].get(few):
        reached = {n: [_reached(curve["at"], line) for line in curve["score"][n]] for n in ("1", "4")}
        gaps = [float(a - b) for a, b in zip(reached["1"], reached["4"], strict=True)]
        every.append(judged("four steps are near their best before one step is", gaps, "training steps later"))
    return every


def _reached(at: Sequence[int], scores: Sequence[float]) -> int:
    """The first training step with 95 % of the best score."""
    return next(step for step, x in zip(at, scores, strict=True) if x >= 0.95 * max(scores))
