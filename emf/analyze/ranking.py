"""The order of encoders by a score, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from emf.analyze.bootstrap import CHUNK, LEVEL, interval
from emf.analyze.choices import RESAMPLES


@dataclass(frozen=True)
class Ranking:
    """Encoders from the highest score to the lowest."""

    order: list[str]
    alike: dict[str, list[str]]
    """By encoder: those that it is not told apart from."""
    sure: float
    """The share of resamples in which the whole order is this one; 1 of a single encoder."""

    def __str__(self) -> str:
        """The order in a line, > where neighbours are told apart, ~ where they are not, and how sure it is."""
        signs = ["~" if b in self.alike[a] else ">" for a, b in zip(self.order, self.order[1:], strict=False)]
        line = " ".join([x for pair in zip(self.order, [*signs, ""], strict=True) for x in pair][:-1])
        place = self.order.index
        further = [f"{a} and {b}" for a in self.order for b in self.alike[a] if place(b) > place(a) + 1]
        apart = f"; nor are {', '.join(further)} told apart" if further else ""
        return f"{line}{apart}; the whole order in {self.sure:.0%} of resamples"


def rank(values: Mapping[str, np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0) -> Ranking:
    """Encoders by the mean of their values [n], one for each query or prompt, the same ones for every encoder.

    Two encoders are told apart where Student's interval of the mean of their differences, one for each query, excludes
    0: what makes a query hard for all of them is no difference between them. The level is such that all pairs together
    are told right at LEVEL (Bonferroni). How sure the whole order is, is asked of the bootstrap (Efron 1979), whose n
    are drawn with replacement, alike for all encoders. Raises ValueError on none, and on values that are not finite or
    of another number.
    """
    names, sizes = list(values), {len(x) for x in values.values()}
    if len(sizes) != 1 or 0 in sizes or not all(np.isfinite(x).all() for x in values.values()):
        raise ValueError(f"analyze: values of {len(names)} encoders, {sorted(sizes)} of each; expected finite numbers")
    every = np.stack([np.asarray(values[name], np.float64) for name in names])  # [E, n]
    order = sorted(range(len(names)), key=lambda i: -every[i].mean())
    n, rng, parts = every.shape[1], np.random.default_rng(seed), []
    step = max(1, CHUNK // (n * len(names)))
    for start in range(0, resamples, step):
        drawn = rng.integers(n, size=(min(step, resamples - start), n))
        parts.append(every[:, drawn].mean(2))
    means = np.concatenate(parts, 1)[order]  # [E, resamples], the highest first
    tail = (1 - LEVEL) / 2 / max(1, len(names) * (len(names) - 1) // 2)
    alike: dict[str, list[str]] = {names[i]: [] for i in order}
    for a, i in enumerate(order):
        for j in order[a + 1 :]:
            apart = interval(every[i] - every[j], 1 - 2 * tail)
            if apart.low <= 0 <= apart.high:
                alike[names[i]].append(names[j])
                alike[names[j]].append(names[i])
    sure = float((means[:-1] > means[1:]).all(0).mean())
    return Ranking([names[i] for i in order], alike, sure)
