"""Layer norm without affine, modulated per sample (adaLN).

Shapes:   x [B, N, C]; scale, shift [B, C]; y [B, N, C]. Statistics over C.
Primal:   n = (x - mean) rstd;  y = n (1 + scale) + shift
Tangent:  n_dot = rstd (x_dot - mean(x_dot) - n mean(n x_dot));  y_dot = n_dot (1 + scale) + n scale_dot + shift_dot
Backward: g = dy (1 + scale);  dx = rstd (g - mean(g) - n mean(n g))
          dscale = sum over tokens of dy n;  dshift = sum over tokens of dy
Source:   DiT (arXiv 2212.09748); SANA's norm1, norm2 and norm_out (eps 1e-6).
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


def reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    n = torch.nn.functional.layer_norm(x, x.shape[-1:], None, None, eps)
    return torch.addcmul(shift.unsqueeze(1), n, 1 + scale.unsqueeze(1))


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
    live = inside & (sample < b)
    x_dot = tl.zeros_like(x)
    if X_LIVE:  # on its way while the primal's sums are waited for
        x_dot = tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=live, other=0).to(tl.float32)
    n, mean, rstd = norm(x, inside, C, eps)
    tl.store(y_ptr + row * C + c, n * (1 + scale) + shift, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    if sample < b:  # one branch a program: the other samples do no tangent work
        y_dot = tl.zeros([BLOCK], tl.float32)
        if X_LIVE:
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
    chunk, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    scale = tl.load(scale_ptr + sample * scale_b + c, mask=inside, other=0).to(tl.float32)
    dscale, dshift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    begin, end = chunk * ROWS, min(chunk * ROWS + ROWS, N)
    dy_ptr += sample * dy_b + c
    x_ptr += sample * x_b + c
    mean_ptr += sample * N
    rstd_ptr += sample * N
    next_dy, next_x = tl.load(dy_ptr + begin * dy_n, mask=inside, other=0), tl.load(x_ptr + begin * x_n, mask=inside)
    next_mean, next_rstd = tl.load(mean_ptr + begin), tl.load(rstd_ptr + begin)
    for token in range(begin, end):
        # the next row is on its way while this one's sums are waited for
        dy, x, mean, rstd = next_dy.to(tl.float32), next_x.to(tl.float32), next_mean, next_rstd
        more = token + 1 < end
        next_dy = tl.load(dy_ptr + (token + 1) * dy_n, mask=inside & more, other=0)
        next_x = tl.load(x_ptr + (token + 1) * x_n, mask=inside & more)
        next_mean = tl.load(mean_ptr + token + 1, mask=more)
        next_rstd = tl.load(rstd_ptr + token + 1, mask=more)
        n = tl.where(inside, (x - mean) * rstd, 0)
        at = (sample * N + token) * C + c
        # no product: see gated_residual_adaln
        tl.store(dx_ptr + at, norm_dot(tl.fma(dy, scale, dy), n, rstd, C), mask=inside)
        dscale += dy * n
        dshift += dy
    part = (sample * tl.num_programs(0) + chunk) * C + c
    tl.store(dscale_ptr + part, dscale, mask=inside)
    tl.store(dshift_ptr + part, dshift, mask=inside)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (x, scale, shift, eps), (x_dot, scale_dot, shift_dot) = values, dots
    B, N, C = x.shape
    y, y_dot = empty(x, B, N, C), empty(x, b, N, C)
    mean, rstd = empty(x, B, N, dtype=torch.float32), empty(x, B, N, dtype=torch.float32)
    _fwd[(B * N,)](
        x, scale, shift, x_dot, scale_dot, shift_dot, y, y_dot, mean, rstd,
        *strides(x, 2), *strides(scale, 1), *strides(shift, 1),
        *strides(x_dot, 2), *strides(scale_dot, 1), *strides(shift_dot, 1), N, C, b, eps,
        x_dot is not None, scale_dot is not None, shift_dot is not None, **rows("adaln._fwd", x),
    )  # fmt: skip
    return (y,), (y_dot,), (x, scale, mean, rstd)


def backward(saved: Sequence[Any], dy: Tensor) -> Any:
    x, scale, mean, rstd = saved
    B, N, C = x.shape
    constants = rows("adaln._bwd", x, ROWS=16)  # tokens over which a program sums dscale and dshift
    chunks = cdiv(N, constants["ROWS"])
    dx, (dscale, dshift) = empty(x, B, N, C), (empty(x, B, chunks, C, dtype=torch.float32) for _ in range(2))
    _bwd[(chunks, B)](
        dy, x, scale, mean, rstd, dx, dscale, dshift, *strides(dy, 2), *strides(x, 2), *strides(scale, 1), N, C,
        **constants,
    )  # fmt: skip
    return dx, dscale.sum(1).to(x.dtype), dshift.sum(1).to(x.dtype)


def accepts(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> None:
    if x.ndim != 3 or x.shape[2] > 16384:
        raise ValueError(f"adaln: x is {tuple(x.shape)}; expected [B, N, C] with C at most 16384")
    B, N, C = x.shape
    check("adaln", x, x=(x, (B, N, C)), scale=(scale, (B, C)), shift=(shift, (B, C)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | float]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    x, eps = 2 * normal(s["B"], s["N"], s["C"]) + 0.5, s["tenth_eps"] / 10 if "tenth_eps" in s else 1e-6
    return dict(x=x, scale=0.5 * normal(s["B"], s["C"]), shift=normal(s["B"], s["C"]), eps=eps)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((8 * s["B"] + 14 * case.b) * n, itemsize * (s["B"] + case.b) * (2 * n + 2 * s["C"]))


fused = function("adaln", forward, backward, ("x", "scale", "shift"))
CASES = [
    Case("small", dict(B=3, N=5, C=8), ("x", "scale", "shift")),
    Case("odd", dict(B=2, N=3, C=37, b=1, tenth_eps=3), ("x", "scale", "shift")),
    Case("chunks", dict(B=2, N=19, C=8, b=1), ("x", "scale", "shift")),  # more than 16 tokens
    Case("one-token", dict(B=1, N=1, C=16), ("x", "scale", "shift")),
    Case("one-channel", dict(B=2, N=3, C=1), ("x", "scale", "shift")),  # n and every gradient of x are 0
    Case("x-only", dict(B=3, N=4, C=12, b=2), ("x",)),
    Case("modulation-only", dict(B=3, N=4, C=12), ("scale", "shift")),
    Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x", "scale", "shift"), frozenset({"bench"})),
]
adaln = Op("adaln", reference, inputs, cost, accepts, CASES, batched=("x", "scale", "shift"), triton=fused)
