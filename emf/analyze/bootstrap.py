"""Means with their interval, by the bootstrap or by Student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emf.analyze.choices import RESAMPLES

LEVEL = 0.95
CHUNK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean and an interval around it; nan where nothing could be measured."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return "–" if math.isnan(self.mean) else f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Mean of values [n], as differences by seed or by query, and Student's interval; of one value it is without end,
    of none nan."""
    from scipy.stats import t as student  # a second, which those that draw a bootstrap need not take

    x = np.asarray(values, np.float64)
    if not len(x):
        return Interval(math.nan, math.nan, math.nan)
    n, mean = len(x), float(x.mean())
    half = math.inf if n < 2 else float(student.ppf((1 + level) / 2, n - 1) * x.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[object] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Mean of values [n] and its percentile bootstrap interval (Efron 1979), the n drawn anew with replacement.

    groups [n]: the mean of the groups' means instead, each group drawn anew from itself (GenEval's overall is the mean
                of its tags').
    Raises ValueError on a level outside (0, 1), on fewer than 1 resample, and on groups of another length.
    """
    x = np.asarray(values, np.float64).ravel()
    if not 0 < level < 1 or resamples < 1 or (groups is not None and len(groups) != len(x)):
        raise ValueError(
            f"bootstrap: level {level}, {resamples} resamples, {len(x)} values; expected a level in (0, 1), at least 1 "
            "resample, and a group for every value"
        )
    if not len(x) or np.isnan(x).any():
        return Interval(math.nan, math.nan, math.nan)
    by_group: dict[object, list[float]] = {}
    for group, value in zip(groups if groups is not None else [None] * len(x), x.tolist(), strict=True):
        by_group.setdefault(group, []).append(value)
    parts = [np.array(part) for part in by_group.values()]
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for part in parts:
        step = max(1, CHUNK // len(part))
        for start in range(0, resamples, step):
            n = min(step, resamples - start)
            means[start : start + n] += part[rng.integers(len(part), size=(n, len(part)))].mean(1) / len(parts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = math.fsum(math.fsum(part) / len(part) for part in parts) / len(parts)
    # of equal values rounding may put the mean outside
    return Interval(mean, min(float(low), mean), max(float(high), mean))
