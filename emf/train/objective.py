"""What a step minimizes, and at which learning rate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from emf.config import Config
from emf.flow import flow_matching_loss, meanflow_loss
from emf.model.layers import States
from emf.train.batch import Batch
from emf.train.ranges import span
from emf_kernels import primal


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    o, warmup = config.optim, config.warmup
    if step < warmup:
        return o.lr * (step + 1) / warmup
    if o.decay == "constant":
        return o.lr
    return o.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup))) / 2


def carried(b: int, n: int) -> int:
    """How many of n samples carry a tangent in compiled code, which is made for one number: at most five of them, b
    rounded up to quarters of n. Samples with r = t multiply theirs by zero."""
    quarter = -(-n // 4)
    return min(n, -(-b // quarter) * quarter)


class Losses(NamedTuple):
    """Of the n samples of a micro-batch."""

    loss: Tensor
    """What is minimized [n]."""
    error: Tensor
    """Mean squared error [n], without weights."""
    further: dict[str, Tensor]
    """What the loss holds besides, before its weight, by the names of the log: the language model's own loss
    (`lm_loss`), the distribution-matching term, the error of its fake flow, and in how many steps its pictures were
    made (`match`, `fake_error`, `match_steps`)."""


def descended(loss: Tensor, squared: Tensor) -> Tensor:
    """What a micro-batch goes backward from, of its loss and mean squared error [n]: the loss's mean. Where one of the
    two is not finite, every gradient is NaN, so that no optimizer applies it (a weight that has underflowed would give
    gradients of zero)."""
    mean = loss.mean()
    return mean * (1 + 0 * (mean.detach() + squared.mean()))


def first(states: States, n: int) -> States:
    """Of the first n captions."""
    read, mask = states
    return read[:n], None if mask is None else mask[:n]


def losses(config: Config, network: Any, batch: Batch, progress: float) -> Losses:
    """What a micro-batch comes to at a training progress in [0, 1]."""
    x, e, t, r, b, ids, mask, drop, made_in, *draws = batch
    weight, own_loss = config.condition.ar_weight, None
    b = carried(b, len(t)) if config.compile else b
    with span("encode"):
        states = network.read(ids, mask, drop, own_loss=bool(weight))
    if weight:
        states, own_loss = states

    def velocity(z: Any, t: Any, r: Tensor | None) -> Any:
        n = len(primal(t))
        return network(z, t, r, first(states, n), drop[:n])

    def null(z: Any, t: Any, r: Tensor | None) -> Any:
        return network(z, t, r, states, null=True)

    if config.objective == "flow_matching":
        loss, squared = flow_matching_loss(velocity, x, e, t)
    else:
        loss, squared = meanflow_loss(velocity, null, x, e, (t, r, b), config.flow, progress=progress, dropped=drop)
    further: dict[str, Tensor] = {}
    if own_loss is not None:
        loss, further = loss + weight * own_loss, {"lm_loss": own_loss.detach()}
    if batch.noise is not None:
        k, guidance = len(batch.noise), config.match.guidance
        term, fake = network.matching(*draws, first(states, k), guidance=guidance, steps=made_in)
        loss = loss + config.match.weight_at(progress) * term.mean() + fake.mean()
        further |= {"match": term.detach(), "fake_error": fake.detach(), "match_steps": fake.new_full((1,), made_in)}
    return Losses(loss, squared, further)
