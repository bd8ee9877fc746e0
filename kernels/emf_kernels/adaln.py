"""Layer norm without affine, modulated per sample (adaLN).

Shapes:   x [B, N, C]; scale, shift [B, C]; y [B, N, C]. Statistics over C.
Primal:   n = (x - mean) rstd;  y = n (1 + scale) + shift
Tangent:  n_dot = rstd (x_dot - mean(x_dot) - n mean(n x_dot));  y_dot = n_dot (1 + scale) + n scale_dot + shift_dot
Backward: g = dy (1 + scale);  dx = rstd (g - mean(g) - n mean(n g))
          dscale = sum over tokens of dy n;  dshift = sum over tokens of dy
Source:   DiT (arXiv 2212.09748); SANA's norm1, norm2 and norm_out (eps 1e-6).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch
from .dual import Dual, check, halves, leading
from .op import Case, Cost, Op, forward_mode, strides


def reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    n = torch.nn.functional.layer_norm(x, x.shape[-1:], None, None, eps)
    return torch.addcmul(shift.unsqueeze(1), n, 1 + scale.unsqueeze(1))


@triton.jit
def norm(x, inside, C, eps):
    """(n, mean, rstd) of a row."""
    mean = tl.sum(x) / C
    centred = tl.where(inside, x - mean, 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred) / C + eps)
    return centred * rstd, mean, rstd


@triton.jit
def norm_dot(x_dot, n, rstd, C):
    """n_dot. The same map takes g = dn to dx: the normalisation's derivative is symmetric."""
    return rstd * (x_dot - tl.sum(x_dot) / C - n * (tl.sum(n * x_dot) / C))


@triton.jit
def _fwd(
    x_ptr, scale_ptr, shift_ptr, x_dot_ptr, scale_dot_ptr, shift_dot_ptr, y_ptr, y_dot_ptr, mean_ptr, rstd_ptr,
    x_b, x_n, scale_b, shift_b, x_dot_b, x_dot_n, scale_dot_b, shift_dot_b, N, C, b, eps,
    X_LIVE: tl.constexpr, SCALE_LIVE: tl.constexpr, SHIFT_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // N, row % N
    c = tl.arange(0, BLOCK)
    inside = c < C
    x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_b + c, mask=inside, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_b + c, mask=inside, other=0).to(tl.float32)
    n, mean, rstd = norm(x, inside, C, eps)
    tl.store(y_ptr + row * C + c, n * (1 + scale) + shift, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    if sample < b:  # one branch a program: the other samples do no tangent work
        y_dot = tl.zeros([BLOCK], tl.float32)
        if X_LIVE:
            x_dot = tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=inside, other=0).to(tl.float32)
            y_dot += norm_dot(x_dot, n, rstd, C) * (1 + scale)
        if SCALE_LIVE:
            y_dot += n * tl.load(scale_dot_ptr + sample * scale_dot_b + c, mask=inside, other=0).to(tl.float32)
        if SHIFT_LIVE:
            y_dot += tl.load(shift_dot_ptr + sample * shift_dot_b + c, mask=inside, other=0).to(tl.float32)
        tl.store(y_dot_ptr + row * C + c, y_dot, mask=inside)


@triton.jit
def _bwd(
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dscale_ptr, dshift_ptr,
    dy_b, dy_n, x_b, x_n, scale_b, N, C, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: ROWS tokens of one sample; dscale and dshift leave as partial sums [B, chunks, C], which are added
    # in a fixed order afterwards (no atomics: the gradient is the same every time)
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    scale = tl.load(scale_ptr + sample * scale_b + c, mask=inside, other=0).to(tl.float32)
    dscale, dshift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for token in range(chunk * ROWS, min(chunk * ROWS + ROWS, N)):
        row = sample * N + token
        dy = tl.load(dy_ptr + sample * dy_b + token * dy_n + c, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=inside, other=0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        n = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0)
        tl.store(dx_ptr + row * C + c, norm_dot(dy * (1 + scale), n, rstd, C), mask=inside)
        dscale += dy * n
        dshift += dy
    part = (sample * tl.num_programs(0) + chunk) * C + c
    tl.store(dscale_ptr + part, dscale, mask=inside)
    tl.store(dshift_ptr + part, dshift, mask=inside)


def config(kernel: str, x: Tensor, **free: int) -> dict[str, int]:
    """Of a kernel with a row of x in one block. free: further parameters, at their defaults."""
    block = triton.next_power_of_2(x.shape[-1])
    default = free | dict(num_warps=min(max(block // 512, 1), 8))
    return dict(BLOCK=block) | launch.configuration(kernel, x, default, C=block)


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        x_dot: Any,
        scale_dot: Any,
        shift_dot: Any,
        eps: float,
        b: int,
    ) -> Any:
        B, N, C = x.shape
        y, y_dot = (torch.empty(samples, N, C, dtype=x.dtype, device=x.device) for samples in (B, b))
        mean, rstd = (torch.empty(B, N, dtype=torch.float32, device=x.device) for _ in range(2))
        _fwd[(B * N,)](
            x, scale, shift, x_dot, scale_dot, shift_dot, y, y_dot, mean, rstd,
            *strides(x, 2), *strides(scale, 1), *strides(shift, 1),
            *strides(x_dot, 2), *strides(scale_dot, 1), *strides(shift_dot, 1), N, C, b, eps,
            x_dot is not None, scale_dot is not None, shift_dot is not None, **config("adaln._fwd", x),
        )  # fmt: skip
        return y, y_dot, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (x, scale, shift, *dots, eps, _), (_, *constants) = inputs, output
        ctx.save_for_backward(x, scale, *constants[1:])
        ctx.save_for_forward(x, scale, shift)
        ctx.dual, ctx.eps = any(d is not None for d in dots), eps
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)  # no zeros for the tangent's gradient, which there never is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, scale, mean, rstd = ctx.saved_tensors
        B, N, C = x.shape
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = torch.empty(B, N, C, dtype=x.dtype, device=x.device)
        constants = config("adaln._bwd", x, ROWS=16)  # tokens over which a program sums dscale and dshift
        chunks = triton.cdiv(N, constants["ROWS"])
        dscale, dshift = (torch.empty(B, chunks, C, dtype=torch.float32, device=x.device) for _ in range(2))
        _bwd[(chunks, B)](
            dy, x, scale, mean, rstd, dx, dscale, dshift,
            dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride(0), N, C,
            **constants,
        )  # fmt: skip
        return dx, dscale.sum(1).to(x.dtype), dshift.sum(1).to(x.dtype), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Any:
        return *forward_mode(ctx, fused, (*ctx.saved_tensors, ctx.eps), dots[:3]), None, None, None


def accepts(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> None:
    if x.ndim != 3 or x.shape[2] > 16384:
        raise ValueError(f"adaln: x is {tuple(x.shape)}; expected [B, N, C] with C at most 16384")
    B, N, C = x.shape
    check("adaln", x, x=(x, (B, N, C)), scale=(scale, (B, C)), shift=(shift, (B, C)))


def fused(x: Tensor | Dual, scale: Tensor | Dual, shift: Tensor | Dual, eps: float = 1e-6) -> Tensor | Dual:
    """adaln of Tensors, or of Duals in any of the three places: one launch for value and tangent. Shapes as above;
    float16, bfloat16 (on a GPU) or float32, the same for all; statistics in float32; last dimension contiguous, C at
    most 16384; else ValueError."""
    duals = [a for a in (x, scale, shift) if isinstance(a, Dual)]
    b = leading(duals, "adaln")
    (x_, x_dot), (scale_, scale_dot), (shift_, shift_dot) = halves(x), halves(scale), halves(shift)
    y, y_dot, *_ = _AdaLN.apply(x_, scale_, shift_, x_dot, scale_dot, shift_dot, eps, b)
    return Dual(y, y_dot) if duals else y


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    x = 2 * normal(s["B"], s["N"], s["C"]) + 0.5
    return dict(x=x, scale=0.5 * normal(s["B"], s["C"]), shift=normal(s["B"], s["C"]))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((8 * s["B"] + 14 * case.b) * n, itemsize * (s["B"] + case.b) * (2 * n + 2 * s["C"]))


adaln = Op(
    "adaln",
    reference,
    inputs=inputs,
    cost=cost,
    accepts=accepts,
    batched=("x", "scale", "shift"),
    triton=fused,
    cases=[
        Case("small", dict(B=3, N=5, C=8), ("x", "scale", "shift")),
        Case("odd", dict(B=2, N=3, C=37, b=1), ("x", "scale", "shift")),
        Case("chunks", dict(B=2, N=19, C=8, b=1), ("x", "scale", "shift")),  # more than 16 tokens
        Case("one-token", dict(B=1, N=1, C=16), ("x", "scale", "shift")),
        Case("x-only", dict(B=3, N=4, C=12, b=2), ("x",)),
        Case("modulation-only", dict(B=3, N=4, C=12), ("scale", "shift")),
        Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x", "scale", "shift"), frozenset({"bench"})),
    ],
)
