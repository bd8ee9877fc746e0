"""Pretrained weights into a model with EMF's dual time embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from emf.model.sizes import TransformerConfig
from emf.model.transformer import SINUSOID
from emf_kernels import time_embedding

BRANCHES = ("time_embed_t", "time_embed_r")
"""EMF's two embedders: of the end time t, and of the interval t - r."""
SCALES = ("time_scale", "base_time_scale")
"""What the header of a file with the two says of them, under the names of TransformerConfig."""
PREFIX = "transformer.time_embed"
SECOND = ("emb.timestep_embedder.linear_2.weight", "emb.timestep_embedder.linear_2.bias")
REFITTED = ("emb.timestep_embedder.linear_1.weight", "emb.timestep_embedder.linear_1.bias", *SECOND)
ZEROED = (*SECOND, "linear.bias")


def scales(config: TransformerConfig) -> dict[str, str]:
    """What the header of a file of weights is to say of its time embedders; empty where it has none."""
    return {k: str(getattr(config, k)) for k in SCALES} if config.dual_time else {}


def has_time_branches(state: dict[str, Tensor]) -> bool:
    """Whether a state dict of TextToImage has EMF's two embedders."""
    return any(k.startswith(f"{PREFIX}_t.") for k in state)


def add_time_branches(state: dict[str, Tensor], config: TransformerConfig, how: str) -> dict[str, Tensor]:
    """A state dict of TextToImage with the single `time_embed`, extended by `time_embed_t` (end time) and
    `time_embed_r` (interval).

    how "duplicate": both are copies (EMF, arXiv 2604.18168). At r = t the network then sees about twice the modulation.
    how "preserve": at r = t the network computes what it did. The end-time branch keeps the first and last layer; its
    second layer is fitted by least squares so that e(t) at the new time scale is what it was at the old one. The
    interval branch's second layer and last bias are zero.
    Returns the state unchanged if the branches are there. Raises ValueError if there is no time_embed.
    """
    if has_time_branches(state):
        return state
    source = {k.removeprefix(f"{PREFIX}."): v for k, v in state.items() if k.startswith(f"{PREFIX}.")}
    if not source:
        raise ValueError(
            f"convert: the weights have no {PREFIX}.*; expected a SANA transformer with its time embedding"
        )
    make = time_branches(source.__getitem__, config, how)
    return state | {f"{PREFIX}_{b}.{k}": make(b, k).clone() for b in "tr" for k in source}


def time_branches(read: Callable[[str], Tensor], config: TransformerConfig, how: str) -> Callable[[str, str], Tensor]:
    """What makes weight `name` of branch "t" or "r" from the weights of the single embedding, which `read` gives by
    name; one at a time, so that a checkpoint can be streamed. See add_time_branches."""

    @cache
    def fitted() -> tuple[Tensor, Tensor]:
        return refit({name: read(name) for name in REFITTED}, config.base_time_scale, config.time_scale)

    def make(branch: str, name: str) -> Tensor:
        weight = read(name)
        if how == "preserve" and branch == "r" and name in ZEROED:
            return torch.zeros_like(weight)
        if how == "preserve" and branch == "t" and name in SECOND and config.time_scale != config.base_time_scale:
            return fitted()[SECOND.index(name)].to(weight.dtype)
        return weight

    return make


def refit(
    source: dict[str, Tensor], old_scale: float, new_scale: float, grid: int = 2001, ridge: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """(weight, bias) of linear_2, float64, with which the embedder, fed new_scale t, best gives e(t) of the embedder
    fed old_scale t, t in [0, 1]."""
    t = torch.linspace(0, 1, grid, dtype=torch.float64)
    layer = {k.removeprefix("emb.timestep_embedder."): v.double() for k, v in source.items()}

    def features(scale: float) -> Tensor:
        h = torch.nn.functional.silu(
            time_embedding(t, None, scale, SINUSOID) @ layer["linear_1.weight"].T + layer["linear_1.bias"]
        )
        return torch.cat([h, torch.ones_like(h[:, :1])], 1)

    target = features(old_scale) @ torch.cat([layer["linear_2.weight"], layer["linear_2.bias"][:, None]], 1).T
    a = features(new_scale)
    solution = torch.linalg.solve(a.T @ a + ridge * grid * torch.eye(a.shape[1], dtype=a.dtype), a.T @ target)
    return solution[:-1].T.contiguous(), solution[-1]
