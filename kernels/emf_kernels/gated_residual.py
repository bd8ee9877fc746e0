"""Residual sum with a per-sample gate.

Shapes:   x, h [B, ..., C]; gate [B, C] or None (then 1); y like x.
Primal:   y = x + gate h
Tangent:  y_dot = x_dot + gate_dot h + gate h_dot
Backward: dx = dy;  dh = gate dy;  dgate = sum over tokens of h dy
Source:   adaLN-zero gates (arXiv 2212.09748); gate None is SANA's ungated residual around cross-attention, and the
          sum of the two time branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Case, Cost, Op


def reference(x: Tensor, gate: Tensor | None, h: Tensor) -> Tensor:
    return x + h if gate is None else torch.addcmul(x, gate.unsqueeze(1), h)


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | None]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    gate = None if s.get("ungated") else normal(s["B"], s["C"])
    return dict(x=normal(s["B"], s["N"], s["C"]), gate=gate, h=normal(s["B"], s["N"], s["C"]))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((2 * s["B"] + 4 * case.b) * n, 3 * (s["B"] + case.b) * n * itemsize)


gated_residual = Op(
    "gated_residual",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("x", "gate", "h"),
    cases=[
        Case("small", dict(B=3, N=5, C=7), ("x", "gate", "h")),
        Case("ragged", dict(B=3, N=5, C=7, b=1), ("x", "gate", "h")),
        Case("ungated", dict(B=3, N=5, C=7, ungated=1), ("x", "h")),
        Case("branch", dict(B=3, N=5, C=7, b=2), ("h",)),
        Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x", "gate", "h"), frozenset({"bench"})),
    ],
)
