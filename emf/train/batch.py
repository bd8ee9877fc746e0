"""What a step is trained on. Everything random in it comes from (seed, step), so a resumed run continues as if it had
not stopped."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from emf.config import Config
from emf.data.feed import Feed
from emf.flow import seed_of, times


class Batch(NamedTuple):
    """One rank's part of a micro-batch of n samples, the first b of which have r < t."""

    x: Tensor
    """Clean latents [n, C, H, W]."""
    e: Tensor
    """Noise [n, C, H, W]."""
    t: Tensor
    """Times [n], float32."""
    r: Tensor
    """End times [n], float32, at most t."""
    b: int
    ids: Tensor
    """The caption's token ids [n, M]."""
    mask: Tensor
    """Which of them are the caption's [n, M], bool."""
    drop: Tensor
    """Whose condition is dropped [n], bool."""
    made_in: int = 1
    """In how many steps the pictures are made where the distribution-matching term acts."""
    noise: Tensor | None = None
    """Where the distribution-matching term acts (emf.matching): what those pictures are made of, [k, C, H, W]
    with k <= n; their captions are the first k. None: it does not act."""
    tau: Tensor | None = None
    """Times to which they are noised again [k], float32."""
    again: Tensor | None = None
    """The noise of that [k, C, H, W]."""

    def on(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The batch on a device, with pictures and noise in the dtype of the weights; times stay float32. The host does
        not wait for what it copies from pinned memory."""
        moved = {name: x.to(device, non_blocking=True) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        moved |= {name: moved[name].to(dtype) for name in ("x", "e", "noise", "again") if name in moved}
        return Batch(**moved, b=self.b, made_in=self.made_in)

    def pinned(self) -> Batch:
        """The batch in memory of the host from which a GPU copies by itself; without a GPU the batch as it is."""
        if not torch.cuda.is_available():
            return self
        here = {k: x for k, x in self._asdict().items() if isinstance(x, Tensor) and x.device.type == "cpu"}
        return Batch(**self._asdict() | {k: x.pin_memory() for k, x in here.items()})


def matched_samples(config: Config, parts: int) -> int:
    """How many pictures a step's distribution-matching term has, whatever shares the work. Raises
    ValueError where the parts, all ranks' micro-batches, cannot have the same number of them."""
    k = round(config.match.share * config.batch_size)
    if not k or k % parts:
        raise ValueError(
            f"config: match.share {config.match.share} of batch_size {config.batch_size} is {k} samples, which {parts} "
            f"micro-batches of all ranks cannot share alike; make it a multiple of {parts / config.batch_size:.4g}"
        )
    return k


def make_batch(config: Config, feed: Feed, step: int, part: int, parts: int) -> Batch:
    """Part `part` of `parts` of step's batch. Every part has the same share of r < t (to one sample): the sorted
    batch is dealt out in turn."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, step))
    x, ids, mask = feed(step, part, parts)
    n, mine = config.batch_size, slice(part, None, parts)
    t, r, b = times(step / config.steps, n, config.flow, generator)
    e = torch.randn((n, *x.shape[1:]), generator=generator)
    drop = torch.rand(n, generator=generator) < config.drop
    e, t, r, drop = (a[mine].contiguous() for a in (e, t, r, drop))
    batch = Batch(x, e, t, r, len(range(part, b, parts)), ids, mask, drop)
    if not config.match.weight or step / config.steps < config.match.begin:
        return batch
    k = matched_samples(config, parts)
    noise, again = torch.randn((2, k, *x.shape[1:]), generator=generator)
    tau = 0.02 + 0.96 * torch.rand(k, generator=generator)  # the ends say little, and the velocity at 0 is noise
    noise, tau, again = (a[mine].contiguous() for a in (noise, tau, again))
    made_in = config.match.steps[step % len(config.match.steps)]
    return batch._replace(made_in=made_in, noise=noise, tau=tau, again=again)


def batches(config: Config, feed: Feed, start: int, rank: int, world: int) -> Iterator[tuple[tuple[int, int], Batch]]:
    """((step, micro-batch), this rank's samples) from step start on; the next is made while this one is used."""
    accumulation = config.zero.accumulation
    places = ((step, micro) for step in range(start, config.steps) for micro in range(accumulation))

    def make(step: int, micro: int) -> Batch:
        return make_batch(config, feed, step, rank + world * micro, world * accumulation).pinned()

    with ThreadPoolExecutor(1) as ahead:
        place = next(places, None)
        coming = place and ahead.submit(make, *place)
        while place and coming:
            now, batch = place, coming
            place = next(places, None)
            coming = place and ahead.submit(make, *place)
            yield now, batch.result()
