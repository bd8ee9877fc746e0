"""The core of SANA's GLUMBConv: SiLU, depthwise 3x3 convolution, gated linear unit, in channels-last layout.

Shapes:   x [B, H, W, 2 F]; weight [2 F, 1, 3, 3]; bias [2 F]; y [B, H, W, F]. Zero padding of 1 after the activation.
Primal:   c = conv(silu(x)) + bias;  a, g = halves of c along channels;  y = a silu(g)
Tangent:  c_dot = conv(silu'(x) x_dot);  y_dot = a_dot silu(g) + a silu'(g) g_dot
Backward: da = dy silu(g), dg = dy a silu'(g);  dx = silu'(x) conv^T(dc);  dweight, dbias = correlations of dc with
          silu(x), sums of dc
Source:   SANA's Mix-FFN (arXiv 2410.10629); the only place where position enters the network.

A program walks down a strip of rows. What an input row gives to the output rows above, at and below it is added up on
the way, so a row of x is read once a strip (three times along W, from cache) and silu(x), c stay in registers. Backward
computes c again from x; only dc goes through memory, between its two launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import conv2d

from emf_kernels import launch
from emf_kernels.dual import Dual, check
from emf_kernels.function import function
from emf_kernels.op import Case, Cost, Op
from emf_kernels.tiles import cdiv, empty, next_power_of_2, strides

from .silu import reference as silu


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    a, g = _conv(silu(x), weight, bias).chunk(2, dim=-1)
    return a * silu(g)


def _conv(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv2d(h.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1)


def dual(x: Dual, weight: Tensor, bias: Tensor) -> Dual:
    # lift(reference) is right, but forward-mode AD convolves with zero tangents of the weight too (profiles/LOG.md)
    (x_, x_dot), along = x, torch.ops.aten.silu_backward  # along(d, x) = silu'(x) d
    a, g = _conv(silu(x_), weight, bias).chunk(2, dim=-1)
    with torch.no_grad():
        b = len(x_dot)
        a_dot, g_dot = _conv(along(x_dot, x_[:b]), weight, None).chunk(2, dim=-1)
        y_dot = a_dot * silu(g[:b]) + along(a[:b] * g_dot, g[:b])
    return Dual(a * silu(g), y_dot)


@triton.jit
def _row(
    above, here, above_dot, here_dot, x_ptr, x_dot_ptr, taps_ptr, x_h, x_w, x_dot_h, x_dot_w,
    h, w, c, c_inside, H, W, C, LIVE: tl.constexpr,
):  # fmt: skip
    """Adds what input row h gives to the output rows h - 1 (which is complete then), h and h + 1."""
    below, below_dot = tl.zeros_like(above), tl.zeros_like(above)
    for j in tl.static_range(3):
        at = w + j - 1
        inside = ((at >= 0) & (at < W) & (h >= 0) & (h < H))[:, None] & c_inside[None, :]
        x = tl.load(x_ptr + h * x_h + at[:, None] * x_w + c[None, :], mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(x)
        s = x * sigmoid
        w0 = tl.load(taps_ptr + j * C + c, mask=c_inside, other=0).to(tl.float32)[None, :]
        w1 = tl.load(taps_ptr + (3 + j) * C + c, mask=c_inside, other=0).to(tl.float32)[None, :]
        w2 = tl.load(taps_ptr + (6 + j) * C + c, mask=c_inside, other=0).to(tl.float32)[None, :]
        below += w0 * s
        here += w1 * s
        above += w2 * s
        if LIVE:
            x_dot = tl.load(x_dot_ptr + h * x_dot_h + at[:, None] * x_dot_w + c[None, :], mask=inside, other=0)
            s_dot = (sigmoid + s * (1 - sigmoid)) * x_dot.to(tl.float32)
            below_dot += w0 * s_dot
            here_dot += w1 * s_dot
            above_dot += w2 * s_dot
    return above, here, below, above_dot, here_dot, below_dot


@triton.jit
def _fwd(
    x_ptr, taps_ptr, bias_ptr, x_dot_ptr, y_ptr, y_dot_ptr, x_b, x_h, x_w, x_dot_b, x_dot_h, x_dot_w,
    first, H, W, F, strips, LIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows, BLOCK_W columns, BLOCK_C channels of each half; a_ and g_: the halves of c
    sample = first + tl.program_id(2).to(tl.int64)
    top = tl.program_id(0) % strips * ROWS
    w = tl.program_id(0) // strips * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < F
    a_above, a_here, g_above, g_here = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * 4
    a_above_dot, a_here_dot, g_above_dot, g_here_dot = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * 4
    x_ptr += sample * x_b
    x_dot_ptr += sample * x_dot_b
    for h in range(top - 1, min(top + ROWS, H) + 1):
        g, g_above, g_here, g_dot, g_above_dot, g_here_dot = _row(
            g_above, g_here, g_above_dot, g_here_dot, x_ptr + F, x_dot_ptr + F, taps_ptr + F,
            x_h, x_w, x_dot_h, x_dot_w, h, w, c, c_inside, H, W, 2 * F, LIVE,
        )  # fmt: skip
        a, a_above, a_here, a_dot, a_above_dot, a_here_dot = _row(
            a_above, a_here, a_above_dot, a_here_dot, x_ptr, x_dot_ptr, taps_ptr,
            x_h, x_w, x_dot_h, x_dot_w, h, w, c, c_inside, H, W, 2 * F, LIVE,
        )  # fmt: skip
        a += tl.load(bias_ptr + c, mask=c_inside, other=0).to(tl.float32)[None, :]
        g += tl.load(bias_ptr + F + c, mask=c_inside, other=0).to(tl.float32)[None, :]
        sigmoid = tl.sigmoid(g)
        inside = ((w < W) & (h > top))[:, None] & c_inside[None, :]
        at = ((sample * H + h - 1) * W + w[:, None]) * F + c[None, :]
        tl.store(y_ptr + at, a * g * sigmoid, mask=inside)
        if LIVE:
            slope = sigmoid + g * sigmoid * (1 - sigmoid)
            tl.store(y_dot_ptr + at, a_dot * g * sigmoid + a * slope * g_dot, mask=inside)


@triton.jit
def _bwd_gate(
    dy_ptr, x_ptr, taps_ptr, bias_ptr, dc_ptr, dbias_ptr, dy_b, dy_h, dy_w, x_b, x_h, x_w,
    H, W, F, strips, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dc from dy, with c computed again; dbias leaves as partial sums [B, strips x columns, 2 F]
    sample = tl.program_id(2).to(tl.int64)
    top = tl.program_id(0) % strips * ROWS
    w = tl.program_id(0) // strips * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < F
    a_above, a_here, g_above, g_here = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * 4
    da_sum, dg_sum = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    x_ptr += sample * x_b
    for h in range(top - 1, min(top + ROWS, H) + 1):
        g, g_above, g_here, _, _, _ = _row(
            g_above, g_here, g_above, g_here, x_ptr + F, x_ptr, taps_ptr + F, x_h, x_w, x_h, x_w,
            h, w, c, c_inside, H, W, 2 * F, False,
        )  # fmt: skip
        a, a_above, a_here, _, _, _ = _row(
            a_above, a_here, a_above, a_here, x_ptr, x_ptr, taps_ptr, x_h, x_w, x_h, x_w,
            h, w, c, c_inside, H, W, 2 * F, False,
        )  # fmt: skip
        a += tl.load(bias_ptr + c, mask=c_inside, other=0).to(tl.float32)[None, :]
        g += tl.load(bias_ptr + F + c, mask=c_inside, other=0).to(tl.float32)[None, :]
        sigmoid = tl.sigmoid(g)
        inside = ((w < W) & (h > top))[:, None] & c_inside[None, :]
        dy_at = dy_ptr + sample * dy_b + (h - 1) * dy_h + w[:, None] * dy_w + c[None, :]
        dy = tl.load(dy_at, mask=inside, other=0).to(tl.float32)
        da, dg = dy * g * sigmoid, dy * a * (sigmoid + g * sigmoid * (1 - sigmoid))
        at = ((sample * H + h - 1) * W + w[:, None]) * 2 * F + c[None, :]
        tl.store(dc_ptr + at, da, mask=inside)
        tl.store(dc_ptr + at + F, dg, mask=inside)
        da_sum += tl.sum(da, 0)
        dg_sum += tl.sum(dg, 0)
    part = (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * F + c
    tl.store(dbias_ptr + part, da_sum, mask=c_inside)
    tl.store(dbias_ptr + part + F, dg_sum, mask=c_inside)


@triton.jit
def _silu_row(x_ptr, x_h, x_w, h, w, c, inside):
    x = tl.load(x_ptr + h * x_h + w[:, None] * x_w + c[None, :], mask=inside, other=0).to(tl.float32)
    return x * tl.sigmoid(x)


@triton.jit
def _bwd_conv(
    dc_ptr, x_ptr, taps_ptr, dx_ptr, dweight_ptr, x_b, x_h, x_w, H, W, C, strips,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dx and dweight from dc, for C = 2 F channels alike; dweight leaves as partial sums [B, strips x columns, 9, C].
    # Here h walks over the rows of dc; row h of dc meets the rows h - 1, h, h + 1 of silu(x), in taps 0, 1, 2.
    sample = tl.program_id(2).to(tl.int64)
    top = tl.program_id(0) % strips * ROWS
    bottom = min(top + ROWS, H)
    w = tl.program_id(0) // strips * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside, tap = c < C, tl.arange(0, 16)[:, None]
    columns = (w < W)[:, None] & c_inside[None, :]
    x_ptr += sample * x_b
    dc_ptr += sample * H * W * C
    ds_above, ds_here = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * 2
    s_above, s_here = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * 2  # zero outside the strip: each row counts once
    dweight = tl.zeros([16, BLOCK_C], tl.float32)
    for h in range(top - 1, bottom + 1):
        s_below = _silu_row(x_ptr, x_h, x_w, h + 1, w, c, columns & (h + 1 >= top) & (h + 1 < bottom))
        ds0, ds1, ds2 = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * 3
        for j in tl.static_range(3):
            at = w - j + 1
            inside = ((at >= 0) & (at < W) & (h >= 0) & (h < H))[:, None] & c_inside[None, :]
            dc = tl.load(dc_ptr + (h * W + at[:, None]) * C + c[None, :], mask=inside, other=0).to(tl.float32)
            ds0 += tl.load(taps_ptr + j * C + c, mask=c_inside, other=0).to(tl.float32)[None, :] * dc
            ds1 += tl.load(taps_ptr + (3 + j) * C + c, mask=c_inside, other=0).to(tl.float32)[None, :] * dc
            ds2 += tl.load(taps_ptr + (6 + j) * C + c, mask=c_inside, other=0).to(tl.float32)[None, :] * dc
            dweight += tl.where(tap == j, tl.sum(s_above * dc, 0)[None, :], 0)
            dweight += tl.where(tap == 3 + j, tl.sum(s_here * dc, 0)[None, :], 0)
            dweight += tl.where(tap == 6 + j, tl.sum(s_below * dc, 0)[None, :], 0)
        inside = columns & (h > top)
        x = tl.load(x_ptr + (h - 1) * x_h + w[:, None] * x_w + c[None, :], mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(x)
        dx = (ds_above + ds0) * (sigmoid + x * sigmoid * (1 - sigmoid))
        tl.store(dx_ptr + ((sample * H + h - 1) * W + w[:, None]) * C + c[None, :], dx, mask=inside)
        ds_above, ds_here = ds_here + ds1, ds2
        s_above, s_here = s_here, s_below
    part = (sample * tl.num_programs(0) + tl.program_id(0)) * 9 + tap
    tl.store(dweight_ptr + part * C + c[None, :], dweight, mask=c_inside[None, :] & (tap < 9))


def config(kernel: str, x: Tensor) -> dict[str, int]:
    """Rows of a strip, columns and channels of a tile, and warps. The default has 8 channels a thread."""
    H, W, F = (next_power_of_2(n) for n in (x.shape[1], x.shape[2], x.shape[3] // 2))
    default = dict(ROWS=min(16, max(1, H // 2)), BLOCK_W=min(8, max(1, W // 2)), BLOCK_C=min(64, F), num_warps=2)
    return launch.configuration(kernel, x, default, H=min(H, 64), W=min(W, 64), F=F)


def taps(weight: Tensor) -> Tensor:
    """[9, 2 F]: the weight turned, so that neighbouring channels are neighbours in memory (18 F elements, copied)."""
    return weight.reshape(-1, 9).t().contiguous()


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (x, weight, bias), (x_dot,) = values, dots
    (B, H, W, _), F = x.shape, x.shape[3] // 2
    y, y_dot = empty(x, B, H, W, F), empty(x, b, H, W, F)
    constants = config("glumbconv._fwd", x)
    strips, blocks = cdiv(H, constants["ROWS"]), cdiv(W, constants["BLOCK_W"])
    nine = taps(weight)
    # the first b samples with their tangents, then the rest without
    for first, count, live in ((0, b, True), (b, B - b, False)):
        if count:
            _fwd[(strips * blocks, cdiv(F, constants["BLOCK_C"]), count)](
                x, nine, bias, x_dot if live else x, y, y_dot if live else y, *strides(x, 3),
                *strides(x_dot, 3), first, H, W, F, strips, live, **constants,
            )  # fmt: skip
    return (y,), (y_dot,), (x, weight, bias)


def backward(saved: Sequence[Any], dy: Tensor) -> Any:
    x, weight, bias = saved
    (B, H, W, _), F = x.shape, x.shape[3] // 2
    nine = taps(weight)
    dc, dx = (empty(x, B, H, W, 2 * F) for _ in range(2))
    constants = config("glumbconv._bwd_gate", x)
    strips, blocks = cdiv(H, constants["ROWS"]), cdiv(W, constants["BLOCK_W"])
    dbias = empty(x, B, strips * blocks, 2 * F, dtype=torch.float32)
    _bwd_gate[(strips * blocks, cdiv(F, constants["BLOCK_C"]), B)](
        dy, x, nine, bias, dc, dbias, *strides(dy, 3), *strides(x, 3), H, W, F, strips, **constants
    )
    constants = config("glumbconv._bwd_conv", x)
    strips, blocks = cdiv(H, constants["ROWS"]), cdiv(W, constants["BLOCK_W"])
    dweight = empty(x, B, strips * blocks, 9, 2 * F, dtype=torch.float32)
    _bwd_conv[(strips * blocks, cdiv(2 * F, constants["BLOCK_C"]), B)](
        dc, x, nine, dx, dweight, *strides(x, 3), H, W, 2 * F, strips, **constants
    )  # fmt: skip
    dweight = dweight.sum((0, 1)).t().reshape(weight.shape).to(weight.dtype)
    return dx, dweight, dbias.sum((0, 1)).to(bias.dtype)


def accepts(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"glumbconv: x is {tuple(x.shape)}; expected [B, H, W, 2 F]")
    C = x.shape[3]
    check("glumbconv", x, x=(x, tuple(x.shape)), weight=(weight, (C, 1, 3, 3)), bias=(bias, (C,)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    f = 2 * s["F"]
    return dict(x=normal(s["B"], s["H"], s["W"], f), weight=normal(f, 1, 3, 3) / 3, bias=0.1 * normal(f))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["H"] * s["W"] * 2 * s["F"]
    return Cost((s["B"] * 28 + case.b * 38) * n, itemsize * (s["B"] + case.b) * n * 1.5 + itemsize * 20 * s["F"])


glumbconv = Op(
    "glumbconv",
    reference,
    dual=dual,
    inputs=inputs,
    cost=cost,
    accepts=accepts,
    batched=("x",),
    triton=function("glumbconv", forward, backward, ("x",)),
    cases=[
        Case("small", dict(B=1, H=3, W=3, F=3), ("x",)),
        Case("ragged", dict(B=2, H=2, W=1, F=4, b=1), ("x",)),
        Case("channels", dict(B=1, H=1, W=1, F=70), ("x",)),  # more than one block of them
        Case("sana-1.6b", dict(B=4, H=32, W=32, F=5600), ("x",), frozenset({"bench"})),
    ],
)
