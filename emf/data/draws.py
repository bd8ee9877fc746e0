"""Numbers drawn by weight, of which any is known without those before it: what the order of the data is made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

BLOCK = 1 << 16  # positions that are drawn together


def random_numbers(n: int, *seed: int) -> np.ndarray:
    """n uint64 of a stream of their own. Raw, because NumPy may change what permutation() makes of a seed."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)


class Draws:
    """Numbers from 0 to n - 1 without end, drawn by weight, each with how many of it came before."""

    def __init__(self, weights: Sequence[float] | np.ndarray, shares: Callable[[int], np.ndarray]) -> None:
        """shares: of a block, [BLOCK] in [0, 1), by which its numbers are drawn."""
        self._edges, self._shares = np.cumsum(weights) / np.sum(weights), shares
        self._before: list[np.ndarray] = [np.zeros(len(self._edges), np.int64)]  # of each number, by block
        self._lock = threading.Lock()
        self._block = lru_cache(maxsize=2)(self._draw)  # what is read goes on from one block into the next

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of each position of the block, how many of that number came before it in the block), in the
        narrowest dtypes: an order by buckets keeps such blocks of each."""
        found = np.searchsorted(self._edges[:-1], self._shares(block), side="right")
        drawn = found.astype(np.min_scalar_type(len(self._edges) - 1))
        rank = np.empty(BLOCK, np.min_scalar_type(BLOCK - 1))
        for s in range(len(self._edges)):
            rank[drawn == s] = np.arange(np.count_nonzero(drawn == s))
        return drawn, rank

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(number of a position, how many of it came before)."""
        block, row = divmod(position, BLOCK)
        with self._lock:
            while len(self._before) <= block:  # half a second for the 13 million positions of 100,000 steps of 128
                drawn = np.bincount(self._draw(len(self._before) - 1)[0], minlength=len(self._edges))
                self._before.append(self._before[-1] + drawn)
        drawn, ranks = self._block(block)
        number = int(drawn[row])
        return number, int(self._before[block][number] + ranks[row])


def random_shares(*seed: int) -> Callable[[int], np.ndarray]:
    """For Draws: shares that are drawn at random."""
    return lambda block: random_numbers(BLOCK, *seed, block) / 2.0**64


def even_shares(seed: int) -> Callable[[int], np.ndarray]:
    """For Draws: shares that are spread evenly over any stretch of positions (multiples of the golden ratio), so that
    of n positions a number has its share up to a few, and not up to the root of n."""
    first = int(random_numbers(1, seed, 3)[0])

    def shares(block: int) -> np.ndarray:
        number = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64)
        return (np.uint64(first) + number * np.uint64(0x9E3779B97F4A7C15)) / 2.0**64  # modulo 2**64

    return shares
