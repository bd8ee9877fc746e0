"""What the runs on a world of named pictures have found: scores by seed, and whether their order is that of the text
encoders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from emf.analyze.bootstrap import LEVEL, Interval, interval
from emf.paper.found import MEASURES, SEEDS, BySeed
from emf.paper.record import Rows

SCORED = (("base", 30), ("emf", 1), ("emf", 2), ("emf", 4))
"""The scores that are ranked: flow matching at 30 steps, EMF at 1, 2 and 4."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation, over the text encoders, of a measure with a score: the mean of that of every
    seed. A seed in which all score alike has none, and is left out."""

    seeds: Interval
    """Student's over seeds, within -1 and 1; of one seed it is all of that."""
    pictures: Interval
    """The bootstrap's over pictures with all their captions, the seeds as they are."""
    chance: float
    """The share of all orders of the encoders, the same in every seed, that is at least as far from 0, to either
    side."""
    n: int
    """Seeds with a correlation."""
    of: int
    """Seeds in which every encoder is done."""

    @property
    def verdict(self) -> str:
        """agrees | does not | not told apart | not run. So few encoders fall into any order by chance, so that is asked
        beside the intervals."""
        if not self.of:
            return "not run"
        if self.n < SEEDS or self.chance > 1 - LEVEL:
            return "not told apart"
        if self.seeds.low > 0 and self.pictures.low > 0:
            return "agrees"
        if self.seeds.high < 0 and self.pictures.high < 0:
            return "does not"
        return "not told apart"

    def __str__(self) -> str:
        if not self.n:
            return "all score alike" if self.of else ""
        over = f"{self.seeds:+.2f}" if self.n > 1 else f"{self.seeds.mean:+.2f}"
        if self.n < self.of:
            over += f", {self.n} of {self.of} seeds"
        elif self.n == 1:
            over += ", one seed"
        return f"{over}\npictures {self.pictures.low:+.2f} to {self.pictures.high:+.2f}\nby chance {self.chance:.2f}"


class Found(Rows):
    """The figures of the text encoders on named pictures."""

    def __init__(self, tree: dict[str, Any], encoders: Iterable[str]) -> None:
        """encoders: those of the study; results.json may have rows of others."""
        super().__init__(tree)
        self.kinds = np.array([c["kind"] for c in tree["captions"]])
        self.asked = np.array([c["picture"] for c in tree["captions"]])
        """[captions] the picture of each, of those that are scored."""
        self.named: list[str] = [name for name in encoders if self.of(f"base/{name}", "encoder")]
        """The text encoders with a base that is done."""
        self.done: dict[str, set[int]] = {}
        """The seeds of each text encoder of which everything is done in one seed at least."""
        for name in self.named:
            seeds = [{s for s, ranks in self.of(f"{g}/{name}", "scores").items() if str(n) in ranks} for g, n in SCORED]
            if whole := set.intersection({*self.of(f"base/{name}", "encoder")}, *seeds):
                self.done[name] = whole

    @property
    def encoders(self) -> list[str]:
        return list(self.done)

    def hits(self, group: str, encoder: str, steps: int, top: int = 1) -> dict[int, np.ndarray]:
        """{seed: [captions] bool}: whether the image is nearest to the picture asked for, or among the `top`."""
        rows = self.of(f"{group}/{encoder}", "scores")
        return {seed: np.array(ranks[str(steps)]) < top for seed, ranks in rows.items() if str(steps) in ranks}

    def score(self, group: str, encoder: str, steps: int, top: int = 1, kind: str | None = None) -> BySeed:
        """The mean over captions, of one kind or all."""
        asked = self.kinds == kind if kind else np.full(len(self.kinds), True)
        hits = self.hits(group, encoder, steps, top) if asked.any() else {}
        return {seed: float(own[asked].mean()) for seed, own in hits.items()}

    def measured(self, encoder: str, name: str) -> dict[int, np.ndarray]:
        """{seed: [captions] float64}: a measure of a text encoder by caption."""
        rows = self.of(f"base/{encoder}", "encoder")
        return {seed: np.array(row[name]) for seed, row in rows.items()}

    def over_asked(self, by_seed: dict[int, np.ndarray]) -> Interval:
        """See over_pictures, of values of the captions that are scored."""
        return over_pictures(by_seed, self.asked)

    def over_named(self, name: str, by_seed: dict[int, np.ndarray]) -> Interval:
        """See over_pictures, of a measure's values."""
        return over_pictures(by_seed, np.array(self.tree["measured"][name]))

    def agreement(self, measure: str, group: str, steps: int) -> Agreement:
        """Of a measure with a score, in the seeds in which every encoder is done and not all score alike. For the
        interval over pictures these are drawn anew, the same for the measure and the score and every encoder and
        seed."""
        seeds = sorted(set.intersection(*self.done.values())) if self.done else []
        nothing = interval([])
        if not seeds:
            return Agreement(nothing, nothing, float("nan"), 0, 0)
        own, scores = (
            np.array([[by_seed[s] for by_seed in every] for s in seeds], float)  # [seeds, encoders, captions]
            for every in (
                [self.measured(e, measure) for e in self.encoders],
                [self.hits(group, e, steps) for e in self.encoders],
            )
        )
        correlated = spearman(own.mean(-1), scores.mean(-1))
        told = ~np.isnan(correlated)
        if not told.any():
            return Agreement(nothing, nothing, float("nan"), 0, len(seeds))
        own, scores = own[told], scores[told]
        of = np.array(self.tree["measured"][measure]), self.asked
        times = drawn(1 + max(int(some.max()) for some in of))
        means = [mean_of_drawn(values, times[:, some]) for values, some in zip((own, scores), of, strict=True)]
        over = interval(correlated[told].tolist())
        seen = Interval(over.mean, max(over.low, -1.0), min(over.high, 1.0))
        low, high = edges(spearman(*means).mean(-1))  # nan where a draw is all ties
        chance = by_chance(own.mean(-1), scores.mean(-1))
        return Agreement(seen, Interval(over.mean, low, high), chance, len(own), len(seeds))


def over_pictures(by_seed: dict[int, np.ndarray], of: np.ndarray) -> Interval:
    """The mean over seeds and captions, with the bootstrap's interval over pictures, the seeds as they are; nan of no
    seed. of [captions]: the picture of each. A picture's captions are drawn together: what one of them is taken for,
    the others often are too."""
    if not by_seed:
        return interval([])
    values = np.mean([*by_seed.values()], 0)
    return Interval(float(values.mean()), *edges(mean_of_drawn(values, drawn(1 + int(of.max()))[:, of])))


def drawn(n: int) -> np.ndarray:
    """[RESAMPLES, n]: how often each of n is there when n are drawn with replacement (Efron 1979); always the same."""
    which = np.random.default_rng(0).integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(which.ravel(), minlength=n * RESAMPLES).reshape(RESAMPLES, n).astype(float)


def mean_of_drawn(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """[RESAMPLES, ...]: the means of values [..., captions] that are drawn `times` [RESAMPLES, captions]; nan where
    none is."""
    n = values.shape[-1]
    with np.errstate(invalid="ignore"):
        means = times @ values.reshape(-1, n).T / times.sum(1, keepdims=True)
    return means.reshape(RESAMPLES, *values.shape[:-1])


def edges(values: np.ndarray) -> tuple[float, float]:
    """Of the middle LEVEL of values [n] that are not nan; nan where all are."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation over the last axis of [..., n], ties at their mean rank: [...]; nan where one side is
    all ties."""
    x, y = (rankdata(values, axis=-1) - (np.shape(values)[-1] + 1) / 2 for values in (a, b))
    size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / size


def by_chance(a: np.ndarray, b: np.ndarray) -> float:
    """Of all orders of the n encoders of [seeds, n], the same in every seed, the share whose mean rank correlation is
    at least as far from 0, to either side, as that of a with b: the exact permutation test. nan where that is nan."""
    orders = np.array(list(permutations(range(a.shape[-1]))))
    every = spearman(a[:, orders], b[:, None]).mean(0)  # [orders], the first is theirs
    return float("nan") if np.isnan(every[0]) else float((abs(every) >= abs(every[0]) - 1e-9).mean())


def verdicts(found: Found) -> list[tuple[str, str, str]]:
    """(what is asked, agrees | does not | not told apart | not run, the figures): by each measure and score, whether a
    better encoder gets a better score, as in the paper."""
    every = []
    for measure in MEASURES:
        for group, steps in SCORED:
            agreed = found.agreement(measure, group, steps)
            every.append((f"{measure}: {label(group, steps)}", agreed.verdict, str(agreed)))
    return every


def label(group: str, steps: int) -> str:
    return f"{'EMF' if group == 'emf' else 'FM'}\N{NO-BREAK SPACE}{steps}"
