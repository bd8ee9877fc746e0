"""Which samples are in the batch of a step: a function of (seed, step, batch size) alone, for any number of ranks.

With buckets all samples of a step have one size: so every rank works as long as the others, and whatever number of
ranks and micro-batches shares a step sees the samples that one would see.

Position p = step x batch size + row. Its source is drawn by weight; of a source the samples come in a new permutation
every epoch. Samples that are read together, as a row group of a Parquet file is, come near each other: their runs are
permuted, and of each few runs in turn the samples. So where a run goes on is a matter of its step alone, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from emf.data.buckets import LIST
from emf.data.draws import Draws, even_shares, random_numbers, random_shares
from emf.data.drops import Dropped
from emf.data.images import Sample, Store, check_sizes
from emf.data.tables import MIXED

Place = tuple[int, int, int]
"""(source, index, how often the source has been gone through)."""


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
        self._sources = Draws(weights, random_shares(seed, 0))
        self.permutation = lru_cache(maxsize=2 * len(self.counts))(self._permute)

    def _permute(self, source: int, epoch: int) -> np.ndarray:
        share, runs = random_numbers(self.counts[source], self.seed, 1, source, epoch), self.runs[source]
        if runs is None:
            return np.argsort(share, kind="stable")
        return np.lexsort((share, np.repeat(self.together(source, epoch), runs)))

    def together(self, source: int, epoch: int) -> np.ndarray:
        """Which of the parts that an epoch is drawn from in turn each run of a source belongs to."""
        runs = self.runs[source]
        assert runs is not None
        order = np.argsort(random_numbers(len(runs), self.seed, 2, source, epoch), kind="stable")
        together = np.empty(len(runs), np.int64)
        together[order] = _in_turn(runs[order])
        return together

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, index) of a position, 0 and up."""
        return self.place(position)[:2]

    def place(self, position: int) -> Place:
        """(source, index, epoch of the source) of a position, 0 and up."""
        source, rank = self._sources[position]
        epoch, place = divmod(rank, self.counts[source])
        return source, int(self.permutation(source, epoch)[place]), epoch

    def batches(self, step: int, batch_size: int, rows: range) -> Iterator[list[Place]]:
        """The rows of a step's batch of batch_size."""
        yield [self.place(step * batch_size + row) for row in rows]

    def others(self, source: int, index: int) -> Iterator[tuple[int, int]]:
        """(source, index) of the sample, and of those that take its place, one after the other, where it cannot be
        used."""
        n = self.counts[source]
        return ((source, (index + k) % n) for k in range(n))


class BucketOrder:
    """The order where every step has pictures of one size (emf.data.buckets).

    The bucket of a step comes as often as its samples would: each has its share of the steps before any step, up to a
    few steps. Of a bucket the source of each row is drawn by weight, and its samples of that source come in a new
    permutation every time they are gone through. A batch goes on into the next: nothing is left over at an end.
    """

    def __init__(self, mixture: Mixture, buckets: Sequence[np.ndarray], weights: Sequence[float]) -> None:
        """buckets: of the samples of each source, each of which has some with a size; see Store."""
        self.mixture, self.buckets, seed = mixture, buckets, mixture.seed
        self.counts = np.stack([np.bincount(b[b >= 0], minlength=len(LIST)) for b in buckets])
        """[sources, buckets]: how many samples there are."""
        of_source = self.counts.sum(1)
        shares = self.counts / of_source[:, None] * (np.asarray(weights) / np.sum(weights))[:, None]
        self.present = np.flatnonzero(of_bucket := shares.sum(0))
        self._steps = Draws(of_bucket[self.present], even_shares(seed))
        self._sources = {int(b): np.flatnonzero(shares[:, b]) for b in self.present}
        self._rows = {b: Draws(shares[held, b], random_shares(seed, 4, b)) for b, held in self._sources.items()}
        pairs = int(np.count_nonzero(self.counts))
        self.members = lru_cache(maxsize=pairs)(self._find)
        self.permutation = lru_cache(maxsize=2 * pairs)(self._permute)

    def _find(self, source: int, bucket: int) -> np.ndarray:
        return np.flatnonzero(self.buckets[source] == bucket).astype(np.int32)

    def _permute(self, source: int, bucket: int, epoch: int) -> np.ndarray:
        members, runs = self.members(source, bucket), self.mixture.runs[source]
        share = random_numbers(len(members), self.mixture.seed, 5, source, bucket, epoch)
        if runs is None:
            return members[np.argsort(share, kind="stable")]
        run = np.searchsorted(np.cumsum(runs), members, side="right")
        return members[np.lexsort((share, self.mixture.together(source, epoch)[run]))]

    def batches(self, step: int, batch_size: int, rows: range) -> Iterator[list[Place]]:
        """The rows of a step's batch of batch_size; then, where nothing of its bucket can be used, those of the next
        bucket, and so on."""
        first, before = self._steps[step]
        for k in range(len(self.present)):
            bucket = int(self.present[(first + k) % len(self.present)])
            yield [self.place(bucket, before * batch_size + row) for row in rows]

    def place(self, bucket: int, position: int) -> Place:
        """(source, index, how often its bucket was gone through) of a position of a bucket, 0 and up."""
        held, rank = self._rows[bucket][position]
        source = int(self._sources[bucket][held])
        epoch, place = divmod(rank, int(self.counts[source, bucket]))
        return source, int(self.permutation(source, bucket, epoch)[place]), epoch

    def others(self, source: int, index: int) -> Iterator[tuple[int, int]]:
        """(source, index) of the sample, and of those of its bucket that take its place, one after the other, where it
        cannot be used: of its source, then of the others."""
        bucket = int(self.buckets[source][index])
        for of in (source, *(int(s) for s in self._sources[bucket] if s != source)):
            members = self.members(of, bucket)
            start = int(np.searchsorted(members, index)) if of == source else 0
            yield from ((of, int(members[(start + k) % len(members)])) for k in range(len(members)))


class Dataset:
    """Batches of a store's samples by weight.

    A sample that cannot be used is replaced by the next index of its source that can, and counted in `drops`: the same
    for every rank, and for a cache of the same data.
    """

    def __init__(self, store: Store, seed: int = 0, workers: int = 4) -> None:
        """workers: threads that read and decode. Raises ValueError on a negative seed."""
        self.store, self.drops, self.workers = store, store.drops, workers
        mixture = Mixture(store.counts, store.weights, seed, store.runs)
        self.order: Mixture | BucketOrder = mixture
        if store.buckets is not None:
            check_sizes(store)
            self.order = BucketOrder(mixture, store.buckets, store.weights)
        self._bad = [np.zeros(n, bool) for n in store.counts]
        self._pool = ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        """Samples, over all sources, the unusable among them."""
        return sum(self.store.counts)

    def _take(self, place: Place) -> Sample | None:
        source, index, epoch = place
        for of, i in self.order.others(source, index):
            if not self._bad[of][i]:
                try:
                    return self.store.get(of, i, epoch)
                except Dropped as drop:
                    self._bad[of][i] = True
                    self.drops.add(drop.key, drop.source, drop.reason, drop.detail)
        return None

    def batch(self, step: int, batch_size: int, part: int = 0, parts: int = 1) -> list[Sample]:
        """Rows part, part + parts, ... of step's batch of batch_size. Raises ValueError on a source of which nothing
        can be used."""
        places: list[Place] = []
        for places in self.order.batches(step, batch_size, range(part, batch_size, parts)):
            samples = list(self._pool.map(self._take, places))
            usable = [sample for sample in samples if sample is not None]
            if len(usable) == len(samples):
                return usable
        source = places[samples.index(None)][0]
        name, n = self.store.names[source], self.store.counts[source]
        why = ", ".join(f"{n} {reason}" for (of, reason), n in self.drops.counts.items() if of == name)
        raise ValueError(f"data: {name}: none of {n} samples can be used ({why}); emf data inspect names them")
