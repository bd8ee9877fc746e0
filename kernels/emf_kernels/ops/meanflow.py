"""EMF's MeanFlow loss: target, error, per-sample sum and adaptive weight.

Shapes:   u, v [B, ...], up to three dimensions; u_dot [b, ...], b <= B, the tangent of the first b samples (a
          constant); t, r [B]; r = t in the other samples. Outputs: loss [B] (weighted), error [B] (mean squared
          error, for logs).
Primal:   u_tgt = v - (t - r) u_dot;  L = sum over all but the batch of (u - u_tgt)^2;  w = 1 / (stopgrad(L) + c)^p;
          loss = w L
Tangent:  none: a loss is where tangents end
Backward: du = 2 w (u - u_tgt) dloss   (u_tgt and w are constants)
Source:   MeanFlow (arXiv 2505.13447) eq. 9-11 and section 4.3; EMF (arXiv 2604.18168) uses p = 1, c = 1e-3 on the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual import check, widened
from ..function import function
from ..op import Case, Cost, Op
from ..tiles import cdiv, elements, empty, offset, planes, size


def reference(
    u: Tensor, u_dot: Tensor, v: Tensor, t: Tensor, r: Tensor, p: float = 1.0, c: float = 1e-3
) -> tuple[Tensor, Tensor]:
    dtype, b, (u, u_dot, v, t, r) = u.dtype, u_dot.shape[0], map(widened, (u, u_dot, v, t, r))
    gap = (t - r).reshape(-1, *[1] * (u.ndim - 1))
    u_tgt = torch.cat([v[:b] - gap[:b] * u_dot, v[b:]]).detach()
    total = (u - u_tgt).square().flatten(1).sum(1)
    return (total / (total.detach() + c) ** p).to(dtype), (total.detach() / u[0].numel()).to(dtype)


@triton.jit
def _error(
    u_ptr, u_dot_ptr, v_ptr, t_ptr, r_ptr, u_b, u_c, u_h, u_dot_b, u_dot_c, u_dot_h, v_b, v_c, v_h,
    sample, i, inside, b, H, W,
):  # fmt: skip
    """u - u_tgt."""
    u = tl.load(u_ptr + sample * u_b + offset(i, u_c, u_h, H, W), mask=inside, other=0).to(tl.float32)
    v = tl.load(v_ptr + sample * v_b + offset(i, v_c, v_h, H, W), mask=inside, other=0).to(tl.float32)
    gap = tl.load(t_ptr + sample).to(tl.float32) - tl.load(r_ptr + sample).to(tl.float32)
    at = sample * u_dot_b + offset(i, u_dot_c, u_dot_h, H, W)
    u_dot = tl.load(u_dot_ptr + at, mask=inside & (sample < b), other=0).to(tl.float32)
    return u - (v - gap * u_dot)


@triton.jit
def _fwd(
    u_ptr, u_dot_ptr, v_ptr, t_ptr, r_ptr, sum_ptr, u_b, u_c, u_h, u_dot_b, u_dot_c, u_dot_h, v_b, v_c, v_h,
    b, n, H, W, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    error = _error(
        u_ptr, u_dot_ptr, v_ptr, t_ptr, r_ptr, u_b, u_c, u_h, u_dot_b, u_dot_c, u_dot_h, v_b, v_c, v_h,
        sample, i, i < n, b, H, W,
    )  # fmt: skip
    tl.store(sum_ptr + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(error * error))


@triton.jit
def _bwd(
    dloss_ptr, u_ptr, u_dot_ptr, v_ptr, t_ptr, r_ptr, du_ptr,
    u_b, u_c, u_h, u_dot_b, u_dot_c, u_dot_h, v_b, v_c, v_h, b, n, H, W, BLOCK: tl.constexpr,
):  # fmt: skip
    # dloss comes times 2 w
    sample, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    error = _error(
        u_ptr, u_dot_ptr, v_ptr, t_ptr, r_ptr, u_b, u_c, u_h, u_dot_b, u_dot_c, u_dot_h, v_b, v_c, v_h,
        sample, i, i < n, b, H, W,
    )  # fmt: skip
    tl.store(du_ptr + sample * n + i, tl.load(dloss_ptr + sample) * error, mask=i < n)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    u, u_dot, v, t, r, p, c = values
    (n, H, W), constants = size(u), elements("meanflow._fwd", u)
    blocks = cdiv(n, constants["BLOCK"])
    sums = empty(u, len(u), blocks, dtype=torch.float32)
    _fwd[(blocks, len(u))](
        u, u_dot, v, t, r, sums, *planes(u), *planes(u_dot), *planes(v), len(u_dot), n, H, W, **constants
    )  # fmt: skip
    total = sums.sum(1)
    w = 1 / (total + c) ** p
    return ((w * total).to(u.dtype), (total / n).to(u.dtype)), (), (u, u_dot, v, t, r, w)


def backward(saved: Sequence[Any], dloss: Tensor, _: None) -> Any:
    u, u_dot, v, t, r, w = saved
    du, (n, H, W), constants = empty(u, *u.shape), size(u), elements("meanflow._bwd", u)
    _bwd[(cdiv(n, constants["BLOCK"]), len(u))](
        2 * w * dloss, u, u_dot, v, t, r, du, *planes(u), *planes(u_dot), *planes(v), len(u_dot), n, H, W, **constants
    )  # fmt: skip
    return (du,)


def accepts(u: Tensor, u_dot: Tensor, v: Tensor, t: Tensor, r: Tensor, p: float = 1.0, c: float = 1e-3) -> None:
    if not 2 <= u.ndim <= 4:
        raise ValueError(f"meanflow: u is {tuple(u.shape)}; expected [B, ...] with one to three further dimensions")
    B, rest, b = u.shape[0], tuple(u.shape[1:]), u_dot.shape[0] if u_dot.ndim else 0
    if b > B:
        raise ValueError(f"meanflow: u_dot is {tuple(u_dot.shape)}; expected at most {B} samples")
    check("meanflow", u, u=(u, (B, *rest)), u_dot=(u_dot, (b, *rest)), v=(v, (B, *rest)))
    check("meanflow", t, t=(t, (B,)), r=(r, (B,)))
    if t.dtype not in (u.dtype, torch.float32) or t.device != u.device:
        raise ValueError(f"meanflow: t is {t.dtype} on {t.device}; expected float32 or {u.dtype} on {u.device}")


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | float]:
    s = case.shape
    normal = lambda n: torch.randn(n, s["C"], s["H"], s["W"], generator=generator, dtype=dtype).to(device)  # noqa: E731
    t = torch.randint(32, 65, (s["B"],), generator=generator).to(device, dtype) / 64
    r = torch.where(torch.arange(s["B"], device=device) < case.b, t / 2, t)
    p, c = s.get("half_p", 2) / 2, s["tenth_c"] / 10 if "tenth_c" in s else 1e-3
    return dict(u=normal(s["B"]), u_dot=normal(case.b), v=normal(s["B"]), t=t, r=r, p=p, c=c)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["C"] * s["H"] * s["W"]
    return Cost((3 * s["B"] + 2 * case.b) * n, itemsize * (2 * s["B"] + case.b) * n)


fused = function("meanflow", forward, backward, constant=1)
CASES = [
    Case("full", dict(B=3, C=2, H=4, W=3), ()),
    Case("ragged", dict(B=4, C=2, H=3, W=3, b=1, tenth_c=5), ()),
    Case("blocks", dict(B=2, C=3, H=5, W=70, b=1), ()),  # more than one block of elements
    Case("flow-matching", dict(B=3, C=2, H=3, W=3, b=0, half_p=1), ()),
    Case("unweighted", dict(B=3, C=2, H=3, W=3, half_p=0), ()),
    Case("sana-1.6b", dict(B=16, C=32, H=32, W=32, b=8), (), frozenset({"bench"})),
]
meanflow = Op(
    "meanflow",
    reference,
    inputs,
    cost,
    accepts,
    CASES,
    batched=("u", "v", "t", "r"),
    live=(),
    differentiable=("u",),
    triton=fused,
)
