"""EMF's MeanFlow loss: target, error, per-sample sum and adaptive weight.

Shapes:   u, v [B, ...]; u_dot [b, ...], b <= B, the tangent of the first b samples (a constant); t, r [B]; r = t in
          the other samples. Outputs: loss [B] (weighted), error [B] (mean squared error, for logs).
Primal:   u_tgt = v - (t - r) u_dot;  L = sum over all but the batch of (u - u_tgt)^2;  w = 1 / (stopgrad(L) + c)^p;
          loss = w L
Tangent:  none: a loss is where tangents end
Backward: du = 2 w (u - u_tgt) dloss   (u_tgt and w are constants)
Source:   MeanFlow (arXiv 2505.13447) eq. 9-11 and section 4.3; EMF (arXiv 2604.18168) uses p = 1, c = 1e-3 on the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Case, Cost, Op


def reference(
    u: Tensor, u_dot: Tensor, v: Tensor, t: Tensor, r: Tensor, p: float = 1.0, c: float = 1e-3
) -> tuple[Tensor, Tensor]:
    b, gap = u_dot.shape[0], (t - r).reshape(-1, *[1] * (u.ndim - 1))
    u_tgt = torch.cat([v[:b] - gap[:b] * u_dot, v[b:]]).detach()
    total = (u - u_tgt).square().flatten(1).sum(1)
    return total / (total.detach() + c) ** p, total.detach() / u[0].numel()


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | float]:
    s = case.shape
    normal = lambda n: torch.randn(n, s["C"], s["H"], s["W"], generator=generator, dtype=dtype).to(device)  # noqa: E731
    t = torch.randint(32, 65, (s["B"],), generator=generator).to(device, dtype) / 64
    r = torch.where(torch.arange(s["B"], device=device) < case.b, t / 2, t)
    return dict(u=normal(s["B"]), u_dot=normal(case.b), v=normal(s["B"]), t=t, r=r, p=s.get("half_p", 2) / 2)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["C"] * s["H"] * s["W"]
    return Cost((3 * s["B"] + 2 * case.b) * n, itemsize * (2 * s["B"] + case.b) * n)


meanflow = Op(
    "meanflow",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("u", "v", "t", "r"),
    differentiable=("u",),
    cases=[
        Case("full", dict(B=3, C=2, H=4, W=3), ()),
        Case("ragged", dict(B=4, C=2, H=3, W=3, b=1), ()),
        Case("flow-matching", dict(B=3, C=2, H=3, W=3, b=0, half_p=1), ()),
        Case("unweighted", dict(B=3, C=2, H=3, W=3, half_p=0), ()),
        Case("sana-1.6b", dict(B=16, C=32, H=32, W=32, b=8), (), frozenset({"bench"})),
    ],
)
