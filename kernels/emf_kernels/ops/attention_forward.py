"""Softmax attention's forward kernel, and what it shares with the backward: tiles, and which keys a query attends to.

The op, its mathematics and its launches are in attention.py, the kernels of its backward in attention_backward.py.

MASK says what mask_ptr points to: "none"; "keys": [B, Nk]; "dense": [B, H, Nq, Nk]; "blocks": for each row of blocks
[B, H, Nq / SIZE] the number of its live blocks, and then their places in ascending order. Strides along dimensions that
a mask or bias has not got are 0. GROUP query heads share a head of keys and values. PACKED: a row of the batch holds
sequences one after another, and a program has a tile of one of them (_sequence).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(ptr, start, stride_n, n, d, inside):
    return tl.load(ptr + start * stride_n + (n[:, None] * stride_n + d[None, :]), mask=inside, other=0)


@triton.jit
def _dead(j, inside, mask_ptr, MASK: tl.constexpr):
    """What is added to the scores of keys j: 0, and -inf where a key is not attended to by any query."""
    if MASK == "keys":
        inside = tl.load(mask_ptr + j, mask=inside, other=0) != 0
    return tl.where(inside, 0.0, float("-inf"))


@triton.jit
def _pairs(
    i, j, inside, mask_ptr, mask_n, bias_ptr, bias_n, MASK: tl.constexpr, SIZE: tl.constexpr, BIASED: tl.constexpr
):
    """What a bias and a mask that differs by query add to the scores of queries i and keys j, in units of log2. An
    entry of the mask stands for SIZE x SIZE pairs."""
    added = tl.where(inside, 0.0, float("-inf"))
    if BIASED:
        bias = tl.load(bias_ptr + (i.to(tl.int64) * bias_n + j), mask=inside, other=0)
        added += bias.to(tl.float32) * LOG2E
    if MASK == "dense":
        live = tl.load(mask_ptr + ((i // SIZE).to(tl.int64) * mask_n + j // SIZE), mask=inside, other=0) != 0
        added = tl.where(live, added, float("-inf"))
    return added


@triton.jit
def _sequence(at, own_ptr, other_ptr, N, other_N, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """(first token, length, tile) of the at-th tile of a row in which sequences lie one after another, and (first
    token, length) of the same sequence on the other side, of queries or keys.

    Sequence s lies between the places s and s + 1 of PLACES. What lies before the first place, or after the last, is
    taken for a sequence of its own that has nothing on the other side. Places are kept within the row. A sequence has
    the tiles from begin // BLOCK + s on: enough for its length, before those of the next one, and some may be empty.
    """
    TABLE: tl.constexpr = triton.next_power_of_2(PLACES + 1)
    s = tl.arange(0, TABLE)
    begin = tl.load(own_ptr + s - 1, mask=(s > 0) & (s <= PLACES), other=0)
    begin = tl.minimum(tl.maximum(tl.where(s > PLACES, N, begin), 0), N)
    end = tl.load(own_ptr + s, mask=s < PLACES, other=N)
    length = tl.minimum(tl.maximum(end, begin), N) - begin
    start = begin // BLOCK + s
    which = tl.sum((start <= at).to(tl.int32), 0) - 1
    tile = at - tl.sum(tl.where(s == which, start, 0), 0)
    first, length = tl.sum(tl.where(s == which, begin, 0), 0), tl.sum(tl.where(s == which, length, 0), 0)
    paired = (which > 0) & (which < PLACES)
    other = tl.load(other_ptr + which - 1, mask=paired, other=0)
    other = tl.minimum(tl.maximum(other, 0), other_N)
    other_end = tl.load(other_ptr + which, mask=paired, other=0)
    return first, length, tile, other, tl.minimum(tl.maximum(other_end, other), other_N) - other


@triton.jit
def _attend(
    m, l, mu, a, a_dot,  # noqa: E741
    q, q_dot, centre, k_ptr, v_ptr, k_dot_ptr, v_dot_ptr, mask_ptr, bias_ptr,
    k_n, v_n, k_dot_n, v_dot_n, mask_n, bias_n, start, i, last, Nq, Nk, scale, D: tl.constexpr,
    MASK: tl.constexpr, BIASED: tl.constexpr, CAUSAL: tl.constexpr,
    Q_LIVE: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr,
    EDGE: tl.constexpr, DOWN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running sums. EDGE: some of its keys may be dead; else all are live for all queries.
    last: of each query, the last key that it attends to where CAUSAL."""
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
        s += _dead(j, j < Nk, mask_ptr, MASK)[None, :]
        if CAUSAL:
            s = tl.where(j[None, :] <= last[:, None], s, float("-inf"))
    if BIASED or MASK == "dense":
        both = (i < Nq)[:, None] & (j < Nk)[None, :]
        s += _pairs(i[:, None], j[None, :], both, mask_ptr, mask_n, bias_ptr, bias_n, MASK, 1, BIASED)
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
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, cu_q_ptr, cu_k_ptr, q_dot_ptr, k_dot_ptr, v_dot_ptr,
    o_ptr, o_dot_ptr, lse_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, cu_q_b, cu_k_b,
    q_dot_b, q_dot_n, q_dot_h, k_dot_b, k_dot_n, k_dot_h, v_dot_b, v_dot_n, v_dot_h,
    first, Nq, Nk, scale, H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PLACES: tl.constexpr,
    MASK: tl.constexpr, SIZE: tl.constexpr, BIASED: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    Q_LIVE: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q queries of one head of one sample; keys and values are read once for value and tangent
    head, sample = tl.program_id(1).to(tl.int64), first + tl.program_id(2).to(tl.int64)
    tile, queries, kv = tl.program_id(0), Nq, head
    if GROUP > 1:
        kv = head // GROUP
    if PLACES > 0:  # from here on, what is read and written begins at the sequence
        q_first, queries, tile, k_first, Nk = _sequence(
            tile, cu_q_ptr + sample * cu_q_b, cu_k_ptr + sample * cu_k_b, Nq, Nk, PLACES, BLOCK_Q
        )
        q_first, k_first = q_first.to(tl.int64), k_first.to(tl.int64)
        q_ptr, k_ptr, v_ptr = q_ptr + q_first * q_n, k_ptr + k_first * k_n, v_ptr + k_first * v_n
        o_ptr, o_dot_ptr, lse_ptr = o_ptr + q_first * (H * D), o_dot_ptr + q_first * (H * D), lse_ptr + q_first
        if Q_LIVE:
            q_dot_ptr += q_first * q_dot_n
        if K_LIVE:
            k_dot_ptr += k_first * k_dot_n
        if V_LIVE:
            v_dot_ptr += k_first * v_dot_n
    top, scale = tile.to(tl.int64) * BLOCK_Q, tl.cast(scale, tl.float32)
    rows, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    i = top.to(tl.int32) + rows
    i_inside, last, first_key = (i < queries)[:, None] & (d < D)[None, :], i, 0
    if LOWER:
        last = i + (Nk - queries)
    q = _tile(q_ptr + sample * q_b + head * q_h, top, q_n, rows, d, i_inside)
    q_dot = q
    k_ptr += sample * k_b + kv * k_h
    v_ptr += sample * v_b + kv * v_h
    if MASK != "none":
        mask_ptr += sample * mask_b
    if MASK == "dense" or MASK == "blocks":
        mask_ptr += head * mask_h
    if MASK == "blocks":
        mask_ptr += top // SIZE * mask_n
        first_key = tl.load(mask_ptr + 1) * SIZE
    if BIASED:
        bias_ptr += sample * bias_b + head * bias_h
    # w = p * s_dot is rounded to the dtype of v, but mu is not; a constant of the row may be taken from s_dot without
    # changing o_dot, and that of the first key takes with it what all keys have in common
    centre, attended = tl.zeros([BLOCK_Q], tl.float32), d < D
    if Q_LIVE or K_LIVE:
        if MASK == "keys":
            attended = attended & (tl.load(mask_ptr) != 0)
        if PLACES > 0:
            attended = attended & (Nk > 0)
        if Q_LIVE:
            q_dot = _tile(q_dot_ptr + sample * q_dot_b + head * q_dot_h, top, q_dot_n, rows, d, i_inside)
            k = tl.load(k_ptr + first_key * k_n + d, mask=attended, other=0).to(tl.float32)
            centre += tl.sum(q_dot.to(tl.float32) * k[None, :], 1)
        if K_LIVE:
            k_dot_ptr += sample * k_dot_b + kv * k_dot_h
            k_dot = tl.load(k_dot_ptr + first_key * k_dot_n + d, mask=attended, other=0).to(tl.float32)
            centre += tl.sum(q.to(tl.float32) * k_dot[None, :], 1)
        centre *= scale
        if BIASED or MASK == "dense":
            added = _pairs(i, 0, i < queries, mask_ptr, mask_n, bias_ptr, bias_n, MASK, 1, BIASED)
            centre = tl.where(added > float("-inf"), centre, 0.0)
    if V_LIVE:
        v_dot_ptr += sample * v_dot_b + kv * v_dot_h
    # float16 ends at 65504: what goes into a_dot is held 64 times smaller, which costs no digits that o_dot has
    DOWN: tl.constexpr = 0.015625 if q_ptr.dtype.element_ty == tl.float16 else 1.0
    # m starts at the least number and not at -inf: as long as no key is live, s - m is -inf - m, and not -inf + inf
    m, l = tl.full([BLOCK_Q], -3.4028235e38, tl.float32), tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    mu = tl.zeros([BLOCK_Q], tl.float32)
    a, a_dot, end = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), Nk
    if MASK == "blocks":
        end = tl.load(mask_ptr) * SIZE
    elif CAUSAL:  # the keys after the last of these queries weigh nothing
        end = min(Nk, tile * BLOCK_Q + BLOCK_Q + (Nk - queries if LOWER else 0))
    for step in range(0, end, BLOCK_K):
        start = step
        if MASK == "blocks":
            start = tl.load(mask_ptr + 1 + step // SIZE) * SIZE + step % SIZE
        m, l, mu, a, a_dot = _attend(  # noqa: E741
            m, l, mu, a, a_dot, q, q_dot, centre, k_ptr, v_ptr, k_dot_ptr, v_dot_ptr, mask_ptr, bias_ptr,
            k_n, v_n, k_dot_n, v_dot_n, mask_n, bias_n, tl.full([], start, tl.int64) if WIDE else start,
            i, last, queries, Nk, scale, D,
            MASK, BIASED, CAUSAL, Q_LIVE, K_LIVE, V_LIVE, EDGE, DOWN, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    dead = l == 0
    l = tl.where(dead, 1.0, l)  # noqa: E741
    o = a / l[:, None]
    out = (sample * Nq + top) * (H * D) + head * D
    within = rows[:, None] * (H * D) + d[None, :]
    tl.store(o_ptr + out + within, o, mask=i_inside)
    lse = tl.where(dead, float("inf"), (m + tl.log2(l)) / LOG2E)  # +inf: exp(s - lse) is 0 in backward
    tl.store(lse_ptr + (sample * H + head) * Nq + i, lse, mask=i < queries)
    if Q_LIVE or K_LIVE or V_LIVE:
        tl.store(o_dot_ptr + out + within, (a_dot * (1 / DOWN) - mu[:, None] * o) / l[:, None], mask=i_inside)
