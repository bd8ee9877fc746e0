"""Root-mean-square norm with a weight, across all channels.

Shapes:   x [B, N, C]; weight [C]; y like x. Statistics over C (in SANA over all heads at once).
Primal:   rstd = (mean(x^2) + eps)^-1/2;  y = x rstd weight
Tangent:  y_dot = rstd (x_dot - x rstd^2 mean(x x_dot)) weight
Backward: g = dy weight;  dx = rstd (g - x rstd^2 mean(x g));  dweight = sum dy x rstd
Source:   RMSNorm (arXiv 1910.07467); diffusers' "rms_norm_across_heads" (eps 1e-5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual import check, widened
from ..function import function
from ..op import Case, Cost, Op
from ..tiles import cdiv, empty, rows, strides


def reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = widened(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@triton.jit
def _fwd(
    x_ptr, weight_ptr, x_dot_ptr, y_ptr, y_dot_ptr, rstd_ptr, x_b, x_n, x_dot_b, x_dot_n, N, C, b, eps,
    X_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // N, row % N
    c = tl.arange(0, BLOCK)
    inside = c < C
    x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=inside, other=0).to(tl.float32)
    x_dot = tl.zeros_like(x)
    if X_LIVE:  # on its way while the primal's sum is waited for
        live = inside & (sample < b)
        x_dot = tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=live, other=0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x) / C + tl.cast(eps, tl.float32))
    tl.store(y_ptr + row * C + c, x * rstd * weight, mask=inside)
    tl.store(rstd_ptr + row, rstd)
    if X_LIVE:  # noqa: SIM102
        if sample < b:
            y_dot = rstd * (x_dot - x * (rstd * rstd * tl.sum(x * x_dot) / C)) * weight
            tl.store(y_dot_ptr + row * C + c, y_dot, mask=inside)


@triton.jit
def _bwd(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, dy_b, dy_n, x_b, x_n, N, C, rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows of the B N; dweight leaves as partial sums [chunks, C], added in a fixed order afterwards
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    weight = tl.load(weight_ptr + c, mask=inside, other=0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    begin, end = chunk * ROWS, min(chunk * ROWS + ROWS, rows)
    next_dy = tl.load(dy_ptr + begin // N * dy_b + begin % N * dy_n + c, mask=inside, other=0)
    next_x = tl.load(x_ptr + begin // N * x_b + begin % N * x_n + c, mask=inside, other=0)
    next_rstd = tl.load(rstd_ptr + begin)
    for row in range(begin, end):
        # the next row is on its way while this one's sum is waited for
        dy, x, rstd = next_dy.to(tl.float32), next_x.to(tl.float32), next_rstd
        sample, token, more = (row + 1) // N, (row + 1) % N, row + 1 < end
        next_dy = tl.load(dy_ptr + sample * dy_b + token * dy_n + c, mask=inside & more, other=0)
        next_x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=inside & more, other=0)
        next_rstd = tl.load(rstd_ptr + row + 1, mask=more)
        g = dy * weight
        tl.store(dx_ptr + row * C + c, rstd * (g - x * (rstd * rstd * tl.sum(x * g) / C)), mask=inside)
        dweight += dy * x * rstd
    tl.store(dweight_ptr + chunk * C + c, dweight, mask=inside)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (x, weight, eps), (x_dot,) = values, dots
    B, N, C = x.shape
    y, y_dot, rstd = empty(x, B, N, C), empty(x, b, N, C), empty(x, B, N, dtype=torch.float32)
    _fwd[(B * N,)](
        x, weight, x_dot, y, y_dot, rstd, *strides(x, 2), *strides(x_dot, 2), N, C, b, eps, x_dot is not None,
        **rows("rmsnorm._fwd", x),
    )  # fmt: skip
    return (y,), (y_dot,), (x, weight, rstd)


def backward(saved: Sequence[Any], dy: Tensor) -> Any:
    x, weight, rstd = saved
    B, N, C = x.shape
    constants = rows("rmsnorm._bwd", x, ROWS=16)  # tokens over which a program sums dweight
    chunks = cdiv(B * N, constants["ROWS"])
    dx, dweight = empty(x, B, N, C), empty(x, chunks, C, dtype=torch.float32)
    _bwd[(chunks,)](
        dy, x, weight, rstd, dx, dweight, *strides(dy, 2), *strides(x, 2), N, C, B * N, **constants
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


def accepts(x: Tensor, weight: Tensor, eps: float = 1e-5) -> None:
    if x.ndim != 3 or x.shape[2] > 16384:
        raise ValueError(f"rmsnorm: x is {tuple(x.shape)}; expected [B, N, C] with C at most 16384")
    check("rmsnorm", x, x=(x, tuple(x.shape)), weight=(weight, (x.shape[2],)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | float]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    x, eps = 2 * normal(s["B"], s["N"], s["C"]), s["tenth_eps"] / 10 if "tenth_eps" in s else 1e-5
    return dict(x=x, weight=1 + 0.2 * normal(s["C"]), eps=eps)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((4 * s["B"] + 7 * case.b) * n, itemsize * (2 * (s["B"] + case.b) * n + s["C"]))


fused = function("rmsnorm", forward, backward, ("x",))
CASES = [
    Case("small", dict(B=3, N=5, C=8), ("x",)),
    Case("ragged", dict(B=3, N=1, C=37, b=2, tenth_eps=3), ("x",)),
    Case("chunks", dict(B=2, N=19, C=8, b=1), ("x",)),  # more than 16 tokens
    Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x",), frozenset({"bench"})),
]
rmsnorm = Op("rmsnorm", reference, inputs, cost, accepts, CASES, batched=("x",), triton=fused)
