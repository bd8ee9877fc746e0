"""Sinusoids of the end time t and of the interval t - r, the inputs of EMF's two time embedders.

Shapes:   t, r [B] (r None: the pretrained single embedding, one output); outputs [B, dim] for t and for t - r. Times
          in [0, 1].
Primal:   f_i = 10000^(-i / half), half = dim / 2;  e(s) = [cos(scale s f), sin(scale s f)];  outputs e(t), e(t - r)
Tangent:  e_dot(s) = scale s_dot f [-sin, cos];  s_dot is t_dot, and t_dot - r_dot
Backward: ds = scale sum_i f_i (de_sin,i cos - de_cos,i sin);  dt = ds_t + ds_(t - r);  dr = -ds_(t - r)
Source:   EMF (arXiv 2604.18168), dual time embedding; diffusers' Timesteps with flip_sin_to_cos. Feed float32:
          bfloat16 keeps 8 bits of t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual import check
from ..function import function
from ..op import Case, Cost, Op
from ..tiles import empty, next_power_of_2


def reference(t: Tensor, r: Tensor | None, scale: float = 1.0, dim: int = 256) -> Tensor | tuple[Tensor, Tensor]:
    f = scale * torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, dtype=t.dtype, device=t.device))
    e = [
        torch.cat([torch.cos(s[:, None] * f), torch.sin(s[:, None] * f)], -1)
        for s in ((t,) if r is None else (t, t - r))
    ]
    return e[0] if r is None else (e[0], e[1])


@triton.jit
def _sinusoid(s, s_dot, f, e_ptr, e_dot_ptr, sample, i, half, live):
    # s and f, and so the phase, in float64 and within half a turn: at a scale of 1000 float32 would be off by 3e-5
    phase = s * f
    phase = (phase - 6.283185307179586 * tl.floor(phase / 6.283185307179586 + 0.5)).to(tl.float32)
    cos, sin = tl.cos(phase), tl.sin(phase)
    f = f.to(tl.float32)
    at, inside = sample * 2 * half + i, i < half
    tl.store(e_ptr + at, cos, mask=inside)
    tl.store(e_ptr + at + half, sin, mask=inside)
    tl.store(e_dot_ptr + at, -s_dot * f * sin, mask=inside & live)
    tl.store(e_dot_ptr + at + half, s_dot * f * cos, mask=inside & live)


@triton.jit
def _fwd(
    t_ptr, r_ptr, t_dot_ptr, r_dot_ptr, end_ptr, interval_ptr, end_dot_ptr, interval_dot_ptr,
    half, b, scale, TWO: tl.constexpr, T_LIVE: tl.constexpr, R_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i = tl.program_id(0), tl.arange(0, BLOCK)
    live = sample < b
    f = tl.cast(scale, tl.float32) * tl.exp(-9.210340371976184 * (i.to(tl.float64) / half))  # the logarithm of 10^4
    t, t_dot = tl.load(t_ptr + sample).to(tl.float64), 0.0
    if T_LIVE:
        t_dot = tl.load(t_dot_ptr + sample, mask=live, other=0).to(tl.float32)
    _sinusoid(t, t_dot, f, end_ptr, end_dot_ptr, sample, i, half, live)
    if TWO:
        r, r_dot = tl.load(r_ptr + sample).to(tl.float64), 0.0
        if R_LIVE:
            r_dot = tl.load(r_dot_ptr + sample, mask=live, other=0).to(tl.float32)
        _sinusoid(t - r, t_dot - r_dot, f, interval_ptr, interval_dot_ptr, sample, i, half, live)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (t, r, scale, dim), (t_dot, r_dot), two = values, dots, values[1] is not None
    y, y_dot = ([empty(t, samples, dim) for _ in range(1 + two)] for samples in (len(t), b))
    _fwd[(len(t),)](
        t, r, t_dot, r_dot, y[0], y[-1], y_dot[0], y_dot[-1], dim // 2, b, scale,
        two, t_dot is not None, r_dot is not None, BLOCK=next_power_of_2(dim // 2), num_warps=1,
    )  # fmt: skip
    return tuple(y), tuple(y_dot), (scale, *y)


def backward(saved: Sequence[Any], *grads: Tensor | None) -> Any:
    # [B, dim] and never needed in training: plain torch, in double as path's
    (scale, *y), ds = saved, []
    for e, de in zip(y, grads, strict=True):
        (cos, sin), half = e.double().chunk(2, 1), e.shape[1] // 2
        i = torch.arange(half, dtype=torch.float64, device=e.device)
        f = scale * torch.exp(-math.log(1e4) / half * i)
        d_cos, d_sin = (torch.zeros_like(e) if de is None else de).double().chunk(2, 1)
        ds.append(((d_sin * cos - d_cos * sin) * f).sum(1).to(e.dtype))
    return (ds[0] + ds[1], -ds[1]) if len(ds) == 2 else ds


def accepts(t: Tensor, r: Tensor | None, scale: float = 1.0, dim: int = 256) -> None:
    if t.ndim != 1 or dim < 2 or dim % 2:
        raise ValueError(f"time_embedding: t is {tuple(t.shape)} and dim {dim}; expected [B] and an even number")
    check("time_embedding", t, t=(t, tuple(t.shape)), r=(r, tuple(t.shape)))


def inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> dict[str, Tensor | float | int | None]:
    s = case.shape
    # The times themselves are exact in half precision, so that a test compares the arithmetic and not the rounding of
    # its inputs.
    t = torch.randint(32, 65, (s["B"],), generator=generator).to(device, dtype) / 64
    r = None if s.get("single") else t / 2
    return dict(t=t, r=r, scale=float(s.get("scale", 1)), dim=s["dim"])


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = (s["B"] + case.b) * s["dim"] * (1 if s.get("single") else 2)
    return Cost(4 * n, itemsize * n)


fused = function("time_embedding", forward, backward, ("t", "r"))
CASES = [
    Case("dual", dict(B=3, dim=16), ("t",)),
    Case("ragged", dict(B=3, dim=16, b=1), ("t",)),
    Case("single", dict(B=3, dim=16, single=1, scale=1000), ("t",)),
    Case("both-live", dict(B=2, dim=16, scale=1000), ("t", "r")),
    Case("sana-1.6b", dict(B=16, dim=256), ("t",), frozenset({"bench"})),
]
time_embedding = Op("time_embedding", reference, inputs, cost, accepts, CASES, batched=("t", "r"), triton=fused)
