"""Softmax attention, self or cross, with a key mask.

Shapes:   q [B, Nq, H, D]; k, v [B, Nk, H, D]; mask [B, Nk] bool (True = attend) or None; causal: query i attends to the
          keys j <= i, Nq = Nk; scale: D^-1/2 where None; o [B, Nq, H, D].
Primal:   s = q k^T scale;  p = softmax(s);  o = p v.  A masked key weighs 0; a sample without any live key gives 0.
Tangent:  s_dot = (q_dot k^T + q k_dot^T) scale;  o_dot = (p * s_dot) v - rowsum(p * s_dot) o + p v_dot
Backward: ds = p * (do v^T - rowsum(do * o)) scale;  dq = ds k;  dk = ds^T q;  dv = p^T do
Source:   FlashAttention-2 (arXiv 2307.08691) for the primal; for the tangent d softmax = p * (s_dot - <p, s_dot>).

The kernel keeps two wide accumulators, a = sum p v and a_dot = sum (p * s_dot) v + p v_dot, and two narrow ones,
l = sum p and mu = sum p * s_dot, with p = exp(s - m) and m the running maximum. At the end o = a / l and
o_dot = (a_dot - mu o) / l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emf_kernels import launch
from emf_kernels.dual import check
from emf_kernels.function import function
from emf_kernels.op import Case, Cost, Op
from emf_kernels.tiles import cdiv, empty, next_power_of_2, strides


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    # packed here as the batched product packs them, but of a single sample too: its view would keep the whole batch's
    # storage until backward
    q, k, v = q.transpose(1, 2).contiguous(), k.permute(0, 2, 3, 1).contiguous(), v.transpose(1, 2).contiguous()
    s = q @ k * (q.shape[-1] ** -0.5 if scale is None else scale)
    dead = unattended(s.shape[2], s.shape[3], mask, causal, q.device)
    p = (s if dead is None else s.masked_fill(dead, torch.finfo(s.dtype).min)).softmax(-1)
    p = p if dead is None else p.masked_fill(dead, 0)
    return (p @ v).transpose(1, 2)


def unattended(Nq: int, Nk: int, mask: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """True where a query does not attend to a key, broadcast to [B, H, Nq, Nk]; None: nowhere."""
    dead = None if mask is None else ~mask[:, None, None, :]
    if causal:
        later = torch.ones(Nq, Nk, dtype=torch.bool, device=device).triu(1)
        dead = later if dead is None else dead | later
    return dead


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(ptr, stride_b, stride_n, stride_h, sample, head, n, d, inside):
    return tl.load(ptr + sample * stride_b + head * stride_h + n[:, None] * stride_n + d[None, :], mask=inside, other=0)


@triton.jit
def _fwd(
    q_ptr, k_ptr, v_ptr, mask_ptr, q_dot_ptr, k_dot_ptr, v_dot_ptr, o_ptr, o_dot_ptr, lse_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b,
    q_dot_b, q_dot_n, q_dot_h, k_dot_b, k_dot_n, k_dot_h, v_dot_b, v_dot_n, v_dot_h,
    first, Nq, Nk, scale, H: tl.constexpr, D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, Q_LIVE: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q queries of one head of one sample; keys and values are read once for value and tangent
    head, sample = tl.program_id(1), first + tl.program_id(2).to(tl.int64)
    i, d = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    i_inside = (i < Nq)[:, None] & (d < D)[None, :]
    q = _tile(q_ptr, q_b, q_n, q_h, sample, head, i, d, i_inside)
    if Q_LIVE:
        q_dot = _tile(q_dot_ptr, q_dot_b, q_dot_n, q_dot_h, sample, head, i, d, i_inside)
    m, l = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    mu = tl.zeros([BLOCK_Q], tl.float32)
    a, a_dot = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    end = Nk
    if CAUSAL:  # the keys after the last of these queries weigh nothing
        end = min(Nk, tl.program_id(0) * BLOCK_Q + BLOCK_Q)
    for start in range(0, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        inside = (j < Nk)[:, None] & (d < D)[None, :]
        k = _tile(k_ptr, k_b, k_n, k_h, sample, head, j, d, inside)
        v = _tile(v_ptr, v_b, v_n, v_h, sample, head, j, d, inside)
        live = j < Nk
        if MASKED:
            live = live & (tl.load(mask_ptr + sample * mask_b + j, mask=live, other=0) != 0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)  # in units of log2, for exp2
        s = tl.where(live[None, :], s, float("-inf"))
        if CAUSAL:
            s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        reached = tl.where(m_next == float("-inf"), 0.0, m_next)  # no live key so far: -inf - 0, and not -inf - -inf
        p = tl.exp2(s - reached[:, None])
        shrink = tl.exp2(m - reached)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        a = a * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        a_dot = a_dot * shrink[:, None]  # with no live argument this and the next block compile to nothing
        if Q_LIVE or K_LIVE:
            s_dot = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            if Q_LIVE:
                s_dot += tl.dot(q_dot, tl.trans(k), input_precision=PRECISION)
            if K_LIVE:
                k_dot = _tile(k_dot_ptr, k_dot_b, k_dot_n, k_dot_h, sample, head, j, d, inside)
                s_dot += tl.dot(q, tl.trans(k_dot), input_precision=PRECISION)
            w = p * (s_dot * scale)
            mu = mu * shrink + tl.sum(w, 1)
            a_dot += tl.dot(w.to(v.dtype), v, input_precision=PRECISION)
        if V_LIVE:
            v_dot = _tile(v_dot_ptr, v_dot_b, v_dot_n, v_dot_h, sample, head, j, d, inside)
            a_dot += tl.dot(p.to(v.dtype), v_dot, input_precision=PRECISION)
        m = m_next
    dead = l == 0
    l = tl.where(dead, 1.0, l)  # noqa: E741
    o = a / l[:, None]
    out = sample * Nq * H * D + i[:, None] * (H * D) + head * D + d[None, :]
    tl.store(o_ptr + out, o, mask=i_inside)
    lse = tl.where(dead, float("inf"), (m + tl.log2(l)) / LOG2E)  # +inf: exp(s - lse) is 0 in backward
    tl.store(lse_ptr + (sample * H + head) * Nq + i, lse, mask=i < Nq)
    if Q_LIVE or K_LIVE or V_LIVE:
        tl.store(o_dot_ptr + out, (a_dot - mu[:, None] * o) / l[:, None], mask=i_inside)


def config(q: Tensor, Nk: int, live: Sequence[bool]) -> dict[str, int]:
    """Tile sizes, warps and stages: by head size, lengths up to 128, and how many products a tile has."""
    block_d, nq, nk = (max(16, next_power_of_2(n)) for n in (q.shape[3], q.shape[1], Nk))
    most_q = 128 if block_d * q.element_size() <= 256 else 64
    most_k = 64 if block_d * q.element_size() <= 128 else 32
    block_q, block_k = min(most_q, nq), min(most_k, nk)
    default = dict(BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=8 if block_q == 128 else 4, num_stages=2)
    products = 2 + live[0] + live[1] + (live[0] or live[1]) + live[2]
    shape = dict(D=block_d, Nq=min(nq, 128), Nk=min(nk, 128), products=products)
    return dict(BLOCK_D=block_d) | launch.configuration("attention._fwd", q, default, **shape)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    q, k, v, mask, causal, scale = values
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    o, o_dot, lse = empty(q, B, Nq, H, D), empty(q, b, Nq, H, D), empty(q, B, H, Nq, dtype=torch.float32)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    # the first b samples with their tangents, then the rest without: the second launch compiles to plain attention
    for first, count, live in ((0, b, [d is not None for d in dots]), (b, B - b, [False] * 3)):
        if count:
            constants = config(q, Nk, live)
            _fwd[(cdiv(Nq, constants["BLOCK_Q"]), H, count)](
                q, k, v, mask, *dots, o, o_dot, lse, *strides(q, 3), *strides(k, 3), *strides(v, 3),
                *strides(mask, 1), *(stride for d in dots for stride in strides(d, 3)), first, Nq, Nk, scale, H, D,
                mask is not None, causal, *live, precision, **constants,
            )  # fmt: skip
    return (o,), (o_dot,), (q, k, v, mask, o, lse, causal, scale)


def backward(saved: Sequence[Any], do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the saved lse: by PyTorch's flash kernel where it can (it has no key mask), else by plain
    torch, which holds a few float32 [B, H, Nq, Nk]."""
    q, k, v, mask, o, lse, causal, scale = saved
    flash = mask is None and q.dtype != torch.float32 and q.shape[3] % 8 == 0
    if flash and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0):
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # the state of the dropout that there is not
        return torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused, scale=scale
        )
    q_, k_, v_, do = q.float(), k.float(), v.float(), do.float()
    p = torch.exp(torch.einsum("bihd,bjhd->bhij", q_, k_) * scale - lse[..., None])
    dead = unattended(p.shape[2], p.shape[3], mask, causal, q.device)
    p = p if dead is None else p.masked_fill(dead, 0)
    do_o = (do * o.float()).sum(-1).transpose(1, 2)
    ds = p * (torch.einsum("bihd,bjhd->bhij", do, v_) - do_o[..., None]) * scale
    dq, dk = torch.einsum("bhij,bjhd->bihd", ds, k_), torch.einsum("bhij,bihd->bjhd", ds, q_)
    dv = torch.einsum("bhij,bihd->bjhd", p, do)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def accepts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> None:
    if q.ndim != 4 or k.ndim != 4 or not 1 <= q.shape[3] <= 256:
        shapes = f"q is {tuple(q.shape)}, k is {tuple(k.shape)}"
        raise ValueError(f"attention: {shapes}; expected [B, N, H, D] with D at most 256")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"attention: mask is {mask.dtype}; expected bool [B, Nk], True where a key is attended to")
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    check("attention", q, q=(q, (B, Nq, H, D)), k=(k, (B, Nk, H, D)), v=(v, (B, Nk, H, D)), mask=(mask, (B, Nk)))
    if causal and Nq != Nk:
        raise ValueError(f"attention: causal with {Nq} queries and {Nk} keys; expected as many")


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    s = case.shape
    normal = lambda n: torch.randn(s["B"], n, s["H"], s["D"], generator=generator, dtype=dtype).to(device)  # noqa: E731
    mask = None
    if s.get("masked"):  # sample 0 attends to one key, the last of several to none, the others to a growing number
        lengths = torch.linspace(1, s["Nk"], s["B"]).round()
        lengths[-1] = 0 if s["B"] > 1 else s["Nk"]
        mask = (torch.arange(s["Nk"])[None] < lengths[:, None]).to(device)
    causal, scale = bool(s.get("causal")), s["half_scale"] / 2 if s.get("half_scale") else None
    return dict(q=normal(s["Nq"]), k=normal(s["Nk"]), v=normal(s["Nk"]), mask=mask, causal=causal, scale=scale)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    products = 2 * s["B"] + case.b * (2 + 2 * ("k" in case.live) / 2 + ("v" in case.live))
    q, k = s["Nq"] * s["H"] * s["D"], s["Nk"] * s["H"] * s["D"]
    moved = 2 * q * (s["B"] + case.b) + k * (2 * s["B"] + case.b * (("k" in case.live) + ("v" in case.live)))
    return Cost(2 * products * q * s["Nk"] / (2 if s.get("causal") else 1), itemsize * moved)


QKV = ("q", "k", "v")
attention = Op(
    "attention",
    reference,
    inputs=inputs,
    cost=cost,
    accepts=accepts,
    batched=("q", "k", "v", "mask"),
    live=("q", "k", "v"),
    triton=function("attention", forward, backward, QKV),
    cases=[
        Case("self", dict(B=3, Nq=9, Nk=9, H=2, D=16), QKV),
        Case("cross-masked", dict(B=3, Nq=10, Nk=7, H=2, D=16, masked=1, b=2), ("q",)),
        Case("all-live-masked", dict(B=3, Nq=5, Nk=19, H=2, D=24, masked=1), QKV),
        Case("one-key", dict(B=2, Nq=3, Nk=1, H=1, D=16, b=1), QKV),
        Case("tiles", dict(B=2, Nq=70, Nk=150, H=1, D=16), QKV),
        Case("tiles-masked", dict(B=3, Nq=3, Nk=140, H=1, D=16, masked=1, b=2), QKV),
        Case("causal", dict(B=2, Nq=70, Nk=70, H=1, D=16, causal=1, b=1), QKV),
        Case("causal-masked", dict(B=3, Nq=19, Nk=19, H=2, D=16, causal=1, masked=1, half_scale=1), QKV),
        Case("head-112", dict(B=2, Nq=17, Nk=35, H=1, D=112), ("q",)),
        Case("sana-1.6b-cross", dict(B=4, Nq=1024, Nk=730, H=20, D=112), ("q",), frozenset({"bench"})),
        Case("sana-1.6b-masked", dict(B=4, Nq=1024, Nk=300, H=20, D=112, masked=1), ("q",), frozenset({"bench"})),
        Case("self-64", dict(B=1, Nq=2048, Nk=2048, H=8, D=64), QKV, frozenset({"bench"})),
        Case("self-128", dict(B=1, Nq=2048, Nk=2048, H=8, D=128), QKV, frozenset({"bench"})),
    ],
)
