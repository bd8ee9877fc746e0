"""Affine map of the last dimension.

Shapes:   x [B, ..., K]; weight [N, K]; bias [N] or None; y [B, ..., N].
Primal:   y = x W^T + bias
Tangent:  y_dot = x_dot W^T                      (the bias is a constant: it moves the primal only)
Backward: dx = dy W;  dW = dy^T x;  dbias = sum dy
Source:   every projection of the SANA block (arXiv 2410.10629).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bound at import: DeepSpeed's ZeRO-3 replaces torch.nn.functional.linear, process-wide, by a Function that has no
# forward-mode rule.
from torch.nn.functional import linear as affine

from ..dual import Dual, check
from ..op import Case, Cost, Op


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return affine(x, weight, bias)


def dual(x: Dual, weight: Tensor, bias: Tensor | None = None) -> Dual:
    # lift(reference) is right but pays for forward-mode AD of addmm more than for the product (profiles/LOG.md).
    with torch.no_grad():
        y_dot = affine(x.tangent, weight)
    return Dual(affine(x.primal, weight, bias), y_dot)


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if x.ndim < 2 or weight.ndim != 2:
        raise ValueError(
            f"linear: x is {tuple(x.shape)}, weight is {tuple(weight.shape)}; expected [B, ..., K] and [N, K]"
        )
    N, K = weight.shape
    check("linear", x, strided=True, x=(x, (*x.shape[:-1], K)), weight=(weight, (N, K)), bias=(bias, (N,)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    return dict(x=normal(s["B"], s["N"], s["K"]), weight=normal(s["O"], s["K"]) * s["K"] ** -0.5, bias=normal(s["O"]))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    rows = (s["B"] + case.b) * s["N"]
    return Cost(2 * rows * s["K"] * s["O"], itemsize * (rows * (s["K"] + s["O"]) + s["K"] * s["O"]))


CASES = [
    Case("small", dict(B=3, N=5, K=8, O=6), ("x",)),
    Case("ragged", dict(B=3, N=5, K=8, O=6, b=1), ("x",)),
    Case("sana-1.6b", dict(B=4, N=1024, K=2240, O=2240), ("x",), frozenset({"bench"})),
    Case("sana-1.6b-ff", dict(B=4, N=1024, K=2240, O=11200), ("x",), frozenset({"bench"})),
]
linear = Op("linear", reference, inputs, cost, accepts, CASES, dual=dual, batched=("x",), any_rank=("x",))
