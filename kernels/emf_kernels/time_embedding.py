"""Sinusoids of the end time t and of the interval t - r, the inputs of EMF's two time embedders.

Shapes:   t, r [B] (r None: the pretrained single embedding, one output); outputs [B, dim] for t and for t - r. Times
          in [0, 1].
Primal:   f_i = 10000^(-i / half), half = dim / 2;  e(s) = [cos(scale s f), sin(scale s f)];  outputs e(t), e(t - r)
Tangent:  e_dot(s) = scale s_dot f [-sin, cos];  s_dot is t_dot, and t_dot - r_dot
Backward: none is needed (times are data); autograd of the reference serves
Source:   EMF (arXiv 2604.18168), dual time embedding; diffusers' Timesteps with flip_sin_to_cos. Feed float32:
          bfloat16 keeps 8 bits of t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .op import Case, Cost, Op


def reference(t: Tensor, r: Tensor | None, scale: float = 1.0, dim: int = 256) -> Tensor | tuple[Tensor, Tensor]:
    f = scale * torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, dtype=t.dtype, device=t.device))
    e = [
        torch.cat([torch.cos(s[:, None] * f), torch.sin(s[:, None] * f)], -1)
        for s in ((t,) if r is None else (t, t - r))
    ]
    return e[0] if r is None else (e[0], e[1])


def inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, Tensor | float | int | None]:
    s = case.shape
    # The times themselves are exact in half precision, so that a test compares the arithmetic and not the rounding of
    # its inputs.
    t = torch.randint(32, 65, (s["B"],), generator=generator).to(device, dtype) / 64
    r = None if s.get("single") else t / 2
    return dict(t=t, r=r, scale=float(s.get("scale", 1)), dim=s["dim"])


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = (s["B"] + case.b) * s["dim"] * (1 if s.get("single") else 2)
    return Cost(4 * n, itemsize * n)


time_embedding = Op(
    "time_embedding",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("t", "r"),
    cases=[
        Case("dual", dict(B=3, dim=16), ("t",)),
        Case("ragged", dict(B=3, dim=16, b=1), ("t",)),
        Case("single", dict(B=3, dim=16, single=1, scale=10), ("t",)),
        Case("both-live", dict(B=2, dim=16), ("t", "r")),
        Case("sana-1.6b", dict(B=16, dim=256), ("t",), frozenset({"bench"})),
    ],
)
