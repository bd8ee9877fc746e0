"""What the runs of the paper in miniature have found, and whether it agrees with the paper's claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.stats import nct
from scipy.stats import t as student

from emf.analyze.bootstrap import LEVEL, interval
from emf.paper.parts import ENCODERS
from emf.paper.record import Rows

SEEDS = 3
"""Fewer tell nothing apart: two often agree to the last digit by chance, and Student's interval of them is a point."""
ALIKE = 6
"""So many seeds of one sign come by chance in 3 of 100 cases; fewer that are all the same tell nothing apart."""
POWER = 0.8
"""How often the seeds that would tell do so."""
MEASURES = ("discriminability", "discriminability, centred", "disentanglement", "disentanglement, centred")
BySeed = dict[int, float]


def mean(values: Iterable[float]) -> float:
    """Their mean; nan of none."""
    x = list(values)
    return float(np.mean(x)) if x else float("nan")


class Found(Rows):
    """The figures of the paper in miniature."""

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


def seeds_to_tell(gaps: list[float], most: int = 1000) -> int | None:
    """How many seeds it would take until their interval leaves 0 out in POWER of all cases, on the side of these, were
    mean and spread of all seeds those of these; None where they are more than `most`, or where one seed says nothing of
    a spread."""
    spread = np.std(gaps, ddof=1) if len(gaps) > 1 else 0.0
    if spread < 1e-9:
        return None
    n = np.arange(SEEDS, most + 1)
    told = nct.sf(student.ppf((1 + LEVEL) / 2, n - 1), n - 1, abs(mean(gaps)) / spread * np.sqrt(n))
    enough = n[told >= POWER]
    return int(enough[0]) if len(enough) else None


def verdicts(found: Found) -> list[tuple[str, str, str]]:
    """(the paper's claim, agrees | does not | not told apart | not run, the figures here)."""

    def judged(claim: str, gaps: list[float], told: str) -> tuple[str, str, str]:
        """gaps: above 0 where the claim holds, by seed."""
        if not gaps:
            return claim, "not run", ""
        over = interval(gaps)
        if len(gaps) == 1:
            return claim, "not told apart", f"{told}: {gaps[0]:+.3f}, one seed"
        if np.ptp(gaps) < 1e-9 and len(gaps) < ALIKE:  # figures are of few values, and seeds often agree by chance
            return claim, "not told apart", f"{told}: {over.mean:+.3f} in each of {len(gaps)} seeds"
        whole = "agrees" if over.low > 0 else "does not" if over.high < 0 else "not told apart"
        whole = whole if len(gaps) >= SEEDS else "not told apart"
        told += f": {over:+.3f}"
        if whole == "not told apart":
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
