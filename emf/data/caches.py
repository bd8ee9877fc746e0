"""Several caches as one store of samples."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from emf.data.cache import Cache
from emf.data.drops import Drops
from emf.data.images import Sample
from emf.data.sources import Source
from emf.files import SETTINGS

SAME = ("encoder", "tokenizer", "size", "token_size")
"""Settings of a cache in which several in one run must agree: they say what a latent and a token mean."""


def is_cache(source: Source) -> bool:
    """Whether a source is a folder that emf cache wrote."""
    return (Path(source.path) / SETTINGS).is_file()


class Caches:
    """Caches as one store, for emf.data.mixture.Dataset. The sources of a cache have shares in its weight by their own
    weights. Raises ValueError on a cache that is not whole, or of another encoder than the first."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.caches = [Cache(Path(source.path)) for source in sources]
        self.settings = self.caches[0].settings
        for source, cache in zip(sources, self.caches, strict=True):
            if source.caption is not None:
                raise ValueError(f"data: {source.path} is a cache, its captions are fixed; leave out @{source.caption}")
            if (cache.buckets is None) != (self.caches[0].buckets is None):
                ours, other = (source, sources[0]) if cache.buckets is not None else (sources[0], source)
                raise ValueError(f"data: {ours.path} holds sizes by ratio, and {other.path} squares; cache one again")
            if differ := [key for key in SAME if cache.settings.get(key) != self.settings.get(key)]:
                raise ValueError(
                    f"data: caches of one run must agree: {differ[0]} is {cache.settings.get(differ[0])} in "
                    f"{source.path}, and {self.settings.get(differ[0])} in {sources[0].path}"
                )
        self.names = [name for cache in self.caches for name in cache.names]
        self.counts = [count for cache in self.caches for count in cache.counts]
        self.runs = [run for cache in self.caches for run in cache.runs]
        known = [cache.buckets for cache in self.caches]
        self.buckets = None if known[0] is None else [one for held in known for one in held or []]
        self.weights = list(self.caches[0].weights)
        if len(sources) > 1:
            shares = [(source.weight / sum(c.weights), c) for source, c in zip(sources, self.caches, strict=True)]
            self.weights = [share * weight for share, cache in shares for weight in cache.weights]
        self.drops = Drops()
        for cache in self.caches:
            self.drops.take(cache.drops)
            cache.drops = self.drops
        self._ends = list(accumulate(len(cache.counts) for cache in self.caches))

    def get(self, source: int, index: int, turn: int = 0) -> Sample:
        """See Store."""
        place = bisect.bisect(self._ends, source)
        return self.caches[place].get(source - (self._ends[place - 1] if place else 0), index, turn)
