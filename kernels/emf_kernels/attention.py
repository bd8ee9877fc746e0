"""Softmax attention, self or cross, with a key mask.

Shapes:   q [B, Nq, H, D]; k, v [B, Nk, H, D]; mask [B, Nk] bool (True = attend) or None; o [B, Nq, H, D].
Primal:   s = q k^T D^-1/2;  p = softmax(s);  o = p v.  A masked key has weight 0; a sample without any key to attend to gives 0.
Tangent:  s_dot = (q_dot k^T + q k_dot^T) D^-1/2;  o_dot = (p * s_dot) v - rowsum(p * s_dot) o + p v_dot
Backward: ds = p * (do v^T - rowsum(do * o));  dq = ds k D^-1/2;  dk = ds^T q D^-1/2;  dv = p^T do
Source:   FlashAttention-2 (arXiv 2307.08691) for the primal; the tangent follows from d softmax = p * (s_dot - <p, s_dot>).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import Case, Cost, Dual, Op, check, halves, leading


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    s = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    dead = None if mask is None else ~mask[:, None, None, :]
    p = s.softmax(-1) if dead is None else s.masked_fill(dead, torch.finfo(s.dtype).min).softmax(-1).masked_fill(dead, 0)
    return (p @ v.transpose(1, 2)).transpose(1, 2)


@triton.jit
def _fwd(
    q_ptr, k_ptr, v_ptr, mask_ptr, q_dot_ptr, k_dot_ptr, v_dot_ptr, o_ptr, o_dot_ptr, lse_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, qd_b, qd_n, qd_h, kd_b, kd_n, kd_h, vd_b, vd_n, vd_h,
    first, Nq, Nk, scale, H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, Q_LIVE: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q queries of one head of one sample; keys and values are read once for both halves
    head, sample = tl.program_id(1), first + tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    i_in, d_in = (i < Nq)[:, None] & (d < D)[None, :], d < D
    q = tl.load(q_ptr + sample * q_b + head * q_h + i[:, None] * q_n + d[None, :], mask=i_in, other=0)
    if Q_LIVE:
        q_dot = tl.load(q_dot_ptr + sample * qd_b + head * qd_h + i[:, None] * qd_n + d[None, :], mask=i_in, other=0)
    LIVE: tl.constexpr = Q_LIVE or K_LIVE or V_LIVE
    m, l = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    a, a_dot, mu = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, Nk, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        j_in = j < Nk
        inside = j_in[:, None] & d_in[None, :]
        k = tl.load(k_ptr + sample * k_b + head * k_h + j[:, None] * k_n + d[None, :], mask=inside, other=0)
        v = tl.load(v_ptr + sample * v_b + head * v_h + j[:, None] * v_n + d[None, :], mask=inside, other=0)
        alive = j_in
        if MASKED:
            alive = alive & (tl.load(mask_ptr + sample * mask_b + j, mask=j_in, other=0) != 0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)  # in units of log2, for exp2
        s = tl.where(alive[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no live key so far
        p = tl.exp2(s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        a = a * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        if LIVE:
            a_dot = a_dot * shrink[:, None]
        if Q_LIVE or K_LIVE:
            s_dot = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            if Q_LIVE:
                s_dot += tl.dot(q_dot, tl.trans(k), input_precision=PRECISION)
            if K_LIVE:
                k_dot = tl.load(k_dot_ptr + sample * kd_b + head * kd_h + j[:, None] * kd_n + d[None, :], mask=inside, other=0)
                s_dot += tl.dot(q, tl.trans(k_dot), input_precision=PRECISION)
            w = p * (s_dot * scale)
            mu = mu * shrink + tl.sum(w, 1)
            a_dot += tl.dot(w.to(v.dtype), v, input_precision=PRECISION)
        if V_LIVE:
            v_dot = tl.load(v_dot_ptr + sample * vd_b + head * vd_h + j[:, None] * vd_n + d[None, :], mask=inside, other=0)
            a_dot += tl.dot(p.to(v.dtype), v_dot, input_precision=PRECISION)
        m = m_new
    dead = l == 0
    total = tl.where(dead, 1.0, l)
    o = a / total[:, None]
    out = sample * Nq * H * D + i[:, None] * (H * D) + head * D + d[None, :]
    tl.store(o_ptr + out, o, mask=i_in)
    # a row without any live key: +inf, with which exp(s - lse) is 0 in backward
    tl.store(lse_ptr + (sample * H + head) * Nq + i, tl.where(dead, float("inf"), (m + tl.log2(total)) / 1.4426950408889634), mask=i < Nq)
    if LIVE:
        tl.store(o_dot_ptr + out, a_dot / total[:, None] - (mu / total)[:, None] * o, mask=i_in)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_dot: Any, k_dot: Any, v_dot: Any) -> Any:
        (B, Nq, H, D), Nk = q.shape, k.shape[1]
        tangents = [d for d in (q_dot, k_dot, v_dot) if d is not None]
        b = tangents[0].shape[0] if tangents else 0
        o, o_dot = torch.empty(B, Nq, H, D, dtype=q.dtype, device=q.device), torch.empty(b, Nq, H, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
        block_d = max(16, triton.next_power_of_2(D))
        block_q, block_k, warps = (64, 64, 8) if block_d >= 128 else (128, 64, 8)
        block_q, block_k = min(block_q, max(16, triton.next_power_of_2(Nq))), min(block_k, max(16, triton.next_power_of_2(Nk)))
        strides = [0 if x is None else x.stride(i) for x in (q, k, v) for i in range(3)]
        tangent_strides = [0 if x is None else x.stride(i) for x in (q_dot, k_dot, v_dot) for i in range(3)]
        precision = "ieee" if q.dtype == torch.float32 else "tf32"
        # the first b samples with their tangents, then the rest without: two launches rather than a branch around every product
        for first, count, live in ((0, b, [d is not None for d in (q_dot, k_dot, v_dot)]), (b, B - b, [False] * 3)):
            if count:
                _fwd[(triton.cdiv(Nq, block_q), H, count)](
                    q, k, v, mask, q_dot, k_dot, v_dot, o, o_dot, lse, *strides, 0 if mask is None else mask.stride(0), *tangent_strides,
                    first, Nq, Nk, D**-0.5, H, D, mask is not None, *live, precision, block_q, block_k, block_d, num_warps=warps, num_stages=2,
                )  # fmt: skip
        ctx.save_for_backward(q, k, v, mask, o, lse)
        ctx.mark_non_differentiable(o_dot)
        return o, o_dot

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Any) -> Any:
        # plain torch from the saved lse; the library's flash backward takes its place where a GPU can be had to hold it to this one
        q, k, v, mask, o, lse = (x if x is None or x.dtype == torch.bool else x.float() for x in ctx.saved_tensors)
        do, scale = do.float(), q.shape[-1] ** -0.5
        p = torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) * scale - lse[..., None])
        if mask is not None:
            p = p.masked_fill(~mask[:, None, None, :], 0)
        ds = p * (torch.einsum("bihd,bjhd->bhij", do, v) - (do * o).sum(-1).transpose(1, 2)[..., None]) * scale
        dq, dk = torch.einsum("bhij,bjhd->bihd", ds, k), torch.einsum("bhij,bihd->bjhd", ds, q)
        dv = torch.einsum("bhij,bihd->bjhd", p, do)
        dtype = ctx.saved_tensors[0].dtype
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None, None


def fused(q: Tensor | Dual, k: Tensor | Dual, v: Tensor | Dual, mask: Tensor | None = None) -> Tensor | Dual:
    duals = [a for a in (q, k, v) if isinstance(a, Dual)]
    b = leading(duals, "attention") if duals else 0
    (q, q_dot), (k, k_dot), (v, v_dot) = halves(q), halves(k), halves(v)
    if q.ndim != 4 or k.ndim != 4 or not 1 <= q.shape[3] <= 256:
        raise ValueError(f"attention: q is {tuple(q.shape)}, k is {tuple(k.shape)}; expected [B, N, H, D] with D at most 256")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"attention: mask is {mask.dtype}; expected bool [B, Nk], True where a key is attended to")
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    kv = (B, Nk, H, D)
    check("attention", q, q=(q, (B, Nq, H, D)), k=(k, kv), v=(v, kv), mask=(mask, (B, Nk)))
    check("attention", q, q_dot=(q_dot, (b, Nq, H, D)), k_dot=(k_dot, (b, *kv[1:])), v_dot=(v_dot, (b, *kv[1:])))
    o, o_dot = _Attention.apply(q, k, v, mask, q_dot, k_dot, v_dot)
    return Dual(o, o_dot) if duals else o


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | None]:
    s = case.shape
    normal = lambda n: torch.randn(s["B"], n, s["H"], s["D"], generator=generator, dtype=dtype).to(device)  # noqa: E731
    mask = None
    if s.get("masked"):  # sample 0 attends to one key, the last one (of several) to none, the others to a growing number
        lengths = torch.linspace(1, s["Nk"], s["B"]).round()
        lengths[-1] = 0 if s["B"] > 1 else s["Nk"]
        mask = (torch.arange(s["Nk"])[None] < lengths[:, None]).to(device)
    return dict(q=normal(s["Nq"]), k=normal(s["Nk"]), v=normal(s["Nk"]), mask=mask)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    products = 2 * s["B"] + case.b * (2 + 2 * ("k" in case.live) / 2 + ("v" in case.live))
    q, k = s["Nq"] * s["H"] * s["D"], s["Nk"] * s["H"] * s["D"]
    moved = 2 * q * (s["B"] + case.b) + k * (2 * s["B"] + case.b * (("k" in case.live) + ("v" in case.live)))
    return Cost(2 * products * q * s["Nk"], itemsize * moved)


QKV = ("q", "k", "v")
attention = Op(
    "attention",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("q", "k", "v", "mask"),
    triton=fused,
    cases=[
        Case("self", dict(B=3, Nq=9, Nk=9, H=2, D=16), QKV),
        Case("cross-masked", dict(B=3, Nq=10, Nk=7, H=2, D=16, masked=1, b=2), ("q",)),
        Case("all-live-masked", dict(B=3, Nq=5, Nk=19, H=2, D=24, masked=1), QKV),
        Case("one-key", dict(B=2, Nq=3, Nk=1, H=1, D=16, b=1), QKV),
        Case("head-112", dict(B=2, Nq=17, Nk=35, H=1, D=112), ("q",)),
        Case("sana-1.6b-cross", dict(B=4, Nq=1024, Nk=730, H=20, D=112), ("q",), frozenset({"bench"})),
    ],
)
