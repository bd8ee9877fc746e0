"""Which samples are in the batch of a step: a function of (seed, step, batch size) alone, for any number of ranks.

Position p = step x batch size + row. Its source is drawn by weight; of a source the samples come in a new permutation
every epoch. Samples that are read together, as a row group of a Parquet file is, come near each other: their runs are
permuted, and of each few runs in turn the samples. So where a run goes on is a matter of its step alone, too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from emf.data.drops import Dropped
from emf.data.images import Sample, Store
from emf.data.tables import MIXED

BLOCK = 1 << 16  # positions whose sources are drawn together


def _random(n: int, *seed: int) -> np.ndarray:
    """n uint64 of a stream of their own. Raw, because NumPy may change what permutation() makes of a seed."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)


def _in_turn(sizes: np.ndarray) -> list[int]:
    """Which of the parts that an epoch is drawn from in turn each run belongs to: two runs or more, of MIXED samples
    together."""
    parts, part, runs, samples = list[int](), 0, 0, 0
    for size in sizes.tolist():
        parts.append(part)
        runs, samples = runs + 1, samples + size
        if runs > 1 and samples >= MIXED:
            part, runs, samples = part + 1, 0, 0
    return parts


class Mixture:
    """Positions to (source, index)."""

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        seed: int,
        runs: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        """counts: samples of each source; weights: positive, of any sum; runs: see Store. Raises ValueError on a
        negative seed."""
        if seed < 0:
            raise ValueError(f"data: seed {seed} must be at least 0")
        self.counts, self.seed = list(counts), seed
        self.runs = [None if run is None else np.array(run, np.int64) for run in runs or [None] * len(self.counts)]
        self._edges = np.cumsum(weights) / np.sum(weights)
        self._before: list[np.ndarray] = [np.zeros(len(self.counts), np.int64)]  # of each source, by block
        self._lock = threading.Lock()
        self._block = lru_cache(maxsize=4)(self._draw)
        self.permutation = lru_cache(maxsize=2 * len(self.counts))(self._permute)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each position of the block, how many of that source came before it in the block)."""
        share = _random(BLOCK, self.seed, 0, block) / 2.0**64
        source = np.searchsorted(self._edges[:-1], share, side="right")
        rank = np.empty(BLOCK, np.int64)
        for s in range(len(self.counts)):
            rank[source == s] = np.arange(np.count_nonzero(source == s))
        return source, rank

    def _permute(self, source: int, epoch: int) -> np.ndarray:
        share, runs = _random(self.counts[source], self.seed, 1, source, epoch), self.runs[source]
        if runs is None:
            return np.argsort(share, kind="stable")
        order = np.argsort(_random(len(runs), self.seed, 2, source, epoch), kind="stable")
        together = np.empty(len(runs), np.int64)
        together[order] = _in_turn(runs[order])
        return np.lexsort((share, np.repeat(together, runs)))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, index) of a position, 0 and up."""
        return self.place(position)[:2]

    def place(self, position: int) -> tuple[int, int, int]:
        """(source, index, epoch of the source) of a position, 0 and up."""
        block, row = divmod(position, BLOCK)
        with self._lock:
            while len(self._before) <= block:  # half a second for the 13 million positions of 100,000 steps of 128
                drawn = np.bincount(self._draw(len(self._before) - 1)[0], minlength=len(self.counts))
                self._before.append(self._before[-1] + drawn)
        sources, ranks = self._block(block)
        source = int(sources[row])
        epoch, place = divmod(int(self._before[block][source] + ranks[row]), self.counts[source])
        return source, int(self.permutation(source, epoch)[place]), epoch


class Dataset:
    """Batches of a store's samples by weight.

    A sample that cannot be used is replaced by the next index of its source that can, and counted in `drops`: the same
    for every rank, and for a cache of the same data.
    """

    def __init__(self, store: Store, seed: int = 0, workers: int = 4) -> None:
        """workers: threads that read and decode. Raises ValueError on a negative seed."""
        self.store, self.drops, self.workers = store, store.drops, workers
        self.order = Mixture(store.counts, store.weights, seed, store.runs)
        self._bad = [np.zeros(n, bool) for n in store.counts]
        self._pool = ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        """Samples, over all sources, the unusable among them."""
        return sum(self.store.counts)

    def _take(self, place: tuple[int, int, int]) -> Sample:
        source, index, epoch = place
        bad, n = self._bad[source], self.store.counts[source]
        for i in ((index + k) % n for k in range(n)):
            if not bad[i]:
                try:
                    return self.store.get(source, i, epoch)
                except Dropped as drop:
                    bad[i] = True
                    self.drops.add(drop.key, drop.source, drop.reason, drop.detail)
        name = self.store.names[source]
        why = ", ".join(f"{n} {reason}" for (of, reason), n in self.drops.counts.items() if of == name)
        raise ValueError(f"data: {name}: none of {n} samples can be used ({why}); emf data inspect names them")

    def batch(self, step: int, batch_size: int, part: int = 0, parts: int = 1) -> list[Sample]:
        """Rows part, part + parts, ... of step's batch of batch_size. Raises ValueError on a source of which nothing
        can be used."""
        places = [self.order.place(step * batch_size + row) for row in range(part, batch_size, parts)]
        return list(self._pool.map(self._take, places))
