"""Residual sum with a per-sample gate.

Shapes:   x, h [B, N, C], or [B, C] without a gate; gate [B, C] or None (then 1); y like x.
Primal:   y = x + gate h
Tangent:  y_dot = x_dot + gate_dot h + gate h_dot
Backward: dx = dy;  dh = gate dy;  dgate = sum over tokens of h dy
Source:   adaLN-zero gates (arXiv 2212.09748); gate None is SANA's ungated residual around cross-attention, and the
          sum of the two time branches.
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


def reference(x: Tensor, gate: Tensor | None, h: Tensor) -> Tensor:
    return x + h if gate is None else torch.addcmul(x, gate.unsqueeze(1), h)


@triton.jit
def _fwd(
    x_ptr, gate_ptr, h_ptr, x_dot_ptr, gate_dot_ptr, h_dot_ptr, y_ptr, y_dot_ptr,
    x_b, x_n, gate_b, h_b, h_n, x_dot_b, x_dot_n, gate_dot_b, h_dot_b, h_dot_n, N, C, b,
    GATED: tl.constexpr, X_LIVE: tl.constexpr, GATE_LIVE: tl.constexpr, H_LIVE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: ROWS tokens of one sample, BLOCK channels
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, at = (token < N) & (c < C), (sample * N + token) * C + c
    x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=inside, other=0).to(tl.float32)
    h = tl.load(h_ptr + sample * h_b + token * h_n + c, mask=inside, other=0).to(tl.float32)
    gate = tl.full([1, BLOCK], 1.0, tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + sample * gate_b + c, mask=c < C, other=0).to(tl.float32)
    tl.store(y_ptr + at, x + gate * h, mask=inside)
    if sample < b:
        y_dot = tl.zeros([ROWS, BLOCK], tl.float32)
        if X_LIVE:
            y_dot += tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=inside, other=0).to(tl.float32)
        if GATE_LIVE:
            y_dot += tl.load(gate_dot_ptr + sample * gate_dot_b + c, mask=c < C, other=0).to(tl.float32) * h
        if H_LIVE:
            h_dot = tl.load(h_dot_ptr + sample * h_dot_b + token * h_dot_n + c, mask=inside, other=0).to(tl.float32)
            y_dot += gate * h_dot
        tl.store(y_dot_ptr + at, y_dot, mask=inside)


@triton.jit
def _bwd(
    dy_ptr, gate_ptr, h_ptr, dh_ptr, dgate_ptr, dy_b, dy_n, gate_b, h_b, h_n, N, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dgate leaves as partial sums [B, chunks, C], added in a fixed order afterwards
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < N) & (c < C)[None, :]
    dy = tl.load(dy_ptr + sample * dy_b + token * dy_n + c[None, :], mask=inside, other=0).to(tl.float32)
    h = tl.load(h_ptr + sample * h_b + token * h_n + c[None, :], mask=inside, other=0).to(tl.float32)
    gate = tl.load(gate_ptr + sample * gate_b + c, mask=c < C, other=0).to(tl.float32)
    tl.store(dh_ptr + (sample * N + token) * C + c[None, :], gate[None, :] * dy, mask=inside)
    dgate = tl.sum(dy * h, 0)
    tl.store(dgate_ptr + (sample * tl.num_programs(0) + tl.program_id(0)) * C + c, dgate, mask=c < C)


def config(kernel: str, x: Tensor) -> dict[str, int]:
    """Tokens and channels of a program, and warps."""
    block = triton.next_power_of_2(x.shape[-1])
    return launch.configuration(kernel, x, dict(ROWS=16, BLOCK=min(512, block), num_warps=4), C=block)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, gate: Tensor | None, h: Tensor, x_dot: Any, gate_dot: Any, h_dot: Any, b: int) -> Any:
        B, N, C = x.shape
        y, y_dot = (torch.empty(samples, N, C, dtype=x.dtype, device=x.device) for samples in (B, b))
        constants = config("gated_residual._fwd", x)
        _fwd[(triton.cdiv(N, constants["ROWS"]), triton.cdiv(C, constants["BLOCK"]), B)](
            x, gate, h, x_dot, gate_dot, h_dot, y, y_dot,
            *strides(x, 2), *strides(gate, 1), *strides(h, 2), *strides(x_dot, 2), *strides(gate_dot, 1),
            *strides(h_dot, 2), N, C, b,
            gate is not None, x_dot is not None, gate_dot is not None, h_dot is not None, **constants,
        )  # fmt: skip
        return y, y_dot

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, gate, h, *dots, _ = inputs
        if gate is not None:
            ctx.save_for_backward(gate, h)
        ctx.save_for_forward(x, gate, h)
        ctx.dual = any(d is not None for d in dots)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros for the tangent's gradient, which there never is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        if not ctx.saved_tensors:
            return dy, None, dy, None, None, None, None
        gate, h = ctx.saved_tensors
        (B, N, C), given = h.shape, dy
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        constants = config("gated_residual._bwd", h)
        chunks = triton.cdiv(N, constants["ROWS"])
        dh = torch.empty(B, N, C, dtype=h.dtype, device=h.device)
        dgate = torch.empty(B, chunks, C, dtype=torch.float32, device=h.device)
        _bwd[(chunks, triton.cdiv(C, constants["BLOCK"]), B)](
            dy, gate, h, dh, dgate, *strides(dy, 2), *strides(gate, 1), *strides(h, 2), N, C, **constants
        )
        return given, dgate.sum(1).to(gate.dtype), dh, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Any:
        return *forward_mode(ctx, fused, ctx.saved_tensors, dots[:3]), None


def accepts(x: Tensor, gate: Tensor | None, h: Tensor) -> None:
    if x.ndim != 3 and (x.ndim != 2 or gate is not None):
        raise ValueError(f"gated_residual: x is {tuple(x.shape)}; expected [B, N, C], or [B, C] without a gate")
    shape = tuple(x.shape)
    check("gated_residual", x, x=(x, shape), gate=(gate, (shape[0], shape[-1])), h=(h, shape))


def fused(x: Tensor | Dual, gate: Tensor | Dual | None, h: Tensor | Dual) -> Tensor | Dual:
    """gated_residual of Tensors, or of Duals in any of the three places: one launch for value and tangent. Shapes as
    above; float16, bfloat16 (on a GPU) or float32, the same for all; last dimension contiguous; else ValueError."""
    duals = [a for a in (x, gate, h) if isinstance(a, Dual)]
    b = leading(duals, "gated_residual")
    (x_, x_dot), (gate_, gate_dot), (h_, h_dot) = halves(x), halves(gate), halves(h)
    rest = x_.shape[1:]
    if x_.ndim == 2:
        x_, h_, x_dot, h_dot = (a if a is None else a.unsqueeze(1) for a in (x_, h_, x_dot, h_dot))
    y, y_dot = (a.view(-1, *rest) for a in _GatedResidual.apply(x_, gate_, h_, x_dot, gate_dot, h_dot, b))
    return Dual(y, y_dot) if duals else y


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | None]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    gate = None if s.get("ungated") else normal(s["B"], s["C"])
    shape = (s["B"], s["N"], s["C"]) if s.get("N") else (s["B"], s["C"])
    return dict(x=normal(*shape), gate=gate, h=normal(*shape))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s.get("N", 1) * s["C"]
    return Cost((2 * s["B"] + 4 * case.b) * n, 3 * (s["B"] + case.b) * n * itemsize)


gated_residual = Op(
    "gated_residual",
    reference,
    inputs=inputs,
    cost=cost,
    accepts=accepts,
    batched=("x", "gate", "h"),
    triton=fused,
    cases=[
        Case("small", dict(B=3, N=5, C=7), ("x", "gate", "h")),
        Case("ragged", dict(B=3, N=5, C=7, b=1), ("x", "gate", "h")),
        Case("ungated", dict(B=3, N=5, C=7, ungated=1), ("x", "h")),
        Case("tiles", dict(B=2, N=19, C=520, b=1), ("x", "gate", "h")),  # more than 16 tokens and a block of channels
        Case("vectors", dict(B=3, C=7, ungated=1, b=2), ("x", "h")),
        Case("gate-only", dict(B=2, N=3, C=5), ("gate",)),
        Case("branch", dict(B=3, N=5, C=7, b=2), ("h",)),
        Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x", "gate", "h"), frozenset({"bench"})),
    ],
)
