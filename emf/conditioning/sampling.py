"""Picking image tokens from a language model's logits: temperature, top-k, top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The defaults are BLIP3o-NEXT's. Applied in this order."""

    temperature: float = 1.0
    top_k: int = 1200
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0 and self.top_k > 0 and 0 < self.top_p <= 1):
            raise ValueError(f"sampling: {self}; expected temperature and top_k above 0, and top_p in (0, 1]")


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities [B, k] float32 in falling order, their token ids [B, k]) of logits [B, V].

    top-p keeps the fewest likeliest tokens that hold top_p of the top-k tokens' mass, at least one.
    """
    values, ids = (logits.float() / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    p = values.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0.0)
    return p / p.sum(-1, keepdim=True), ids


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [B] of logits [B, V] by inverting the distribution function at uniform [B] in [0, 1)."""
    p, ids = distribution(logits, sampling)
    # the last kept token takes what rounding leaves of the mass
    last = (p > 0).sum(-1, keepdim=True) - 1
    index = (p.cumsum(-1) <= uniform[:, None]).sum(-1, keepdim=True).minimum(last)
    return ids.gather(1, index)[:, 0]


def uniforms(generator: torch.Generator | Sequence[torch.Generator], rows: int, columns: int) -> Tensor:
    """[rows, columns] float32 in [0, 1) on the CPU. One generator a row: a row does not depend on the others; one for
    all: drawn in turn. Raises ValueError where their number does not fit."""
    each = [generator] * rows if isinstance(generator, torch.Generator) else list(generator)
    if len(each) != rows:
        raise ValueError(f"sampling: {len(each)} generators for {rows} captions; expected one, or one each")
    return torch.stack([torch.rand(columns, generator=g, device=g.device).cpu() for g in each])
