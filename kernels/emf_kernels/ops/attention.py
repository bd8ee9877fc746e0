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

from emf_kernels import attention_library as library
from emf_kernels import launch
from emf_kernels.dual import check
from emf_kernels.function import function
from emf_kernels.op import Case, Cost, Op
from emf_kernels.tiles import cdiv, empty, fitting, next_power_of_2, precision, strides, wide


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
def _tile(ptr, start, stride_n, n, d, inside):
    return tl.load(ptr + start * stride_n + (n[:, None] * stride_n + d[None, :]), mask=inside, other=0)


@triton.jit
def _dead(j, inside, mask_ptr, MASKED: tl.constexpr):
    """What is added to the scores of keys j: 0, and -inf where a key is not attended to."""
    if MASKED:
        inside = tl.load(mask_ptr + j, mask=inside, other=0) != 0
    return tl.where(inside, 0.0, float("-inf"))


@triton.jit
def _attend(
    m, l, mu, a, a_dot,  # noqa: E741
    q, q_dot, centre, k_ptr, v_ptr, k_dot_ptr, v_dot_ptr, mask_ptr, k_n, v_n, k_dot_n, v_dot_n,
    start, i, Nk, scale, D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, Q_LIVE: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr,
    EDGE: tl.constexpr, DOWN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running sums. EDGE: some of its keys may be dead; else all are live for all queries."""
    n, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    j = (start + n).to(tl.int32)
    inside = tl.broadcast_to((d < D)[None, :], BLOCK_K, BLOCK_D)
    if EDGE:
        inside = inside & (j < Nk)[:, None]
    k, v = _tile(k_ptr, start, k_n, n, d, inside), _tile(v_ptr, start, v_n, n, d, inside)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    # every product that needs no softmax is issued before it, for the tensor cores to work on meanwhile
    s_dot = s
    if Q_LIVE:
        s_dot = tl.dot(q_dot, tl.trans(k), input_precision=PRECISION)
    if K_LIVE:
        k_dot = _tile(k_dot_ptr, start, k_dot_n, n, d, inside)
        if Q_LIVE:
            s_dot = tl.dot(q, tl.trans(k_dot), s_dot, input_precision=PRECISION)
        else:
            s_dot = tl.dot(q, tl.trans(k_dot), input_precision=PRECISION)
    s = s * (scale * LOG2E)  # in units of log2, for exp2
    if EDGE:
        s += _dead(j, j < Nk, mask_ptr, MASKED)[None, :]
        if CAUSAL:
            s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))
    m_next = tl.maximum(m, tl.max(s, 1))
    p, shrink = tl.exp2(s - m_next[:, None]), tl.exp2(m - m_next)
    l = l * shrink + tl.sum(p, 1)  # noqa: E741
    # both before the first product: between two of them ptxas would wait for each
    a, a_dot = a * shrink[:, None], a_dot * shrink[:, None]
    a = tl.dot(p.to(v.dtype), v, a, input_precision=PRECISION)
    if V_LIVE:
        v_dot = _tile(v_dot_ptr, start, v_dot_n, n, d, inside)
        a_dot = tl.dot((p * DOWN).to(v.dtype), v_dot, a_dot, input_precision=PRECISION)
    if Q_LIVE or K_LIVE:
        w = p * (s_dot * scale - centre[:, None])
        mu = mu * shrink + tl.sum(w, 1)
        a_dot = tl.dot((w * DOWN).to(v.dtype), v, a_dot, input_precision=PRECISION)
    return m_next, l, mu, a, a_dot


@triton.jit
def _fwd(
    q_ptr, k_ptr, v_ptr, mask_ptr, q_dot_ptr, k_dot_ptr, v_dot_ptr, o_ptr, o_dot_ptr, lse_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b,
    q_dot_b, q_dot_n, q_dot_h, k_dot_b, k_dot_n, k_dot_h, v_dot_b, v_dot_n, v_dot_h,
    first, Nq, Nk, scale, H: tl.constexpr, D: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, Q_LIVE: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr,
    EDGE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q queries of one head of one sample; keys and values are read once for value and tangent
    head, sample = tl.program_id(1).to(tl.int64), first + tl.program_id(2).to(tl.int64)
    top, scale = tl.program_id(0).to(tl.int64) * BLOCK_Q, tl.cast(scale, tl.float32)
    rows, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    i = top.to(tl.int32) + rows
    i_inside = (i < Nq)[:, None] & (d < D)[None, :]
    q = _tile(q_ptr + sample * q_b + head * q_h, top, q_n, rows, d, i_inside)
    q_dot = q
    k_ptr += sample * k_b + head * k_h
    v_ptr += sample * v_b + head * v_h
    if MASKED:
        mask_ptr += sample * mask_b
    # w = p * s_dot is rounded to the dtype of v, but mu is not; a constant of the row may be taken from s_dot without
    # changing o_dot, and that of the first key takes with it what all keys have in common
    centre, attended = tl.zeros([BLOCK_Q], tl.float32), d < D
    if Q_LIVE or K_LIVE:
        if MASKED:
            attended = attended & (tl.load(mask_ptr) != 0)
        if Q_LIVE:
            q_dot = _tile(q_dot_ptr + sample * q_dot_b + head * q_dot_h, top, q_dot_n, rows, d, i_inside)
            k = tl.load(k_ptr + d, mask=attended, other=0).to(tl.float32)
            centre += tl.sum(q_dot.to(tl.float32) * k[None, :], 1)
        if K_LIVE:
            k_dot_ptr += sample * k_dot_b + head * k_dot_h
            k_dot = tl.load(k_dot_ptr + d, mask=attended, other=0).to(tl.float32)
            centre += tl.sum(q.to(tl.float32) * k_dot[None, :], 1)
        centre *= scale
    if V_LIVE:
        v_dot_ptr += sample * v_dot_b + head * v_dot_h
    # float16 ends at 65504: what goes into a_dot is held 64 times smaller, which costs no digits that o_dot has
    DOWN: tl.constexpr = 0.015625 if q_ptr.dtype.element_ty == tl.float16 else 1.0
    # m starts at the least number and not at -inf: as long as no key is live, s - m is -inf - m, and not -inf + inf
    m, l = tl.full([BLOCK_Q], -3.4028235e38, tl.float32), tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    mu = tl.zeros([BLOCK_Q], tl.float32)
    a, a_dot, end = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), Nk
    if CAUSAL:  # the keys after the last of these queries weigh nothing
        end = min(Nk, tl.program_id(0) * BLOCK_Q + BLOCK_Q)
    for start in range(0, end, BLOCK_K):
        m, l, mu, a, a_dot = _attend(  # noqa: E741
            m, l, mu, a, a_dot, q, q_dot, centre, k_ptr, v_ptr, k_dot_ptr, v_dot_ptr, mask_ptr,
            k_n, v_n, k_dot_n, v_dot_n, tl.full([], start, tl.int64) if WIDE else start, i, Nk, scale, D,
            MASKED, CAUSAL, Q_LIVE, K_LIVE, V_LIVE, EDGE, DOWN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    dead = l == 0
    l = tl.where(dead, 1.0, l)  # noqa: E741
    o = a / l[:, None]
    out = (sample * Nq + top) * (H * D) + head * D
    within = rows[:, None] * (H * D) + d[None, :]
    tl.store(o_ptr + out + within, o, mask=i_inside)
    lse = tl.where(dead, float("inf"), (m + tl.log2(l)) / LOG2E)  # +inf: exp(s - lse) is 0 in backward
    tl.store(lse_ptr + (sample * H + head) * Nq + i, lse, mask=i < Nq)
    if Q_LIVE or K_LIVE or V_LIVE:
        tl.store(o_dot_ptr + out + within, (a_dot * (1 / DOWN) - mu[:, None] * o) / l[:, None], mask=i_inside)


@triton.jit
def _bwd_q(
    do_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, lse_ptr, dq_ptr, do_o_ptr,
    do_b, do_n, do_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, Nq, Nk, scale,
    H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q queries of one head of one sample; p is computed again from lse; rowsum(do * o) is kept
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    top, scale = tl.program_id(0).to(tl.int64) * BLOCK_Q, tl.cast(scale, tl.float32)
    rows, n, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    i = top.to(tl.int32) + rows
    i_inside = (i < Nq)[:, None] & (d < D)[None, :]
    out = (sample * Nq + top) * (H * D) + head * D
    within = rows[:, None] * (H * D) + d[None, :]
    line = (sample * H + head) * Nq + i
    q = _tile(q_ptr + sample * q_b + head * q_h, top, q_n, rows, d, i_inside)
    do = _tile(do_ptr + sample * do_b + head * do_h, top, do_n, rows, d, i_inside)
    o = tl.load(o_ptr + out + within, mask=i_inside, other=0)
    do_o = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(do_o_ptr + line, do_o, mask=i < Nq)
    lse = tl.load(lse_ptr + line, mask=i < Nq, other=float("inf")) * LOG2E
    k_ptr += sample * k_b + head * k_h
    v_ptr += sample * v_b + head * v_h
    if MASKED:
        mask_ptr += sample * mask_b
    dq, end = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), Nk
    if CAUSAL:
        end = min(Nk, tl.program_id(0) * BLOCK_Q + BLOCK_Q)
    for first in range(0, end, BLOCK_K):
        start = tl.full([], first, tl.int64) if WIDE else first
        j = (start + n).to(tl.int32)
        inside = (j < Nk)[:, None] & (d < D)[None, :]
        k, v = _tile(k_ptr, start, k_n, n, d, inside), _tile(v_ptr, start, v_n, n, d, inside)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        s = s * (scale * LOG2E) + _dead(j, j < Nk, mask_ptr, MASKED)[None, :]
        if CAUSAL:
            s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))
        ds = tl.exp2(s - lse[:, None]) * (dp - do_o[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(dq_ptr + out + within, dq * scale, mask=i_inside)


@triton.jit
def _bwd_kv(
    do_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, lse_ptr, do_o_ptr, dk_ptr, dv_ptr,
    do_b, do_n, do_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, Nq, Nk, scale,
    H: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_K keys of one head of one sample, so that dk and dv are sums in a fixed order; s, p, dp, ds
    # are held transposed, [keys, queries]
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    left, scale = tl.program_id(0).to(tl.int64) * BLOCK_K, tl.cast(scale, tl.float32)
    rows, n, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    j = left.to(tl.int32) + n
    j_inside = (j < Nk)[:, None] & (d < D)[None, :]
    k = _tile(k_ptr + sample * k_b + head * k_h, left, k_n, n, d, j_inside)
    v = _tile(v_ptr + sample * v_b + head * v_h, left, v_n, n, d, j_inside)
    if MASKED:
        mask_ptr += sample * mask_b
    dead = _dead(j, j < Nk, mask_ptr, MASKED)
    q_ptr += sample * q_b + head * q_h
    do_ptr += sample * do_b + head * do_h
    line = (sample * H + head) * Nq
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    begin = 0
    if CAUSAL:  # the queries before the first of these keys do not attend to them
        begin = tl.program_id(0) * BLOCK_K // BLOCK_Q * BLOCK_Q
    for first in range(begin, Nq, BLOCK_Q):
        start = tl.full([], first, tl.int64) if WIDE else first
        i = (start + rows).to(tl.int32)
        inside = (i < Nq)[:, None] & (d < D)[None, :]
        q, do = _tile(q_ptr, start, q_n, rows, d, inside), _tile(do_ptr, start, do_n, rows, d, inside)
        lse = tl.load(lse_ptr + line + i, mask=i < Nq, other=float("inf")) * LOG2E
        do_o = tl.load(do_o_ptr + line + i, mask=i < Nq, other=0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        s = s * (scale * LOG2E) + dead[:, None]
        if CAUSAL:
            s = tl.where(j[:, None] <= i[None, :], s, float("-inf"))
        p = tl.exp2(s - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - do_o[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    out = (sample * Nk + left) * (H * D) + head * D + (n[:, None] * (H * D) + d[None, :])
    tl.store(dk_ptr + out, dk * scale, mask=j_inside)
    tl.store(dv_ptr + out, dv, mask=j_inside)


def config(q: Tensor, Nk: int, live: Sequence[bool], masked: bool) -> dict[str, int]:
    """Tile sizes, warps and stages: by head size, lengths up to 128, how many products a tile has, and a key mask."""
    block_d, nq, nk = (max(16, next_power_of_2(n)) for n in (q.shape[3], q.shape[1], Nk))
    most_q = 128 if block_d * q.element_size() <= 256 else 64
    most_k = 64 if block_d * q.element_size() <= 128 else 32
    block_q, block_k = min(most_q, nq), min(most_k, nk)
    default = dict(BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=8 if block_q >= most_q else 4, num_stages=2)
    if any(live) and q.element_size() == 4 and block_d >= 128:
        # of three-part products, larger tiles leave some of ptxas's results with 32 registers and 8 KB of spills, and
        # two groups of warps on one tile read memory that is not theirs (an H100, Triton 3.6)
        default |= dict(BLOCK_Q=min(16, block_q), BLOCK_K=min(16, block_k), num_warps=4)
    default = fitting("attention", default, q, 1 + live[0], 2 + live[1] + live[2])
    products = 2 + live[0] + live[1] + (live[0] or live[1]) + live[2]
    shape = dict(D=block_d, Nq=min(nq, 128), Nk=min(nk, 128), products=products, masked=int(masked))
    return dict(BLOCK_D=block_d) | launch.configuration("attention._fwd", q, default, **shape)


def config_backward(kernel: str, q: Tensor, Nk: int) -> dict[str, int]:
    """Tile sizes, warps and stages, by head size and lengths up to 128. What stays in a program is the wider."""
    block_d, nq, nk = (max(16, next_power_of_2(n)) for n in (q.shape[3], q.shape[1], Nk))
    most = 64 if block_d * q.element_size() <= 256 else 32
    block_q, stays = (most, "BLOCK_Q") if kernel == "_bwd_q" else (32, "BLOCK_K")
    default = dict(BLOCK_Q=min(block_q, nq), BLOCK_K=min(most, nk), num_warps=4, num_stages=2)
    default = fitting("attention", default, q, 2, 2, stays)
    shape = dict(D=block_d, Nq=min(nq, 128), Nk=min(nk, 128))
    return dict(BLOCK_D=block_d) | launch.configuration(f"attention.{kernel}", q, default, **shape)


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    q, k, v, mask, causal, scale = values
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    o, o_dot, lse = empty(q, B, Nq, H, D), empty(q, b, Nq, H, D), empty(q, B, H, Nq, dtype=torch.float32)
    # the first b samples with their tangents, then the rest without: the second launch compiles to plain attention
    for first, count, live in ((0, b, [d is not None for d in dots]), (b, B - b, [False] * 3)):
        if count:
            constants = config(q, Nk, live, mask is not None)
            edge = mask is not None or causal or Nk % constants["BLOCK_K"] > 0  # else every tile's keys are live
            _fwd[(cdiv(Nq, constants["BLOCK_Q"]), H, count)](
                q, k, v, mask, *dots, o, o_dot, lse, *strides(q, 3), *strides(k, 3), *strides(v, 3),
                *strides(mask, 1), *(stride for d in dots for stride in strides(d, 3)), first, Nq, Nk, scale, H, D,
                mask is not None, causal, *live, edge, wide(q, k, v, *dots), precision(q), **constants,
            )  # fmt: skip
    return (o,), (o_dot,), (q, k, v, mask, o, lse, causal, scale)


def backward(saved: Sequence[Any], do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the saved lse: by one of PyTorch's kernels where it has one, else by ours."""
    q, k, v, mask, o, lse, causal, scale = saved
    if mask is None and (given := library.backward(do, q, k, v, o, lse, causal=causal, scale=scale)):
        return given
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    dq, dk, dv, do_o = empty(q, B, Nq, H, D), empty(k, B, Nk, H, D), empty(v, B, Nk, H, D), empty(lse, *lse.shape)
    shared = (
        *strides(do, 3), *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(mask, 1), Nq, Nk, scale, H, D,
        mask is not None, causal, wide(do, q, k, v), precision(q),
    )  # fmt: skip
    for_q, for_kv = (config_backward(kernel, q, Nk) for kernel in ("_bwd_q", "_bwd_kv"))
    _bwd_q[(cdiv(Nq, for_q["BLOCK_Q"]), H, B)](do, q, k, v, mask, o, lse, dq, do_o, *shared, **for_q)
    _bwd_kv[(cdiv(Nk, for_kv["BLOCK_K"]), H, B)](do, q, k, v, mask, lse, do_o, dk, dv, *shared, **for_kv)
    return dq, dk, dv


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
fused = function("attention", forward, backward, QKV)
CASES = [
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
]
attention = Op(
    "attention",
    reference,
    inputs,
    cost,
    accepts,
    CASES,
    batched=("q", "k", "v", "mask"),
    live=("q", "k", "v"),
    triton=fused,
)
