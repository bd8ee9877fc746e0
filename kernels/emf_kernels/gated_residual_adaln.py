"""A gated residual and the adaLN that follows it, in one pass.

Shapes:   x, h [B, N, C]; gate [B, C] or None (then 1); scale, shift [B, C]; outputs y, n [B, N, C].
Primal:   y = x + gate h;  n = adaln(y, scale, shift)
Tangent:  y_dot = x_dot + gate_dot h + gate h_dot;  n_dot = adaln's tangent at (y, y_dot)
Backward: dy' = dy + adaln's dx;  then gated_residual's backward on dy'
Source:   in a SANA block, cross-attention's ungated residual is followed by norm2 with (shift, scale)_mlp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adaln import reference as adaln_reference
from .gated_residual import reference as gated_residual_reference
from .op import Case, Cost, Op


def reference(
    x: Tensor, gate: Tensor | None, h: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    y = gated_residual_reference(x, gate, h)
    return y, adaln_reference(y, scale, shift, eps)


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | None]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    gate = None if s.get("ungated") else normal(s["B"], s["C"])
    x, h = normal(s["B"], s["N"], s["C"]), normal(s["B"], s["N"], s["C"])
    return dict(x=x, gate=gate, h=h, scale=0.5 * normal(s["B"], s["C"]), shift=normal(s["B"], s["C"]))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((10 * s["B"] + 18 * case.b) * n, itemsize * (s["B"] + case.b) * (4 * n + 3 * s["C"]))


gated_residual_adaln = Op(
    "gated_residual_adaln",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("x", "gate", "h", "scale", "shift"),
    cases=[
        Case("small", dict(B=3, N=5, C=8), ("x", "gate", "h", "scale", "shift")),
        Case("ragged", dict(B=3, N=5, C=7, b=1), ("x", "gate", "h", "scale", "shift")),
        Case("ungated", dict(B=3, N=5, C=7, ungated=1, b=2), ("x", "h", "scale", "shift")),
        Case("sana-1.6b", dict(B=4, N=1024, C=2240, ungated=1), ("x", "h", "scale", "shift"), frozenset({"bench"})),
    ],
)
