"""Residual sum with a per-sample gate.

Shapes:   x, h [B, N, C], or [B, C] without a gate; gate [B, C] or None (then 1); y like x.
Primal:   y = x + gate h
Tangent:  y_dot = x_dot + gate_dot h + gate h_dot
Backward: dx = dy;  dh = gate dy;  dgate = sum over tokens of h dy
Source:   adaLN-zero gates (arXiv 2212.09748); gate None is SANA's ungated residual around cross-attention, and the
          sum of the two time branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dual import check
from ..function import function
from ..op import Case, Cost, Op
from ..tiles import cdiv, empty, next_power_of_2, strides


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
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
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
    dy_ptr, gate_ptr, h_ptr, dx_ptr, dh_ptr, dgate_ptr, dy_b, dy_n, gate_b, h_b, h_n, N, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # dgate leaves as partial sums [B, chunks, C], added in a fixed order afterwards
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < N) & (c < C)[None, :]
    dy = tl.load(dy_ptr + sample * dy_b + token * dy_n + c[None, :], mask=inside, other=0).to(tl.float32)
    h = tl.load(h_ptr + sample * h_b + token * h_n + c[None, :], mask=inside, other=0).to(tl.float32)
    gate = tl.load(gate_ptr + sample * gate_b + c, mask=c < C, other=0).to(tl.float32)
    at = (sample * N + token) * C + c[None, :]
    tl.store(dx_ptr + at, dy, mask=inside)
    tl.store(dh_ptr + at, gate[None, :] * dy, mask=inside)
    dgate = tl.sum(dy * h, 0)
    tl.store(dgate_ptr + (sample * tl.num_programs(0) + tl.program_id(0)) * C + c, dgate, mask=c < C)


def config(kernel: str, x: Tensor) -> dict[str, int]:
    """Tokens and channels of a program, and warps."""
    block = next_power_of_2(x.shape[-1])
    return launch.configuration(kernel, x, dict(ROWS=16, BLOCK=min(512, block), num_warps=4), C=block)


def tokens(x: Tensor | None) -> tuple[int, int]:
    """The strides of samples and tokens; [B, C] is one token a sample."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1) if x.ndim == 3 else 0)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (x, gate, h), (x_dot, gate_dot, h_dot) = values, dots
    (B, *rest), C = x.shape, x.shape[-1]
    N = rest[0] if len(rest) == 2 else 1
    y, y_dot, constants = empty(x, B, *rest), empty(x, b, *rest), config("gated_residual._fwd", x)
    _fwd[(cdiv(N, constants["ROWS"]), cdiv(C, constants["BLOCK"]), B)](
        x, gate, h, x_dot, gate_dot, h_dot, y, y_dot, *tokens(x), *strides(gate, 1), *tokens(h),
        *tokens(x_dot), *strides(gate_dot, 1), *tokens(h_dot), N, C, b,
        gate is not None, x_dot is not None, gate_dot is not None, h_dot is not None, **constants,
    )  # fmt: skip
    return (y,), (y_dot,), (gate, None if gate is None else h)


def backward(saved: Sequence[Any], dy: Tensor) -> Any:
    gate, h = saved
    if gate is None:
        return dy.clone(), None, dy.clone()
    (B, N, C), constants = h.shape, config("gated_residual._bwd", h)
    chunks = cdiv(N, constants["ROWS"])
    dx, dh, dgate = empty(h, B, N, C), empty(h, B, N, C), empty(h, B, chunks, C, dtype=torch.float32)
    _bwd[(chunks, cdiv(C, constants["BLOCK"]), B)](
        dy, gate, h, dx, dh, dgate, *strides(dy, 2), *strides(gate, 1), *strides(h, 2), N, C, **constants
    )  # fmt: skip
    return dx, dgate.sum(1).to(gate.dtype), dh


def accepts(x: Tensor, gate: Tensor | None, h: Tensor) -> None:
    if x.ndim != 3 and (x.ndim != 2 or gate is not None):
        raise ValueError(f"gated_residual: x is {tuple(x.shape)}; expected [B, N, C], or [B, C] without a gate")
    shape = tuple(x.shape)
    check("gated_residual", x, x=(x, shape), gate=(gate, (shape[0], shape[-1])), h=(h, shape))


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


fused = function("gated_residual", forward, backward, ("x", "gate", "h"))
CASES = [
    Case("small", dict(B=3, N=5, C=7), ("x", "gate", "h")),
    Case("ragged", dict(B=3, N=5, C=7, b=1), ("x", "gate", "h")),
    Case("ungated", dict(B=3, N=5, C=7, ungated=1), ("x", "h")),
    Case("tiles", dict(B=2, N=19, C=520, b=1), ("x", "gate", "h")),  # more than 16 tokens and a block of channels
    Case("vectors", dict(B=3, C=7, ungated=1, b=2), ("x", "h")),
    Case("gate-only", dict(B=2, N=3, C=5), ("gate",)),
    Case("branch", dict(B=3, N=5, C=7, b=2), ("h",)),
    Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x", "gate", "h"), frozenset({"bench"})),
]
gated_residual = Op("gated_residual", reference, inputs, cost, accepts, CASES, batched=("x", "gate", "h"), triton=fused)
