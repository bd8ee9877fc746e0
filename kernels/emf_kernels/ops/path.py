"""The straight path from data to noise: where it is at time t, and its velocity.

Shapes:   x (data), e (noise) [B, ...], up to three dimensions; t [B]; outputs z, v [B, ...].
Primal:   z = (1 - t) x + t e;  v = e - x
Tangent:  z_dot = (1 - t) x_dot + t e_dot + v t_dot;  v_dot = e_dot - x_dot   (along t alone z_dot = v, and v_dot = 0)
Backward: dx = (1 - t) dz - dv;  de = t dz + dv;  dt = sum over all but the batch of v dz
Source:   rectified flow (arXiv 2209.03003), in MeanFlow's letters (arXiv 2505.13447). Feed t in float32: at bfloat16's
          8 bits z would lie at another time than t says.
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
from ..tiles import cdiv, elements, empty, offset, planes, size


def reference(x: Tensor, e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    s = t.reshape(-1, *[1] * (x.ndim - 1))
    return ((1 - s) * x + s * e).to(x.dtype), e - x


@triton.jit
def _fwd(
    x_ptr, e_ptr, t_ptr, x_dot_ptr, e_dot_ptr, t_dot_ptr, z_ptr, v_ptr, z_dot_ptr, v_dot_ptr,
    x_b, x_c, x_h, e_b, e_c, e_h, x_dot_b, x_dot_c, x_dot_h, e_dot_b, e_dot_c, e_dot_h, b, n, H, W,
    X_LIVE: tl.constexpr, E_LIVE: tl.constexpr, T_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at = i < n, sample * n + i
    x = tl.load(x_ptr + sample * x_b + offset(i, x_c, x_h, H, W), mask=inside, other=0).to(tl.float32)
    e = tl.load(e_ptr + sample * e_b + offset(i, e_c, e_h, H, W), mask=inside, other=0).to(tl.float32)
    t = tl.load(t_ptr + sample).to(tl.float32)
    tl.store(z_ptr + at, (1 - t) * x + t * e, mask=inside)
    tl.store(v_ptr + at, e - x, mask=inside)
    if sample < b:
        z_dot, v_dot = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        if X_LIVE:
            x_at = sample * x_dot_b + offset(i, x_dot_c, x_dot_h, H, W)
            x_dot = tl.load(x_dot_ptr + x_at, mask=inside, other=0).to(tl.float32)
            z_dot += (1 - t) * x_dot
            v_dot -= x_dot
        if E_LIVE:
            e_at = sample * e_dot_b + offset(i, e_dot_c, e_dot_h, H, W)
            e_dot = tl.load(e_dot_ptr + e_at, mask=inside, other=0).to(tl.float32)
            z_dot += t * e_dot
            v_dot += e_dot
        if T_LIVE:
            z_dot += (e - x) * tl.load(t_dot_ptr + sample).to(tl.float32)
        tl.store(z_dot_ptr + at, z_dot, mask=inside)
        tl.store(v_dot_ptr + at, v_dot, mask=inside)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (x, e, t), (x_dot, e_dot, t_dot) = values, dots
    (n, H, W), (B, *rest), constants = size(x), x.shape, elements("path._fwd", x)
    z, v, z_dot, v_dot = (empty(x, samples, *rest) for samples in (B, B, b, b))
    _fwd[(cdiv(n, constants["BLOCK"]), B)](
        x, e, t, x_dot, e_dot, t_dot, z, v, z_dot, v_dot, *planes(x), *planes(e), *planes(x_dot), *planes(e_dot),
        b, n, H, W, x_dot is not None, e_dot is not None, t_dot is not None, **constants,
    )  # fmt: skip
    return (z, v), (z_dot, v_dot), (x, e, t)


def backward(saved: Sequence[Any], dz: Tensor | None, dv: Tensor | None) -> Any:
    # never needed in training, where x, e and t are data: plain torch, the long sum of dt in double
    x, e, t = saved
    dz, dv = (torch.zeros_like(x) if d is None else d for d in (dz, dv))
    s, wide = t.reshape(-1, *[1] * (x.ndim - 1)).float(), dz.float()
    dx, de = (1 - s) * wide - dv, s * wide + dv
    dt = ((e.double() - x.double()) * dz).flatten(1).sum(1)
    return dx.to(x.dtype), de.to(x.dtype), dt.to(t.dtype)


def accepts(x: Tensor, e: Tensor, t: Tensor) -> None:
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"path: x is {tuple(x.shape)}; expected [B, ...] with one to three further dimensions")
    check("path", x, x=(x, tuple(x.shape)), e=(e, tuple(x.shape)))
    check("path", t, t=(t, (x.shape[0],)))
    if t.dtype not in (x.dtype, torch.float32) or t.device != x.device:
        raise ValueError(f"path: t is {t.dtype} on {t.device}; expected float32 or {x.dtype} on {x.device}")


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    normal = lambda: torch.randn(s["B"], s["C"], s["H"], s["W"], generator=generator, dtype=dtype).to(device)  # noqa: E731
    t = torch.randint(1, 64, (s["B"],), generator=generator).to(device, dtype) / 64  # exact in half precision
    return dict(x=normal(), e=normal(), t=t)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["C"] * s["H"] * s["W"]
    return Cost((4 * s["B"] + 7 * case.b) * n, itemsize * (4 * s["B"] + (2 + len(set(case.live) - {"t"})) * case.b) * n)


fused = function("path", forward, backward, ("x", "e", "t"))
CASES = [
    Case("small", dict(B=3, C=2, H=4, W=3), ("x", "e", "t")),
    Case("ragged", dict(B=3, C=2, H=3, W=5, b=2), ("x", "e", "t")),
    Case("blocks", dict(B=2, C=3, H=5, W=70, b=1), ("x", "t")),  # more than one block of elements
    Case("time-only", dict(B=2, C=1, H=3, W=3), ("t",)),
    Case("sana-1.6b", dict(B=16, C=32, H=32, W=32, b=0), ("t",), frozenset({"bench"})),
]
path = Op("path", reference, inputs, cost, accepts, CASES, batched=("x", "e", "t"), triton=fused)
