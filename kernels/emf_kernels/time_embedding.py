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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dual import Dual, check, halves, leading
from .op import Case, Cost, Op, forward_mode


def reference(t: Tensor, r: Tensor | None, scale: float = 1.0, dim: int = 256) -> Tensor | tuple[Tensor, Tensor]:
    f = scale * torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, dtype=t.dtype, device=t.device))
    e = [
        torch.cat([torch.cos(s[:, None] * f), torch.sin(s[:, None] * f)], -1)
        for s in ((t,) if r is None else (t, t - r))
    ]
    return e[0] if r is None else (e[0], e[1])


@triton.jit
def _sinusoid(s, s_dot, f, e_ptr, e_dot_ptr, sample, i, half, live):
    cos, sin = tl.cos(s * f), tl.sin(s * f)
    at, inside = sample * 2 * half + i, i < half
    tl.store(e_ptr + at, cos, mask=inside)
    tl.store(e_ptr + at + half, sin, mask=inside)
    tl.store(e_dot_ptr + at, -s_dot * f * sin, mask=inside & live)
    tl.store(e_dot_ptr + at + half, s_dot * f * cos, mask=inside & live)


@triton.jit
def _fwd(
    t_ptr, r_ptr, t_dot_ptr, r_dot_ptr, end_ptr, interval_ptr, end_dot_ptr, interval_dot_ptr,
    half, b, scale, step, TWO: tl.constexpr, T_LIVE: tl.constexpr, R_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i = tl.program_id(0), tl.arange(0, BLOCK)
    live = sample < b
    f = scale * tl.exp(step * i)
    t, t_dot = tl.load(t_ptr + sample).to(tl.float32), 0.0
    if T_LIVE:
        t_dot = tl.load(t_dot_ptr + sample, mask=live, other=0).to(tl.float32)
    _sinusoid(t, t_dot, f, end_ptr, end_dot_ptr, sample, i, half, live)
    if TWO:
        r, r_dot = tl.load(r_ptr + sample).to(tl.float32), 0.0
        if R_LIVE:
            r_dot = tl.load(r_dot_ptr + sample, mask=live, other=0).to(tl.float32)
        _sinusoid(t - r, t_dot - r_dot, f, interval_ptr, interval_dot_ptr, sample, i, half, live)


class _TimeEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, r: Tensor | None, t_dot: Any, r_dot: Any, scale: float, half: int, b: int) -> Any:
        end, interval, end_dot, interval_dot = (
            torch.empty(samples, 2 * half, dtype=t.dtype, device=t.device)
            for samples in (t.shape[0], 0 if r is None else t.shape[0], b, 0 if r is None else b)
        )
        _fwd[(t.shape[0],)](
            t, r, t_dot, r_dot, end, interval, end_dot, interval_dot, half, b, scale, -math.log(1e4) / half,
            r is not None, t_dot is not None, r_dot is not None, BLOCK=triton.next_power_of_2(half), num_warps=1,
        )  # fmt: skip
        return end, interval, end_dot, interval_dot

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (t, r, *dots, scale, half, _), (end, interval, *constants) = inputs, output
        ctx.save_for_backward(end, interval)
        ctx.save_for_forward(t, r)
        ctx.dual, ctx.two, ctx.scale, ctx.half = any(d is not None for d in dots), r is not None, scale, half
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)  # no zeros for the tangents' gradients, which there never are

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        # [B, dim] and never needed in training: plain torch
        ds: list[Tensor] = []
        for e, de in zip(ctx.saved_tensors, grads, strict=False):
            (cos, sin), half = e.float().chunk(2, 1), e.shape[1] // 2
            f = ctx.scale * torch.exp(-math.log(1e4) / half * torch.arange(half, device=e.device))
            d_cos, d_sin = (torch.zeros_like(e) if de is None else de).float().chunk(2, 1)
            ds.append(((d_sin * cos - d_cos * sin) * f).sum(1).to(e.dtype))
        return ds[0] + ds[1] if ctx.two else ds[0], -ds[1] if ctx.two else None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *dots: Any) -> Any:
        y_dot = forward_mode(ctx, fused, (*ctx.saved_tensors, ctx.scale, 2 * ctx.half), dots[:2])
        none = y_dot[0].new_empty(0, 2 * ctx.half)  # the second output's, where there is no second output
        return *(y_dot if ctx.two else [*y_dot, none]), None, None


def accepts(t: Tensor, r: Tensor | None, scale: float = 1.0, dim: int = 256) -> None:
    if t.ndim != 1 or dim < 2 or dim % 2:
        raise ValueError(f"time_embedding: t is {tuple(t.shape)} and dim {dim}; expected [B] and an even number")
    check("time_embedding", t, t=(t, tuple(t.shape)), r=(r, tuple(t.shape)))


def fused(t: Tensor | Dual, r: Tensor | Dual | None, scale: float = 1.0, dim: int = 256) -> Any:
    """time_embedding of Tensors or Duals, one launch for both outputs, value and tangent. Shapes as above; float32
    inside whatever the dtype of t and r, which is the outputs'; else ValueError."""
    duals = [a for a in (t, r) if isinstance(a, Dual)]
    b = leading(duals, "time_embedding")
    (t_, t_dot), (r_, r_dot) = halves(t), halves(r)
    end, interval, end_dot, interval_dot = _TimeEmbedding.apply(t_, r_, t_dot, r_dot, scale, dim // 2, b)
    if not duals:
        return end if r is None else (end, interval)
    return Dual(end, end_dot) if r is None else (Dual(end, end_dot), Dual(interval, interval_dot))


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


time_embedding = Op(
    "time_embedding",
    reference,
    inputs=inputs,
    cost=cost,
    accepts=accepts,
    batched=("t", "r"),
    triton=fused,
    cases=[
        Case("dual", dict(B=3, dim=16), ("t",)),
        Case("ragged", dict(B=3, dim=16, b=1), ("t",)),
        Case("single", dict(B=3, dim=16, single=1, scale=10), ("t",)),
        Case("both-live", dict(B=2, dim=16), ("t", "r")),
        Case("sana-1.6b", dict(B=16, dim=256), ("t",), frozenset({"bench"})),
    ],
)
