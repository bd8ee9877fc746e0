"""Root-mean-square norm with a weight, across all channels.

Shapes:   x [B, ..., C]; weight [C]; y like x. Statistics over C (in SANA over all heads at once).
Primal:   rstd = (mean(x^2) + eps)^-1/2;  y = x rstd weight
Tangent:  y_dot = rstd (x_dot - x rstd^2 mean(x x_dot)) weight
Backward: g = dy weight;  dx = rstd (g - x rstd^2 mean(x g));  dweight = sum dy x rstd
Source:   RMSNorm (arXiv 1910.07467); diffusers' "rms_norm_across_heads" (eps 1e-5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Case, Cost, Op


def reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    return dict(x=2 * normal(s["B"], s["N"], s["C"]), weight=1 + 0.2 * normal(s["C"]))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((4 * s["B"] + 7 * case.b) * n, itemsize * (2 * (s["B"] + case.b) * n + s["C"]))


rmsnorm = Op(
    "rmsnorm",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("x",),
    cases=[
        Case("small", dict(B=3, N=5, C=8), ("x",)),
        Case("ragged", dict(B=3, N=1, C=37, b=2), ("x",)),
        Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x",), frozenset({"bench"})),
    ],
)
