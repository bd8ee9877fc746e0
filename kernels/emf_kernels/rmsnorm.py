"""Root-mean-square norm with a weight, across all channels.

Shapes:   x [B, N, C]; weight [C]; y like x. Statistics over C (in SANA over all heads at once).
Primal:   rstd = (mean(x^2) + eps)^-1/2;  y = x rstd weight
Tangent:  y_dot = rstd (x_dot - x rstd^2 mean(x x_dot)) weight
Backward: g = dy weight;  dx = rstd (g - x rstd^2 mean(x g));  dweight = sum dy x rstd
Source:   RMSNorm (arXiv 1910.07467); diffusers' "rms_norm_across_heads" (eps 1e-5).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adaln import config
from .dual import Dual, check, halves
from .op import Case, Cost, Op, forward_mode, strides


def reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


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
    rstd = 1 / tl.sqrt(tl.sum(x * x) / C + eps)
    tl.store(y_ptr + row * C + c, x * rstd * weight, mask=inside)
    tl.store(rstd_ptr + row, rstd)
    if X_LIVE:  # noqa: SIM102
        if sample < b:
            x_dot = tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=inside, other=0).to(tl.float32)
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
    for row in range(chunk * ROWS, min(chunk * ROWS + ROWS, rows)):
        sample, token = row // N, row % N
        dy = tl.load(dy_ptr + sample * dy_b + token * dy_n + c, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=inside, other=0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        g = dy * weight
        tl.store(dx_ptr + row * C + c, rstd * (g - x * (rstd * rstd * tl.sum(x * g) / C)), mask=inside)
        dweight += dy * x * rstd
    tl.store(dweight_ptr + chunk * C + c, dweight, mask=inside)


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight) from dy, x [B, N, C], weight [C] and the saved rstd [B, N]."""
    B, N, C = x.shape
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    constants = config("rmsnorm._bwd", x, ROWS=32)  # tokens over which a program sums dweight
    dx, chunks = torch.empty(B, N, C, dtype=x.dtype, device=x.device), triton.cdiv(B * N, constants["ROWS"])
    dweight = torch.empty(chunks, C, dtype=torch.float32, device=x.device)
    _bwd[(chunks,)](
        dy, x, weight, rstd, dx, dweight, *strides(dy, 2), *strides(x, 2), N, C, B * N, **constants
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, x_dot: Tensor | None, eps: float, b: int) -> Any:
        B, N, C = x.shape
        y, y_dot = (torch.empty(samples, N, C, dtype=x.dtype, device=x.device) for samples in (B, b))
        rstd = torch.empty(B, N, dtype=torch.float32, device=x.device)
        _fwd[(B * N,)](
            x, weight, x_dot, y, y_dot, rstd, *strides(x, 2), *strides(x_dot, 2), N, C, b, eps, x_dot is not None,
            **config("rmsnorm._fwd", x),
        )  # fmt: skip
        return y, y_dot, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (x, weight, x_dot, eps, _), (_, y_dot, rstd) = inputs, output
        ctx.save_for_backward(x, weight, rstd)
        ctx.save_for_forward(x, weight)
        ctx.dual, ctx.eps = x_dot is not None, eps
        ctx.mark_non_differentiable(y_dot, rstd)
        ctx.set_materialize_grads(False)  # no zeros for the tangent's gradient, which there never is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        return *backward(dy, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Any:
        return *forward_mode(ctx, fused, (*ctx.saved_tensors, ctx.eps), dots[:2]), None, None


def accepts(x: Tensor, weight: Tensor, eps: float = 1e-5) -> None:
    if x.ndim != 3 or x.shape[2] > 16384:
        raise ValueError(f"rmsnorm: x is {tuple(x.shape)}; expected [B, N, C] with C at most 16384")
    check("rmsnorm", x, x=(x, tuple(x.shape)), weight=(weight, (x.shape[2],)))


def fused(x: Tensor | Dual, weight: Tensor, eps: float = 1e-5) -> Tensor | Dual:
    """rmsnorm of a Tensor or a Dual, one launch for value and tangent. Shapes as above; the weight takes no tangent;
    float16, bfloat16 (on a GPU) or float32, the same for both; statistics in float32; last dimension contiguous, C at
    most 16384; else ValueError."""
    x_, x_dot = halves(x)
    y, y_dot, _ = _RMSNorm.apply(x_, weight, x_dot, eps, 0 if x_dot is None else len(x_dot))
    return Dual(y, y_dot) if isinstance(x, Dual) else y


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
    accepts=accepts,
    batched=("x",),
    triton=fused,
    cases=[
        Case("small", dict(B=3, N=5, C=8), ("x",)),
        Case("ragged", dict(B=3, N=1, C=37, b=2), ("x",)),
        Case("chunks", dict(B=2, N=19, C=8, b=1), ("x",)),  # more than 32 tokens
        Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x",), frozenset({"bench"})),
    ],
)
