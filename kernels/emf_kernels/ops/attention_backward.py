"""Softmax attention's backward kernels: of the queries, of keys and values, of the bias. Each sum has a fixed order.

The op, its mathematics and its launches are in attention.py; the letters, masks and sequences are as in
attention_forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_forward import LOG2E, _dead, _pairs, _sequence, _tile


@triton.jit
def _bwd_q(
    do_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, cu_q_ptr, cu_k_ptr, o_ptr, lse_ptr, dq_ptr, do_o_ptr,
    do_b, do_n, do_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, cu_q_b, cu_k_b, Nq, Nk, scale,
    H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PLACES: tl.constexpr,
    MASK: tl.constexpr, SIZE: tl.constexpr, BIASED: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_Q queries of one head of one sample; p is computed again from lse; rowsum(do * o) is kept
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile, queries, kv = tl.program_id(0), Nq, head
    if GROUP > 1:
        kv = head // GROUP
    if PLACES > 0:  # from here on, what is read and written begins at the sequence
        q_first, queries, tile, k_first, Nk = _sequence(
            tile, cu_q_ptr + sample * cu_q_b, cu_k_ptr + sample * cu_k_b, Nq, Nk, PLACES, BLOCK_Q
        )
        q_first, k_first = q_first.to(tl.int64), k_first.to(tl.int64)
        q_ptr, do_ptr, k_ptr, v_ptr = (
            q_ptr + q_first * q_n,
            do_ptr + q_first * do_n,
            k_ptr + k_first * k_n,
            v_ptr + k_first * v_n,
        )
        o_ptr, dq_ptr = o_ptr + q_first * (H * D), dq_ptr + q_first * (H * D)
        lse_ptr, do_o_ptr = lse_ptr + q_first, do_o_ptr + q_first
    top, scale = tile.to(tl.int64) * BLOCK_Q, tl.cast(scale, tl.float32)
    rows, n, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    i = top.to(tl.int32) + rows
    i_inside, last = (i < queries)[:, None] & (d < D)[None, :], i
    if LOWER:
        last = i + (Nk - queries)
    out = (sample * Nq + top) * (H * D) + head * D
    within = rows[:, None] * (H * D) + d[None, :]
    line = (sample * H + head) * Nq + i
    q = _tile(q_ptr + sample * q_b + head * q_h, top, q_n, rows, d, i_inside)
    do = _tile(do_ptr + sample * do_b + head * do_h, top, do_n, rows, d, i_inside)
    o = tl.load(o_ptr + out + within, mask=i_inside, other=0)
    do_o = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(do_o_ptr + line, do_o, mask=i < queries)
    lse = tl.load(lse_ptr + line, mask=i < queries, other=float("inf")) * LOG2E
    k_ptr += sample * k_b + kv * k_h
    v_ptr += sample * v_b + kv * v_h
    if MASK != "none":
        mask_ptr += sample * mask_b
    if MASK == "dense" or MASK == "blocks":
        mask_ptr += head * mask_h
    if BIASED:
        bias_ptr += sample * bias_b + head * bias_h
    dq, end = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), Nk
    if MASK == "blocks":
        mask_ptr += top // SIZE * mask_n
        end = tl.load(mask_ptr) * SIZE
    elif CAUSAL:
        end = min(Nk, tile * BLOCK_Q + BLOCK_Q + (Nk - queries if LOWER else 0))
    for first in range(0, end, BLOCK_K):
        place = first
        if MASK == "blocks":
            place = tl.load(mask_ptr + 1 + first // SIZE) * SIZE + first % SIZE
        start = tl.full([], place, tl.int64) if WIDE else place
        j = (start + n).to(tl.int32)
        inside = (j < Nk)[:, None] & (d < D)[None, :]
        k, v = _tile(k_ptr, start, k_n, n, d, inside), _tile(v_ptr, start, v_n, n, d, inside)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        s = s * (scale * LOG2E) + _dead(j, j < Nk, mask_ptr, MASK)[None, :]
        if CAUSAL:
            s = tl.where(j[None, :] <= last[:, None], s, float("-inf"))
        if BIASED or MASK == "dense":
            both = (i < queries)[:, None] & (j < Nk)[None, :]
            s += _pairs(i[:, None], j[None, :], both, mask_ptr, mask_n, bias_ptr, bias_n, MASK, 1, BIASED)
        ds = tl.exp2(s - lse[:, None]) * (dp - do_o[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(dq_ptr + out + within, dq * scale, mask=i_inside)


@triton.jit
def _bwd_kv(
    do_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, cu_q_ptr, cu_k_ptr, lse_ptr, do_o_ptr, dk_ptr, dv_ptr,
    do_b, do_n, do_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, cu_q_b, cu_k_b, Nq, Nk, scale,
    H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PLACES: tl.constexpr,
    MASK: tl.constexpr, SIZE: tl.constexpr, BIASED: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_K keys of one head of one sample, so that dk and dv are sums in a fixed order; s, p, dp, ds
    # are held transposed, [keys, queries]; "blocks" are of the transposed mask
    kv, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile, queries, keys = tl.program_id(0), Nq, Nk
    if PLACES > 0:  # from here on, what is read and written begins at the sequence
        k_first, keys, tile, q_first, queries = _sequence(
            tile, cu_k_ptr + sample * cu_k_b, cu_q_ptr + sample * cu_q_b, Nk, Nq, PLACES, BLOCK_K
        )
        q_first, k_first = q_first.to(tl.int64), k_first.to(tl.int64)
        k_ptr, v_ptr, q_ptr, do_ptr = (
            k_ptr + k_first * k_n,
            v_ptr + k_first * v_n,
            q_ptr + q_first * q_n,
            do_ptr + q_first * do_n,
        )
        lse_ptr, do_o_ptr = lse_ptr + q_first, do_o_ptr + q_first
        dk_ptr, dv_ptr = dk_ptr + k_first * (H // GROUP * D), dv_ptr + k_first * (H // GROUP * D)
    left, scale = tile.to(tl.int64) * BLOCK_K, tl.cast(scale, tl.float32)
    rows, n, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    j = left.to(tl.int32) + n
    j_inside, earliest = (j < keys)[:, None] & (d < D)[None, :], j
    if LOWER:
        earliest = j - (keys - queries)
    k = _tile(k_ptr + sample * k_b + kv * k_h, left, k_n, n, d, j_inside)
    v = _tile(v_ptr + sample * v_b + kv * v_h, left, v_n, n, d, j_inside)
    if MASK != "none":
        mask_ptr += sample * mask_b
    if MASK == "blocks":
        mask_ptr += left // SIZE * mask_n
    dead = _dead(j, j < keys, mask_ptr, MASK)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        head = kv * GROUP + member
        q_at, do_at = q_ptr + (sample * q_b + head * q_h), do_ptr + (sample * do_b + head * do_h)
        line = (sample * H + head) * Nq
        begin, end = 0, queries
        if MASK == "blocks":
            end = tl.load(mask_ptr + head * mask_h) * SIZE
        elif CAUSAL:  # the queries before the first of these keys do not attend to them
            begin = tile * BLOCK_K
            if LOWER:
                begin = max(0, begin - (keys - queries))
            begin = begin // BLOCK_Q * BLOCK_Q
        for first in range(begin, end, BLOCK_Q):
            place = first
            if MASK == "blocks":
                place = tl.load(mask_ptr + head * mask_h + 1 + first // SIZE) * SIZE + first % SIZE
            start = tl.full([], place, tl.int64) if WIDE else place
            i = (start + rows).to(tl.int32)
            inside = (i < queries)[:, None] & (d < D)[None, :]
            q, do = _tile(q_at, start, q_n, rows, d, inside), _tile(do_at, start, do_n, rows, d, inside)
            lse = tl.load(lse_ptr + line + i, mask=i < queries, other=float("inf")) * LOG2E
            do_o = tl.load(do_o_ptr + line + i, mask=i < queries, other=0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            s = s * (scale * LOG2E) + dead[:, None]
            if CAUSAL:
                s = tl.where(earliest[:, None] <= i[None, :], s, float("-inf"))
            if BIASED or MASK == "dense":
                both = (j < keys)[:, None] & (i < queries)[None, :]
                own_mask, own_bias = mask_ptr, bias_ptr
                if MASK == "dense":
                    own_mask += head * mask_h
                if BIASED:
                    own_bias += sample * bias_b + head * bias_h
                s += _pairs(i[None, :], j[:, None], both, own_mask, mask_n, own_bias, bias_n, MASK, 1, BIASED)
            p = tl.exp2(s - lse[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (dp - do_o[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    G: tl.constexpr = H // GROUP
    out = (sample * Nk + left) * (G * D) + kv * D + (n[:, None] * (G * D) + d[None, :])
    tl.store(dk_ptr + out, dk * scale, mask=j_inside)
    tl.store(dv_ptr + out, dv, mask=j_inside)


@triton.jit
def _bwd_bias(
    do_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, lse_ptr, do_o_ptr, dbias_ptr,
    do_b, do_n, do_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    mask_b, mask_h, mask_n, bias_b, bias_h, bias_n, samples, heads, Nq, Nk, scale,
    H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    MASK: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: a tile of dbias [B or 1, H or 1, Nq, Nk], summed over the samples and heads that share it
    tiles, scale = (Nk + BLOCK_K - 1) // BLOCK_K, tl.cast(scale, tl.float32)
    top, left = tl.program_id(0) // tiles * BLOCK_Q, tl.program_id(0) % tiles * BLOCK_K
    own_head, own_sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, n, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    i, j = top + rows, left + n
    last = i
    if LOWER:
        last = i + (Nk - Nq)
    both = (i < Nq)[:, None] & (j < Nk)[None, :]
    i_inside, j_inside = (i < Nq)[:, None] & (d < D)[None, :], (j < Nk)[:, None] & (d < D)[None, :]
    dbias = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for member in range(0, samples * heads):
        sample, head = own_sample + member // heads, own_head + member % heads
        kv = head // GROUP
        line = (sample * H + head) * Nq
        q = _tile(q_ptr + sample * q_b + head * q_h, top.to(tl.int64), q_n, rows, d, i_inside)
        do = _tile(do_ptr + sample * do_b + head * do_h, top.to(tl.int64), do_n, rows, d, i_inside)
        k = _tile(k_ptr + sample * k_b + kv * k_h, left.to(tl.int64), k_n, n, d, j_inside)
        v = _tile(v_ptr + sample * v_b + kv * v_h, left.to(tl.int64), v_n, n, d, j_inside)
        lse = tl.load(lse_ptr + line + i, mask=i < Nq, other=float("inf")) * LOG2E
        do_o = tl.load(do_o_ptr + line + i, mask=i < Nq, other=0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        own_mask = mask_ptr
        if MASK != "none":
            own_mask += sample * mask_b
        if MASK == "dense":
            own_mask += head * mask_h
        s = s * (scale * LOG2E) + _dead(j, j < Nk, own_mask, MASK)[None, :]
        if CAUSAL:
            s = tl.where(j[None, :] <= last[:, None], s, float("-inf"))
        s += _pairs(
            i[:, None], j[None, :], both, own_mask, mask_n, bias_ptr + sample * bias_b + head * bias_h, bias_n,
            MASK, SIZE, True,
        )  # fmt: skip
        dbias += tl.exp2(s - lse[:, None]) * (dp - do_o[:, None])
    out = ((own_sample * tl.num_programs(1) + own_head) * Nq + top) * Nk
    tl.store(dbias_ptr + out + (rows[:, None].to(tl.int64) * Nk + j[None, :]), dbias, mask=both)
