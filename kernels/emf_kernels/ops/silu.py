"""SiLU of a small tensor: the activation between the two layers of a time embedding.

Shapes:   x [B, ...]; y like x.
Primal:   y = x sigmoid(x)
Tangent:  y_dot = (s + x s (1 - s)) x_dot,  s = sigmoid(x)
Backward: dx = (s + x s (1 - s)) dy
Source:   diffusers' TimestepEmbedding, as used by SANA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dual import Dual, check
from ..op import Case, Cost, Op


def reference(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


def dual(x: Dual) -> Dual:
    x_, x_dot = x
    with torch.no_grad():
        y_dot = torch.ops.aten.silu_backward(x_dot, x_[: len(x_dot)])  # which is silu'(x) x_dot
    return Dual(reference(x_), y_dot)


def accepts(x: Tensor) -> None:
    check("silu", x, strided=True, x=(x, tuple(x.shape)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    return dict(x=torch.randn(case.shape["B"], case.shape["C"], generator=generator, dtype=dtype).to(device))


def cost(case: Case, itemsize: int) -> Cost:
    n = (case.shape["B"] + case.b) * case.shape["C"]
    return Cost(6 * n, 2 * n * itemsize)


CASES = [
    Case("small", dict(B=3, C=7), ("x",)),
    Case("ragged", dict(B=3, C=7, b=2), ("x",)),
    Case("sana-1.6b", dict(B=16, C=2240), ("x",), frozenset({"bench"})),
]
silu = Op("silu", reference, inputs, cost, accepts, CASES, dual=dual, batched=("x",), any_rank=("x",))
