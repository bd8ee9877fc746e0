"""What the runs on a world of named pictures have found: scores with intervals, and whether their order is that of the
text encoders."""

from __future__ import annotations

from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from emf.analyze.bootstrap import LEVEL, Interval, bootstrap
from emf.data.gallery import Gallery
from emf.files import read_json, write_json
from emf.paper.found import MEASURES
from emf.paper.openmoji_parts import Budget, TextEncoder, parts
from emf.paper.openmoji_runs import ceiling, held_out
from emf.paper.runs import ENCODER, SCORES

RESULTS = "results.json"
SCORED = (("base", 30), ("emf", 1), ("emf", 2), ("emf", 4))
"""The scores that are ranked: flow matching at 30 steps, EMF at 1, 2 and 4."""
RESAMPLES = 2000


def gather(
    out: Path, gallery: Gallery, budget: Budget, encoders: dict[str, TextEncoder] | None = None
) -> dict[str, Any]:
    """What the parts that are done have found, written to results.json: ranks by seed and caption, measures by caption.
    Its key `missing` names the parts that are not done."""
    found: dict[str, Any] = {"budget": asdict(budget), "world": gallery.world, "source": gallery.source}
    found |= {"captions": [asdict(c) for c in held_out(gallery, budget)], "ceiling": ceiling(gallery)}
    found |= {"ranks": {}, "encoders": {}, "missing": []}
    for part in parts(out, budget, encoders):
        folder, group = out / part.name, part.name.rpartition("/")[0]
        if not (folder / SCORES).is_file():
            found["missing"].append(part.name)
            continue
        for steps, ranks in read_json(folder / SCORES).items():
            found["ranks"].setdefault(group, {}).setdefault(steps, []).append(ranks)
        if (folder / ENCODER).is_file():
            own = found["encoders"].setdefault(group.removeprefix("base/"), {})
            for name, values in read_json(folder / ENCODER).items():
                own.setdefault(name, []).append(values)
    write_json(out / RESULTS, found)
    return found


class Found:
    """The contents of results.json, which are asked for by name."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.kinds = np.array([c["kind"] for c in tree["captions"]])
        whole = [e for e in tree["encoders"] if all(f"{g}/{e}" in tree["ranks"] for g, _ in SCORED)]
        self.encoders: list[str] = whole
        """Those of which everything is done."""

    def hits(self, group: str, encoder: str, steps: int, top: int = 1) -> np.ndarray | None:
        """[captions] float64: the share of seeds whose image is nearest to the picture asked for, or among the `top`;
        None of a part that is missing."""
        ranks = self.tree["ranks"].get(f"{group}/{encoder}", {}).get(str(steps))
        return None if ranks is None else (np.array(ranks) < top).mean(0)

    def score(self, group: str, encoder: str, steps: int, top: int = 1, kind: str | None = None) -> Interval:
        """The mean over captions, of one kind or all; its interval is over captions."""
        values = self.hits(group, encoder, steps, top)
        if values is None:
            return bootstrap([])
        return bootstrap(values if kind is None else values[self.kinds == kind])

    def measured(self, encoder: str, name: str) -> np.ndarray:
        """[captions] float64: a measure of a text encoder by caption, the mean over seeds."""
        return np.mean(self.tree["encoders"][encoder][name], 0)

    def agreement(self, measure: str, group: str, steps: int) -> Interval:
        """Spearman's rank correlation, over the encoders, of a measure with a score. Its interval is over captions,
        those of the measure and those of the score drawn anew, the same for every encoder; the encoders are fixed."""
        own = np.stack([self.measured(e, measure) for e in self.encoders])
        scores = np.stack([h for e in self.encoders if (h := self.hits(group, e, steps)) is not None])
        rng = np.random.default_rng(0)
        means = [
            np.stack([x[:, rng.integers(x.shape[1], size=x.shape[1])].mean(1) for _ in range(RESAMPLES)])
            for x in (own, scores)
        ]
        drawn = spearman(*means)
        if np.isnan(drawn).all():
            return Interval(float("nan"), float("nan"), float("nan"))
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(spearman(own.mean(1), scores.mean(1))), float(low), float(high))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation over the last axis of [..., n], ties at their mean rank: [...]; nan where one side is
    all ties."""
    x, y = (rankdata(values, axis=-1) - (np.shape(values)[-1] + 1) / 2 for values in (a, b))
    size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / size


def by_chance(rho: float, n: int) -> float:
    """The share of all orders of n encoders whose rank correlation is at least as far from 0 as rho, to either side."""
    if np.isnan(rho):
        return rho
    orders = np.array(list(permutations(range(n))))
    return float((abs(spearman(np.broadcast_to(np.arange(n), orders.shape), orders)) >= abs(rho) - 1e-9).mean())


def verdicts(found: Found) -> list[tuple[str, str, str]]:
    """(what is asked, agrees | does not | not told apart, the figures): by each measure and score, whether a better
    encoder gets a better score, as in the paper."""
    every = []
    for measure in MEASURES:
        for group, steps in SCORED:
            rho = found.agreement(measure, group, steps)
            chance = by_chance(rho.mean, len(found.encoders))
            how = "agrees" if rho.low > 0 else "does not" if rho.high < 0 else "not told apart"
            how = how if chance <= 1 - LEVEL else "not told apart"  # so few encoders fall into any order by chance
            every.append((f"{measure}: {label(group, steps)}", how, f"{rho:+.2f}\nby chance {chance:.2f}"))
    return every


def label(group: str, steps: int) -> str:
    return f"{'EMF' if group == 'emf' else 'FM'}\N{NO-BREAK SPACE}{steps}"
