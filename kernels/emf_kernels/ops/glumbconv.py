"""The core of SANA's GLUMBConv: SiLU, depthwise 3x3 convolution, gated linear unit, in channels-last layout.

Shapes:   x [B, H, W, 2 F]; weight [2 F, 1, 3, 3]; bias [2 F]; y [B, H, W, F]. Zero padding of 1 after the activation.
Primal:   c = conv(silu(x)) + bias;  a, g = halves of c along channels;  y = a silu(g)
Tangent:  c_dot = conv(silu'(x) x_dot);  y_dot = a_dot silu(g) + a silu'(g) g_dot
Backward: da = dy silu(g), dg = dy a silu'(g);  dx = silu'(x) conv^T(dc);  dweight, dbias = correlations of dc with
          silu(x), sums of dc
Source:   SANA's Mix-FFN (arXiv 2410.10629); the only place where position enters the network.

A program walks down a strip of rows, a few columns wide, with a channel's taps in registers. What an input row gives to
the output rows above, at and below it is added up on the way, so x is read once a strip (and a column more on either
side, from cache) and silu(x), c stay in registers. The columns are unrolled: tuples of one-dimensional tensors, whose
channels are the threads', so nothing goes through shared memory and no sum crosses a thread. Backward computes c again
from x; only dc goes through memory, between its two launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import conv2d

from .. import launch
from ..dual import Dual, check
from ..function import function
from ..op import Case, Cost, Op
from ..tiles import cdiv, empty, next_power_of_2, strides
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


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    # exp2 and rsqrt are one instruction each; the quotient that tl.sigmoid ends in is six
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def _columns(ptr, h, left, stride_h, stride_w, c, c_inside, H, W, COLUMNS: tl.constexpr):
    """Columns left, left + 1, ... of row h as they lie in memory: zeros outside the image."""
    columns = ()
    row = ptr + h * stride_h
    for q in tl.static_range(COLUMNS):
        w = left + q
        inside = c_inside & (w >= 0) & (w < W) & (h >= 0) & (h < H)
        columns = columns + (tl.load(row + w * stride_w + c, mask=inside, other=0),)
    return columns


@triton.jit
def _taps(taps_ptr, C, c, c_inside):
    taps = ()
    for k in tl.static_range(9):
        taps = taps + (tl.load(taps_ptr + k * C + c, mask=c_inside, other=0).to(tl.float32),)
    return taps


@triton.jit
def _spread(rows, taps, s, q: tl.constexpr, COLUMNS: tl.constexpr):
    """rows: sums of the output rows h - 1, h, h + 1, COLUMNS each; adds what the input (h, q - 1) gives to its nine."""
    sums = ()
    for k in tl.static_range(3):
        for o in tl.static_range(COLUMNS):
            if q - o >= 0 and q - o < 3:
                sums = sums + (rows[k * COLUMNS + o] + taps[6 - 3 * k + q - o] * s,)
            else:
                sums = sums + (rows[k * COLUMNS + o],)
    return sums


@triton.jit
def _meet(rows, rows_dot, taps, x, x_dot, COLUMNS: tl.constexpr, LIVE: tl.constexpr):
    """An input row, activated, spread over the sums of three output rows."""
    for q in tl.static_range(COLUMNS + 2):
        here = x[q].to(tl.float32)
        sigmoid = _sigmoid(here)
        s = here * sigmoid
        rows = _spread(rows, taps, s, q, COLUMNS)
        if LIVE:
            s_dot = (sigmoid + s * (1 - sigmoid)) * x_dot[q].to(tl.float32)
            rows_dot = _spread(rows_dot, taps, s_dot, q, COLUMNS)
    return rows, rows_dot


@triton.jit
def _down(rows, zero, COLUMNS: tl.constexpr):
    """The sums one row further: the first row is complete, a new one begins."""
    sums = ()
    for k in tl.static_range(2 * COLUMNS):
        sums = sums + (rows[COLUMNS + k],)
    return sums + (zero,) * COLUMNS


@triton.jit
def _fwd(
    x_ptr, taps_ptr, bias_ptr, x_dot_ptr, y_ptr, y_dot_ptr, x_b, x_h, x_w, x_dot_b, x_dot_h, x_dot_w,
    first, H, W, F, strips, LIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows, COLUMNS columns, BLOCK_C channels of each half; a_ and g_: the halves of c
    sample = first + tl.program_id(2).to(tl.int64)
    top = (tl.program_id(0) % strips * ROWS).to(tl.int64)
    left = (tl.program_id(0) // strips * COLUMNS).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < F
    a_taps, g_taps = _taps(taps_ptr, 2 * F, c, c_inside), _taps(taps_ptr + F, 2 * F, c, c_inside)
    a_bias = tl.load(bias_ptr + c, mask=c_inside, other=0).to(tl.float32)
    g_bias = tl.load(bias_ptr + F + c, mask=c_inside, other=0).to(tl.float32)
    zero = tl.zeros([BLOCK_C], tl.float32)
    a_rows, g_rows, a_rows_dot, g_rows_dot = ((zero,) * (3 * COLUMNS),) * 4
    x_ptr += sample * x_b
    next_a = _columns(x_ptr, top - 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
    next_g = _columns(x_ptr + F, top - 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
    next_a_dot, next_g_dot = next_a, next_g
    if LIVE:
        x_dot_ptr += sample * x_dot_b
        next_a_dot = _columns(x_dot_ptr, top - 1, left - 1, x_dot_h, x_dot_w, c, c_inside, H, W, COLUMNS + 2)
        next_g_dot = _columns(x_dot_ptr + F, top - 1, left - 1, x_dot_h, x_dot_w, c, c_inside, H, W, COLUMNS + 2)
    for h in range(top - 1, min(top + ROWS, H) + 1):
        # the next row is on its way while this one is computed with
        x_a, x_g, x_a_dot, x_g_dot = next_a, next_g, next_a_dot, next_g_dot
        next_a = _columns(x_ptr, h + 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
        next_g = _columns(x_ptr + F, h + 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
        if LIVE:
            next_a_dot = _columns(x_dot_ptr, h + 1, left - 1, x_dot_h, x_dot_w, c, c_inside, H, W, COLUMNS + 2)
            next_g_dot = _columns(x_dot_ptr + F, h + 1, left - 1, x_dot_h, x_dot_w, c, c_inside, H, W, COLUMNS + 2)
        a_rows, a_rows_dot = _meet(a_rows, a_rows_dot, a_taps, x_a, x_a_dot, COLUMNS, LIVE)
        g_rows, g_rows_dot = _meet(g_rows, g_rows_dot, g_taps, x_g, x_g_dot, COLUMNS, LIVE)
        if h > top:
            for o in tl.static_range(COLUMNS):
                a, g = a_rows[o] + a_bias, g_rows[o] + g_bias
                sigmoid = _sigmoid(g)
                s = g * sigmoid
                at = ((sample * H + h - 1) * W + left + o) * F + c
                inside = c_inside & (left + o < W)
                tl.store(y_ptr + at, a * s, mask=inside)
                if LIVE:
                    s_dot = (sigmoid + s * (1 - sigmoid)) * g_rows_dot[o]
                    tl.store(y_dot_ptr + at, a_rows_dot[o] * s + a * s_dot, mask=inside)
        a_rows, g_rows = _down(a_rows, zero, COLUMNS), _down(g_rows, zero, COLUMNS)
        if LIVE:
            a_rows_dot, g_rows_dot = _down(a_rows_dot, zero, COLUMNS), _down(g_rows_dot, zero, COLUMNS)


@triton.jit
def _bwd_gate(
    dy_ptr, x_ptr, taps_ptr, bias_ptr, dc_ptr, dbias_ptr, dy_b, dy_h, dy_w, x_b, x_h, x_w,
    H, W, F, strips, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dc from dy, with c computed again; dbias leaves as partial sums [B, strips x columns, 2 F]
    sample = tl.program_id(2).to(tl.int64)
    top = (tl.program_id(0) % strips * ROWS).to(tl.int64)
    left = (tl.program_id(0) // strips * COLUMNS).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < F
    a_taps, g_taps = _taps(taps_ptr, 2 * F, c, c_inside), _taps(taps_ptr + F, 2 * F, c, c_inside)
    a_bias = tl.load(bias_ptr + c, mask=c_inside, other=0).to(tl.float32)
    g_bias = tl.load(bias_ptr + F + c, mask=c_inside, other=0).to(tl.float32)
    zero = tl.zeros([BLOCK_C], tl.float32)
    a_rows, g_rows = ((zero,) * (3 * COLUMNS),) * 2
    da_sum, dg_sum = zero, zero
    x_ptr += sample * x_b
    dy_ptr += sample * dy_b
    next_a = _columns(x_ptr, top - 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
    next_g = _columns(x_ptr + F, top - 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
    for h in range(top - 1, min(top + ROWS, H) + 1):
        x_a, x_g = next_a, next_g
        next_a = _columns(x_ptr, h + 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
        next_g = _columns(x_ptr + F, h + 1, left - 1, x_h, x_w, c, c_inside, H, W, COLUMNS + 2)
        dys = _columns(dy_ptr, h - 1, left, dy_h, dy_w, c, c_inside & (h > top), H, W, COLUMNS)
        a_rows, _ = _meet(a_rows, a_rows, a_taps, x_a, x_a, COLUMNS, False)
        g_rows, _ = _meet(g_rows, g_rows, g_taps, x_g, x_g, COLUMNS, False)
        if h > top:
            for o in tl.static_range(COLUMNS):
                a, g, dy = a_rows[o] + a_bias, g_rows[o] + g_bias, dys[o].to(tl.float32)
                sigmoid = _sigmoid(g)
                s = g * sigmoid
                da, dg = dy * s, dy * a * (sigmoid + s * (1 - sigmoid))
                at = ((sample * H + h - 1) * W + left + o) * 2 * F + c
                inside = c_inside & (left + o < W)
                tl.store(dc_ptr + at, da, mask=inside)
                tl.store(dc_ptr + at + F, dg, mask=inside)
                da_sum += da
                dg_sum += dg
        a_rows, g_rows = _down(a_rows, zero, COLUMNS), _down(g_rows, zero, COLUMNS)
    part = (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * F + c
    tl.store(dbias_ptr + part, da_sum, mask=c_inside)
    tl.store(dbias_ptr + part + F, dg_sum, mask=c_inside)


@triton.jit
def _gather(dweight, dc, s, k: tl.constexpr, q: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds to the three taps of row k what dc of column q - 1 makes with a row of silu(x)."""
    sums = ()
    for tap in tl.static_range(9):
        if tap // 3 == k and q + tap % 3 >= 2 and q + tap % 3 < COLUMNS + 2:
            sums = sums + (dweight[tap] + s[q + tap % 3 - 2] * dc,)
        else:
            sums = sums + (dweight[tap],)
    return sums


@triton.jit
def _bwd_conv(
    dc_ptr, x_ptr, taps_ptr, dx_ptr, dweight_ptr, x_b, x_h, x_w, H, W, C, strips,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dx and dweight from dc, for C = 2 F channels alike; dweight leaves as partial sums [B, strips x columns, 9, C].
    # Here h walks over the rows of dc; row h of dc meets the rows h - 1, h, h + 1 of silu(x), in taps 0, 1, 2.
    sample = tl.program_id(2).to(tl.int64)
    top = (tl.program_id(0) % strips * ROWS).to(tl.int64)
    bottom = min(top + ROWS, H)
    left = (tl.program_id(0) // strips * COLUMNS).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < C
    taps = _taps(taps_ptr, C, c, c_inside)
    # dx is the correlation with the taps turned by half a circle
    turned = (taps[8], taps[7], taps[6], taps[5], taps[4], taps[3], taps[2], taps[1], taps[0])
    x_ptr += sample * x_b
    dc_ptr += sample * H * W * C
    zero = tl.zeros([BLOCK_C], tl.float32)
    dweight, ds_rows = (zero,) * 9, (zero,) * (3 * COLUMNS)
    # Zero outside the strip: each row counts once. What a loop hands from one variable to another begins as zeros of
    # its own: Triton takes a variable that is given the very value it began with for one that never changes.
    s_above, s_here = (tl.zeros([BLOCK_C], tl.float32),) * COLUMNS, (tl.zeros([BLOCK_C], tl.float32),) * COLUMNS
    slope_above = (tl.zeros([BLOCK_C], tl.float32),) * COLUMNS  # silu'(x)
    slope_here = (tl.zeros([BLOCK_C], tl.float32),) * COLUMNS
    next_x = _columns(x_ptr, top, left, x_h, x_w, c, c_inside, H, W, COLUMNS)
    next_dc = _columns(dc_ptr, top - 1, left - 1, W * C, C, c, c_inside, H, W, COLUMNS + 2)
    for h in range(top - 1, bottom + 1):
        xs, dcs = next_x, next_dc
        next_x = _columns(x_ptr, h + 2, left, x_h, x_w, c, c_inside & (h + 2 < bottom), H, W, COLUMNS)
        next_dc = _columns(dc_ptr, h + 1, left - 1, W * C, C, c, c_inside, H, W, COLUMNS + 2)
        s_below, slope_below = (), ()
        for o in tl.static_range(COLUMNS):
            x = xs[o].to(tl.float32)
            sigmoid = _sigmoid(x)
            s = x * sigmoid
            s_below = s_below + (s,)
            slope_below = slope_below + (sigmoid + s * (1 - sigmoid),)
        for q in tl.static_range(COLUMNS + 2):
            dc = dcs[q].to(tl.float32)
            ds_rows = _spread(ds_rows, turned, dc, q, COLUMNS)
            dweight = _gather(dweight, dc, s_above, 0, q, COLUMNS)
            dweight = _gather(dweight, dc, s_here, 1, q, COLUMNS)
            dweight = _gather(dweight, dc, s_below, 2, q, COLUMNS)
        if h > top:
            for o in tl.static_range(COLUMNS):
                at = ((sample * H + h - 1) * W + left + o) * C + c
                tl.store(dx_ptr + at, ds_rows[o] * slope_above[o], mask=c_inside & (left + o < W))
        ds_rows = _down(ds_rows, zero, COLUMNS)
        s_above, slope_above = s_here, slope_here
        s_here, slope_here = s_below, slope_below
    part = (sample * tl.num_programs(0) + tl.program_id(0)) * 9
    for tap in tl.static_range(9):
        tl.store(dweight_ptr + (part + tap) * C + c, dweight[tap], mask=c_inside)


def config(kernel: str, x: Tensor) -> dict[str, int]:
    """Rows of a strip, columns and channels of a tile, and warps. The default has 2 channels a thread: a warp's loads
    are whole lines of 128 bytes, and all that a row needs stays in registers."""
    H, W, F = (next_power_of_2(n) for n in (x.shape[1], x.shape[2], x.shape[3] // 2))
    columns = 4 if x.element_size() == 2 else 2
    default = dict(ROWS=min(32, max(1, H // 2)), COLUMNS=min(columns, max(1, W // 2)), BLOCK_C=min(128, F), num_warps=2)
    return launch.configuration(kernel, x, default, H=min(H, 64), W=min(W, 64), F=F)


def taps(weight: Tensor) -> Tensor:
    """[9, 2 F]: the weight turned, so that neighbouring channels are neighbours in memory (18 F elements, copied)."""
    return weight.reshape(-1, 9).t().contiguous()


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (x, weight, bias), (x_dot,) = values, dots
    (B, H, W, _), F = x.shape, x.shape[3] // 2
    y, y_dot = empty(x, B, H, W, F), empty(x, b, H, W, F)
    constants = config("glumbconv._fwd", x)
    strips, blocks = cdiv(H, constants["ROWS"]), cdiv(W, constants["COLUMNS"])
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
    strips, blocks = cdiv(H, constants["ROWS"]), cdiv(W, constants["COLUMNS"])
    dbias = empty(x, B, strips * blocks, 2 * F, dtype=torch.float32)
    _bwd_gate[(strips * blocks, cdiv(F, constants["BLOCK_C"]), B)](
        dy, x, nine, bias, dc, dbias, *strides(dy, 3), *strides(x, 3), H, W, F, strips, **constants
    )
    constants = config("glumbconv._bwd_conv", x)
    strips, blocks = cdiv(H, constants["ROWS"]), cdiv(W, constants["COLUMNS"])
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


fused = function("glumbconv", forward, backward, ("x",))
CASES = [
    Case("small", dict(B=1, H=3, W=4, F=3), ("x",)),
    Case("ragged", dict(B=3, H=2, W=1, F=4, b=2), ("x",)),
    Case("channels", dict(B=1, H=1, W=1, F=70), ("x",)),  # more than one block of them
    Case("sana-1.6b", dict(B=4, H=32, W=32, F=5600), ("x",), frozenset({"bench"})),
]
glumbconv = Op("glumbconv", reference, inputs, cost, accepts, CASES, dual=dual, batched=("x",), triton=fused)
