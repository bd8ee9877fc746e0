"""A gated residual and the adaLN that follows it, in one pass.

Shapes:   x, h [B, N, C]; gate [B, C] or None (then 1); scale, shift [B, C]; outputs y, n [B, N, C].
Primal:   y = x + gate h;  n = adaln(y, scale, shift)
Tangent:  y_dot = x_dot + gate_dot h + gate h_dot;  n_dot = adaln's tangent at (y, y_dot)
Backward: dx = dy + adaln's dx at dn;  dh = gate dx;  dgate = sum over tokens of h dx;  dscale, dshift as adaln's
Source:   in a SANA block, cross-attention's ungated residual is followed by norm2 with (shift, scale)_mlp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual import check
from ..function import function
from ..op import Case, Cost, Op
from ..tiles import cdiv, empty, norm, norm_dot, rows, strides
from .adaln import reference as adaln_reference
from .gated_residual import reference as gated_residual_reference


def reference(
    x: Tensor, gate: Tensor | None, h: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    y = gated_residual_reference(x, gate, h)
    return y, adaln_reference(y, scale, shift, eps)


@triton.jit
def _fwd(
    x_ptr, gate_ptr, h_ptr, scale_ptr, shift_ptr, x_dot_ptr, gate_dot_ptr, h_dot_ptr, scale_dot_ptr, shift_dot_ptr,
    y_ptr, n_ptr, y_dot_ptr, n_dot_ptr, mean_ptr, rstd_ptr,
    x_b, x_n, gate_b, h_b, h_n, scale_b, shift_b,
    x_dot_b, x_dot_n, gate_dot_b, h_dot_b, h_dot_n, scale_dot_b, shift_dot_b, N, C, b, eps,
    GATED: tl.constexpr, X_LIVE: tl.constexpr, GATE_LIVE: tl.constexpr, H_LIVE: tl.constexpr,
    SCALE_LIVE: tl.constexpr, SHIFT_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // N, row % N
    c = tl.arange(0, BLOCK)
    inside = c < C
    x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=inside, other=0).to(tl.float32)
    h = tl.load(h_ptr + sample * h_b + token * h_n + c, mask=inside, other=0).to(tl.float32)
    gate = tl.full([BLOCK], 1.0, tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + sample * gate_b + c, mask=inside, other=0).to(tl.float32)
    # n is of y as it is stored, which backward reads: a row of little variance is all rounding
    y = (x + gate * h).to(y_ptr.dtype.element_ty).to(tl.float32)
    # the tangent's rows are on their way while the primal's sums are waited for
    live, y_dot = inside & (sample < b), tl.zeros([BLOCK], tl.float32)
    if X_LIVE:
        y_dot += tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=live, other=0).to(tl.float32)
    if GATE_LIVE:
        y_dot += tl.load(gate_dot_ptr + sample * gate_dot_b + c, mask=live, other=0).to(tl.float32) * h
    if H_LIVE:
        h_dot = tl.load(h_dot_ptr + sample * h_dot_b + token * h_dot_n + c, mask=live, other=0).to(tl.float32)
        y_dot += gate * h_dot
    n, mean, rstd = norm(y, inside, C, eps)
    scale = tl.load(scale_ptr + sample * scale_b + c, mask=inside, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_b + c, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + row * C + c, y, mask=inside)
    tl.store(n_ptr + row * C + c, n * (1 + scale) + shift, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    if sample < b:
        n_dot = norm_dot(y_dot, n, rstd, C) * (1 + scale)
        if SCALE_LIVE:
            n_dot += n * tl.load(scale_dot_ptr + sample * scale_dot_b + c, mask=inside, other=0).to(tl.float32)
        if SHIFT_LIVE:
            n_dot += tl.load(shift_dot_ptr + sample * shift_dot_b + c, mask=inside, other=0).to(tl.float32)
        tl.store(y_dot_ptr + row * C + c, y_dot, mask=inside)
        tl.store(n_dot_ptr + row * C + c, n_dot, mask=inside)


@triton.jit
def _bwd(
    dy_ptr, dn_ptr, y_ptr, gate_ptr, h_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dh_ptr, dgate_ptr, dscale_ptr, dshift_ptr,
    dy_b, dy_n, dn_b, dn_n, gate_b, h_b, h_n, scale_b, N, C,
    GATED: tl.constexpr, Y_USED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: ROWS tokens of one sample; what is summed over tokens leaves as partial sums [B, chunks, C]
    chunk, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    scale = tl.load(scale_ptr + sample * scale_b + c, mask=inside, other=0).to(tl.float32)
    dgate, dscale, dshift = (
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )
    begin, end = chunk * ROWS, min(chunk * ROWS + ROWS, N)
    dn_ptr += sample * dn_b + c
    y_ptr += sample * N * C + c
    mean_ptr += sample * N
    rstd_ptr += sample * N
    next_dn, next_y = tl.load(dn_ptr + begin * dn_n, mask=inside, other=0), tl.load(y_ptr + begin * C, mask=inside)
    next_mean, next_rstd = tl.load(mean_ptr + begin), tl.load(rstd_ptr + begin)
    for token in range(begin, end):
        # the next row is on its way while this one's sums are waited for
        dn, y, mean, rstd = next_dn.to(tl.float32), next_y.to(tl.float32), next_mean, next_rstd
        more = token + 1 < end
        next_dn = tl.load(dn_ptr + (token + 1) * dn_n, mask=inside & more, other=0)
        next_y = tl.load(y_ptr + (token + 1) * C, mask=inside & more)
        next_mean = tl.load(mean_ptr + token + 1, mask=more)
        next_rstd = tl.load(rstd_ptr + token + 1, mask=more)
        row = sample * N + token
        n = tl.where(inside, (y - mean) * rstd, 0)
        dy = tl.zeros([BLOCK], tl.float32)
        if Y_USED:
            dy += tl.load(dy_ptr + sample * dy_b + token * dy_n + c, mask=inside, other=0).to(tl.float32)
        # as a product, a compiler makes one FMA of it and of its mean's subtraction: a row of one channel is left with
        # the product's rounding times rstd, where its gradient is 0
        dx = norm_dot(tl.fma(dn, scale, dn), n, rstd, C) + dy
        tl.store(dx_ptr + row * C + c, dx, mask=inside)
        if GATED:
            gate = tl.load(gate_ptr + sample * gate_b + c, mask=inside, other=0).to(tl.float32)
            tl.store(dh_ptr + row * C + c, gate * dx, mask=inside)
            dgate += dx * tl.load(h_ptr + sample * h_b + token * h_n + c, mask=inside, other=0).to(tl.float32)
        dscale += dn * n
        dshift += dn
    part = (sample * tl.num_programs(0) + chunk) * C + c
    if GATED:
        tl.store(dgate_ptr + part, dgate, mask=inside)
    tl.store(dscale_ptr + part, dscale, mask=inside)
    tl.store(dshift_ptr + part, dshift, mask=inside)


WIDTHS = (2, 1, 2, 1, 1)  # how many strides each of x, gate, h, scale, shift has


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    *values, eps = values
    x, gate, h, scale, _ = values
    B, N, C = x.shape
    (y, n), (y_dot, n_dot) = ([empty(x, samples, N, C) for _ in range(2)] for samples in (B, b))
    mean, rstd = (empty(x, B, N, dtype=torch.float32) for _ in range(2))
    _fwd[(B * N,)](
        *values, *dots, y, n, y_dot, n_dot, mean, rstd,
        *(s for a, w in zip((*values, *dots), WIDTHS * 2, strict=True) for s in strides(a, w)),
        N, C, b, eps, gate is not None, *(d is not None for d in dots), **rows("gated_residual_adaln._fwd", x),
    )  # fmt: skip
    return (y, n), (y_dot, n_dot), (y, gate, None if gate is None else h, scale, mean, rstd)


def backward(saved: Sequence[Any], dy: Tensor | None, dn: Tensor | None) -> Any:
    y, gate, h, scale, mean, rstd = saved
    B, N, C = y.shape
    dn = torch.zeros_like(y) if dn is None else dn
    constants, gated = rows("gated_residual_adaln._bwd", y, ROWS=16), gate is not None
    chunks, dx = cdiv(N, constants["ROWS"]), empty(y, B, N, C)
    dh = empty(y, B, N, C) if gated else dx
    dgate, dscale, dshift = (empty(y, B, chunks, C, dtype=torch.float32) for _ in range(3))
    _bwd[(chunks, B)](
        dy, dn, y, gate, h, scale, mean, rstd, dx, dh, dgate, dscale, dshift,
        *strides(dy, 2), *strides(dn, 2), *strides(gate, 1), *strides(h, 2), *strides(scale, 1), N, C,
        gated, dy is not None, **constants,
    )  # fmt: skip
    dscale, dshift = dscale.sum(1).to(y.dtype), dshift.sum(1).to(y.dtype)
    return dx, dgate.sum(1).to(y.dtype) if gated else None, dh, dscale, dshift


def accepts(x: Tensor, gate: Tensor | None, h: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> None:
    op = "gated_residual_adaln"
    if x.ndim != 3 or x.shape[2] > 16384:
        raise ValueError(f"{op}: x is {tuple(x.shape)}; expected [B, N, C] with C at most 16384")
    (B, N, C), vector = x.shape, (x.shape[0], x.shape[2])
    check(op, x, x=(x, (B, N, C)), gate=(gate, vector), h=(h, (B, N, C)), scale=(scale, vector), shift=(shift, vector))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    gate = None if s.get("ungated") else normal(s["B"], s["C"])
    x, h = normal(s["B"], s["N"], s["C"]), normal(s["B"], s["N"], s["C"])
    scale, shift = 0.5 * normal(s["B"], s["C"]), normal(s["B"], s["C"])
    eps = s["tenth_eps"] / 10 if "tenth_eps" in s else 1e-6
    return dict(x=x, gate=gate, h=h, scale=scale, shift=shift, eps=eps)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((10 * s["B"] + 18 * case.b) * n, itemsize * (s["B"] + case.b) * (4 * n + 3 * s["C"]))


ALL = ("x", "gate", "h", "scale", "shift")
fused = function("gated_residual_adaln", forward, backward, ALL)
CASES = [
    Case("small", dict(B=3, N=5, C=8), ALL),
    Case("ragged", dict(B=3, N=5, C=7, b=1, tenth_eps=3), ALL),
    Case("one-channel", dict(B=2, N=3, C=1), ALL),  # n is 0, whatever y was rounded to
    Case("ungated", dict(B=3, N=5, C=7, ungated=1, b=2), ("x", "h", "scale", "shift")),
    Case("chunks", dict(B=2, N=19, C=8, b=1), ALL),  # more than 16 tokens
    Case("modulation-only", dict(B=2, N=3, C=12), ("gate", "scale", "shift")),
    Case("sana-1.6b", dict(B=4, N=1024, C=2240, ungated=1), ("x", "h", "scale", "shift"), frozenset({"bench"})),
]
gated_residual_adaln = Op("gated_residual_adaln", reference, inputs, cost, accepts, CASES, batched=ALL, triton=fused)
