"""ReLU linear attention with the RMS norm of queries and keys inside.

Shapes:   q, k, v [B, N, C], C = H D; q_weight, k_weight [C] or None (no norm); head_size D; o [B, N, C].
Primal:   q' = relu(rmsnorm(q)), k' = relu(rmsnorm(k)), norms across all heads;  per head
          S = sum_n k'_n v_n^T, s = sum_n k'_n;  o_n = (q'_n S) / (q'_n . s + eps)
Tangent:  q'_dot, k'_dot by rmsnorm and the step function;  S_dot = sum k'_dot v^T + k' v_dot^T;  s_dot = sum k'_dot;
          with a = q' S, z = q' . s + eps:
          o_dot = (q'_dot S + q' S_dot - o (q'_dot . s + q' . s_dot)) / z
Backward: da = do / z;  dz = -(do . o) / z;  dS = sum q' da^T;  ds = sum dz q';  dq' = da S^T + dz s;
          dk' = v dS^T + ds;  dv = k' dS;  then the step function and rmsnorm's backward
Source:   SANA (arXiv 2410.10629); diffusers' SanaLinearAttnProcessor2_0: a row of ones in v makes s, eps 1e-15, no
          scale, no mask.

Three launches: the norms of k's rows, which need all heads; S and s, a head at a time, in `chunks` partial sums over N;
o. q's norm is left out: a factor of a row of q' cancels between a and z, in o, in o_dot and in every gradient, but for
eps: beside z it weighs up to 316 times more, as the norm may enlarge a row by so much, and is at most 1e-12 there. So
q' = relu(q q_weight), dq = dq' q_weight and dq_weight = sum of dq' q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dual import check, widened
from ..function import function
from ..op import Case, Cost, Op
from ..tiles import cdiv, empty, next_power_of_2, precision, relu, rounded, rows, strides
from .rmsnorm import backward as rmsnorm_backward
from .rmsnorm import reference as rmsnorm_reference

NORM_EPS = 1e-5


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    head_size: int,
    eps: float = 1e-15,
) -> Tensor:
    dtype, (q, k, v) = q.dtype, map(widened, (q, k, v))
    q, k = (x if w is None else rmsnorm_reference(x, w) for x, w in ((q, q_weight), (k, k_weight)))
    q, k, v = (x.unflatten(-1, (-1, head_size)).transpose(1, 2) for x in (q.relu(), k.relu(), v))
    a, z = q @ (k.transpose(-1, -2) @ v), q @ k.sum(2).unsqueeze(-1)
    return (a / (z + eps)).transpose(1, 2).flatten(2).to(dtype)


@triton.jit
def _norms(
    x_ptr, x_dot_ptr, rstd_ptr, mean_dot_ptr, x_b, x_n, x_dot_b, x_dot_n, N, C, b, eps,
    LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # rstd, and rstd^2 mean(x x_dot) of each row
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // N, row % N
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + sample * x_b + token * x_n + c, mask=c < C, other=0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x) / C + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + row, rstd)
    if LIVE:  # noqa: SIM102
        if sample < b:
            x_dot = tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=c < C, other=0).to(tl.float32)
            tl.store(mean_dot_ptr + row, rstd * rstd * tl.sum(x * x_dot) / C)


@triton.jit
def _dot(a, high, low, PRECISION: tl.constexpr):
    """a (high + low): a state in two parts, so that it is not rounded. In o_dot what v has in common cancels between
    a_dot and o z_dot, and leaves that rounding."""
    product = tl.dot(a, high, input_precision=PRECISION)
    if PRECISION == "tf32":
        product = tl.dot(a, low, product, input_precision=PRECISION)
    return product


@triton.jit
def _tile(ptr, stride_b, stride_n, sample, start, n, c, inside):
    # the tile's place in 64 bits, the places within it in 32
    at = ptr + sample * stride_b + start * stride_n
    return tl.load(at + (n[:, None] * stride_n + c[None, :]), mask=inside, other=0).to(tl.float32)


@triton.jit
def _weight(weight_ptr, c, inside, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr):
    if WEIGHTED:
        return tl.load(weight_ptr + c, mask=inside, other=0).to(tl.float32)
    return tl.full([BLOCK_D], 1.0, tl.float32)


@triton.jit
def _features(
    x_ptr, x_dot_ptr, weight, rstd_ptr, mean_dot_ptr, x_b, x_n, x_dot_b, x_dot_n, sample, start, n, c, inside, N,
    NORMED: tl.constexpr, LIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """relu(x weight), or relu(rmsnorm(x)), of a tile of one head, and its tangent (zeros where there is none)."""
    x = _tile(x_ptr, x_b, x_n, sample, start, n, c, inside)
    x_dot = tl.zeros_like(x)
    if LIVE:
        x_dot = _tile(x_dot_ptr, x_dot_b, x_dot_n, sample, start, n, c, inside)
    if NORMED:
        rstd = tl.load(rstd_ptr + sample * N + start + n, mask=start + n < N, other=0)[:, None]
        if LIVE:
            mean_dot = tl.load(mean_dot_ptr + sample * N + start + n, mask=start + n < N, other=0)[:, None]
            x_dot = rstd * (x_dot - x * mean_dot)
        x = x * rstd
    x, x_dot = x * weight[None, :], x_dot * weight[None, :]
    return rounded(relu(x), PRECISION), rounded(tl.where(x <= 0, 0, x_dot), PRECISION)


@triton.jit
def _sums(S_ptr, s_ptr, sample, head, chunks, H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """S [D, D] and s [D] of one head: the sum of the chunks."""
    i, d = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)
    S, s = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for chunk in range(0, chunks):
        at = (sample * chunks + chunk) * H + head
        S += tl.load(S_ptr + at * D * D + i * D + d[None, :], mask=(i < D) & (d < D)[None, :], other=0)
        s += tl.load(s_ptr + at * D + d, mask=d < D, other=0)
    return S, s


@triton.jit
def _store_sums(S_ptr, s_ptr, S, s, at, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i, d = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)
    tl.store(S_ptr + at * D * D + i * D + d[None, :], S, mask=(i < D) & (d < D)[None, :])
    tl.store(s_ptr + at * D + d, s, mask=d < D)


@triton.jit
def _states(
    k_ptr, v_ptr, k_dot_ptr, v_dot_ptr, weight_ptr, rstd_ptr, mean_dot_ptr, S_ptr, s_ptr, S_dot_ptr, s_dot_ptr,
    k_b, k_n, v_b, v_n, k_dot_b, k_dot_n, v_dot_b, v_dot_n, first, N, H, tokens,
    NORMED: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: `tokens` tokens of one head of one sample
    head, sample = tl.program_id(0), first + tl.program_id(2).to(tl.int64)
    top = tl.program_id(1).to(tl.int64) * tokens
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    c = head * D + d
    weight = _weight(weight_ptr, c, d < D, NORMED, BLOCK_D)
    S, s = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    S_dot, s_dot = S, s
    for past in range(0, min(tokens, tl.maximum(N - top, 0)), BLOCK_N):
        start = top + past
        inside = (start + n < N)[:, None] & (d < D)[None, :]
        k, k_dot = _features(
            k_ptr, k_dot_ptr, weight, rstd_ptr, mean_dot_ptr, k_b, k_n, k_dot_b, k_dot_n,
            sample, start, n, c, inside, N, NORMED, K_LIVE, PRECISION,
        )  # fmt: skip
        v = _tile(v_ptr, v_b, v_n, sample, start, n, c, inside)
        S = tl.dot(tl.trans(k), v, S, input_precision=PRECISION)
        s += tl.sum(k, 0)
        if K_LIVE:
            S_dot = tl.dot(tl.trans(k_dot), v, S_dot, input_precision=PRECISION)
            s_dot += tl.sum(k_dot, 0)
        if V_LIVE:
            v_dot = _tile(v_dot_ptr, v_dot_b, v_dot_n, sample, start, n, c, inside)
            S_dot = tl.dot(tl.trans(k), v_dot, S_dot, input_precision=PRECISION)
    at = (sample * tl.num_programs(1) + tl.program_id(1)) * H + head
    _store_sums(S_ptr, s_ptr, S, s, at, D, BLOCK_D)
    if K_LIVE or V_LIVE:
        _store_sums(S_dot_ptr, s_dot_ptr, S_dot, s_dot, at, D, BLOCK_D)


@triton.jit
def _apply(
    q_ptr, q_dot_ptr, weight_ptr, S_ptr, s_ptr, S_dot_ptr, s_dot_ptr, o_ptr, o_dot_ptr,
    q_b, q_n, q_dot_b, q_dot_n, first, N, H, C, chunks, eps,
    WEIGHTED: tl.constexpr, Q_LIVE: tl.constexpr, STATE_LIVE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: TILES tiles of BLOCK_N tokens of one head of one sample, for which the sums are read once
    head, sample = tl.program_id(1), first + tl.program_id(2).to(tl.int64)
    top = tl.program_id(0).to(tl.int64) * (TILES * BLOCK_N)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    c = head * D + d
    weight = _weight(weight_ptr, c, d < D, WEIGHTED, BLOCK_D)
    S, s = _sums(S_ptr, s_ptr, sample, head, chunks, H, D, BLOCK_D)
    S_dot, s_dot = S, s
    if STATE_LIVE:
        S_dot, s_dot = _sums(S_dot_ptr, s_dot_ptr, sample, head, chunks, H, D, BLOCK_D)
    high, high_dot = rounded(S, PRECISION), rounded(S_dot, PRECISION)
    low, low_dot = S - high, S_dot - high_dot
    for tile in range(0, TILES):
        start = top + tile * BLOCK_N
        inside = (start + n < N)[:, None] & (d < D)[None, :]
        q, q_dot = _features(
            q_ptr, q_dot_ptr, weight, q_ptr, q_ptr, q_b, q_n, q_dot_b, q_dot_n,
            sample, start, n, c, inside, N, False, Q_LIVE, PRECISION,
        )  # fmt: skip
        over = 1 / (tl.sum(q * s[None, :], 1) + tl.cast(eps, tl.float32))[:, None]
        o = _dot(q, high, low, PRECISION) * over
        at = (sample * N + start) * C + (n[:, None] * C + c[None, :])
        tl.store(o_ptr + at, o, mask=inside)
        if Q_LIVE or STATE_LIVE:
            a_dot, z_dot = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N], tl.float32)
            if Q_LIVE:
                a_dot += _dot(q_dot, high, low, PRECISION)
                z_dot += tl.sum(q_dot * s[None, :], 1)
            if STATE_LIVE:
                a_dot += _dot(q, high_dot, low_dot, PRECISION)
                z_dot += tl.sum(q * s_dot[None, :], 1)
            tl.store(o_dot_ptr + at, (a_dot - o * z_dot[:, None]) * over, mask=inside)


@triton.jit
def _bwd_q(
    do_ptr, q_ptr, weight_ptr, S_ptr, s_ptr, dq_ptr, dweight_ptr, dS_ptr, ds_ptr,
    do_b, do_n, q_b, q_n, N, H, C, chunks, tokens, eps,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # as _states: dS, ds and dweight in partial sums [B, chunks, ...], and dq
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    top = tl.program_id(1).to(tl.int64) * tokens
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    c = head * D + d
    weight = _weight(weight_ptr, c, d < D, WEIGHTED, BLOCK_D)
    S, s = _sums(S_ptr, s_ptr, sample, head, chunks, H, D, BLOCK_D)
    S_rounded = rounded(S, PRECISION)
    dS, ds, dweight = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros_like(s), tl.zeros_like(s)
    for past in range(0, min(tokens, tl.maximum(N - top, 0)), BLOCK_N):
        start = top + past
        inside = (start + n < N)[:, None] & (d < D)[None, :]
        x = _tile(q_ptr, q_b, q_n, sample, start, n, c, inside)
        q = rounded(relu(x * weight[None, :]), PRECISION)
        over = 1 / (tl.sum(q * s[None, :], 1) + tl.cast(eps, tl.float32))
        da = _tile(do_ptr, do_b, do_n, sample, start, n, c, inside) * over[:, None]
        dz = -tl.sum(da * tl.dot(q, S_rounded, input_precision=PRECISION), 1) * over
        da = rounded(da, PRECISION)
        dq = tl.dot(da, tl.trans(S_rounded), input_precision=PRECISION) + dz[:, None] * s[None, :]
        dq = tl.where(q <= 0, 0, dq)
        tl.store(dq_ptr + (sample * N + start) * C + (n[:, None] * C + c[None, :]), dq * weight[None, :], mask=inside)
        dS = tl.dot(tl.trans(q), da, dS, input_precision=PRECISION)
        ds += tl.sum(q * dz[:, None], 0)
        if WEIGHTED:
            dweight += tl.sum(dq * x, 0)
    part = sample * tl.num_programs(1) + tl.program_id(1)
    _store_sums(dS_ptr, ds_ptr, dS, ds, part * H + head, D, BLOCK_D)
    if WEIGHTED:
        tl.store(dweight_ptr + part * C + c, dweight, mask=d < D)


@triton.jit
def _bwd_kv(
    k_ptr, v_ptr, weight_ptr, rstd_ptr, dS_ptr, ds_ptr, dk_ptr, dv_ptr, k_b, k_n, v_b, v_n, N, H, C, chunks,
    NORMED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: TILES tiles of BLOCK_N tokens of one head of one sample
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    top = tl.program_id(0).to(tl.int64) * (TILES * BLOCK_N)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    c = head * D + d
    weight = _weight(weight_ptr, c, d < D, NORMED, BLOCK_D)
    dS, ds = _sums(dS_ptr, ds_ptr, sample, head, chunks, H, D, BLOCK_D)
    dS = rounded(dS, PRECISION)
    for tile in range(0, TILES):
        start = top + tile * BLOCK_N
        inside = (start + n < N)[:, None] & (d < D)[None, :]
        k, _ = _features(
            k_ptr, k_ptr, weight, rstd_ptr, rstd_ptr, k_b, k_n, k_b, k_n,
            sample, start, n, c, inside, N, NORMED, False, PRECISION,
        )  # fmt: skip
        v = _tile(v_ptr, v_b, v_n, sample, start, n, c, inside)
        dk = tl.dot(v, tl.trans(dS), input_precision=PRECISION) + ds[None, :]
        at = (sample * N + start) * C + (n[:, None] * C + c[None, :])
        tl.store(dk_ptr + at, tl.where(k <= 0, 0, dk), mask=inside)
        tl.store(dv_ptr + at, tl.dot(k, dS, input_precision=PRECISION), mask=inside)


def config(kernel: str, x: Tensor, D: int, **free: int) -> dict[str, int]:
    """Tokens of a tile, tiles of a program where it keeps nothing from one to the next, and warps. free: further
    parameters, at their defaults."""
    block_d, n = (max(16, next_power_of_2(size)) for size in (D, x.shape[1]))
    # up to 32 features: one warp holds a tile, no product waits for another
    block_n = min(16 if block_d <= 32 else 32, n)
    tiles = dict(TILES=max(1, min(8, n // block_n // 2))) if kernel.endswith(("_apply", "_bwd_kv")) else {}
    default = free | tiles | dict(BLOCK_N=block_n, num_warps=1 if block_d <= 32 else 4)
    return dict(BLOCK_D=block_d, D=D) | launch.configuration(kernel, x, default, D=block_d, N=min(n, 4096))


def tokens_of_a_chunk(N: int, chunks: int, block_n: int) -> int:
    """Whole tiles; the last chunks may have none."""
    return cdiv(cdiv(N, chunks), block_n) * block_n


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (q, k, v, q_weight, k_weight, D, eps), (q_dot, k_dot, v_dot) = values, dots
    B, N, C = q.shape
    wide = lambda *shape: empty(q, *shape, dtype=torch.float32)  # noqa: E731
    # the states' sums in `chunks` parts, so that a small batch fills a GPU too
    states = config("linear_attention._states", k, D, chunks=4)
    chunks = min(states.pop("chunks"), cdiv(N, states["BLOCK_N"]))
    tokens, H = tokens_of_a_chunk(N, chunks, states["BLOCK_N"]), C // D
    tiles = config("linear_attention._apply", q, D)
    rstd, mean_dot = (None if k_weight is None else wide(samples, N) for samples in (B, b))
    if k_weight is not None:
        _norms[(B * N,)](
            k, k_dot, rstd, mean_dot, *strides(k, 2), *strides(k_dot, 2), N, C, b, NORM_EPS, k_dot is not None,
            **rows("linear_attention._norms", k),
        )  # fmt: skip
    o, o_dot, S, s = empty(q, B, N, C), empty(q, b, N, C), wide(B, chunks, H, D, D), wide(B, chunks, H, D)
    S_dot, s_dot = wide(b, chunks, H, D, D), wide(b, chunks, H, D)
    # the first b samples with their tangents, then the rest without
    for first, count, (q_live, k_live, v_live) in ((0, b, [d is not None for d in dots]), (b, B - b, [False] * 3)):
        if count:
            _states[(H, chunks, count)](
                k, v, k_dot, v_dot, k_weight, rstd, mean_dot, S, s, S_dot, s_dot,
                *strides(k, 2), *strides(v, 2), *strides(k_dot, 2), *strides(v_dot, 2), first, N, H, tokens,
                k_weight is not None, k_live, v_live, precision(q), **states,
            )  # fmt: skip
            _apply[(cdiv(N, tiles["TILES"] * tiles["BLOCK_N"]), H, count)](
                q, q_dot, q_weight, S, s, S_dot, s_dot, o, o_dot,
                *strides(q, 2), *strides(q_dot, 2), first, N, H, C, chunks, eps,
                q_weight is not None, q_live, k_live or v_live, precision(q), **tiles,
            )  # fmt: skip
    return (o,), (o_dot,), (q, k, v, q_weight, k_weight, rstd, S, s, D, eps)


def backward(saved: Sequence[Any], do: Tensor) -> Any:
    q, k, v, q_weight, k_weight, rstd, S, s, D, eps = saved
    (B, N, C), (chunks, H) = q.shape, s.shape[1:3]
    for_q, for_kv = (config(f"linear_attention.{kernel}", q, D) for kernel in ("_bwd_q", "_bwd_kv"))
    tokens = tokens_of_a_chunk(N, chunks, for_q["BLOCK_N"])
    dq, dk, dv = (empty(q, B, N, C) for _ in range(3))
    dS, ds = (empty(a, *a.shape) for a in (S, s))
    dq_weight, dk_weight = None if q_weight is None else empty(s, B, chunks, C), None
    _bwd_q[(H, chunks, B)](
        do, q, q_weight, S, s, dq, dq_weight, dS, ds, *strides(do, 2), *strides(q, 2), N, H, C, chunks, tokens,
        eps, q_weight is not None, precision(q), **for_q,
    )  # fmt: skip
    _bwd_kv[(cdiv(N, for_kv["TILES"] * for_kv["BLOCK_N"]), H, B)](
        k, v, k_weight, rstd, dS, ds, dk, dv, *strides(k, 2), *strides(v, 2), N, H, C, chunks,
        k_weight is not None, precision(q), **for_kv,
    )  # fmt: skip
    if k_weight is not None:
        dk, dk_weight = rmsnorm_backward((k, k_weight, rstd), dk)
    return dq, dk, dv, None if dq_weight is None else dq_weight.sum((0, 1)).to(q_weight.dtype), dk_weight


def accepts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    head_size: int,
    eps: float = 1e-15,
) -> None:
    op = "linear_attention"
    if q.ndim != 3 or q.shape[2] > 16384:
        raise ValueError(f"{op}: q is {tuple(q.shape)}; expected [B, N, C] with C at most 16384")
    shape, C = tuple(q.shape), q.shape[2]
    if not 1 <= head_size <= 128 or C % head_size:
        raise ValueError(f"{op}: head_size {head_size}; expected at most 128 and a divisor of C, {C}")
    if not 0 <= eps <= (1e-9 if q_weight is None else 1e-12):
        raise ValueError(f"{op}: eps is {eps}; expected at most 1e-12, without a norm of q 1e-9")
    check(op, q, q=(q, shape), k=(k, shape), v=(v, shape), q_weight=(q_weight, (C,)), k_weight=(k_weight, (C,)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    q, k, v = (normal(s["B"], s["N"], s["H"] * s["D"]) for _ in range(3))
    weight = [None if s.get("plain") else 1 + 0.2 * normal(s["H"] * s["D"]) for _ in range(2)]
    size, eps = (2**-10, 1e-9 if s.get("plain") else 1e-12) if s.get("small") else (1, 1e-15)  # small: eps counts
    return dict(q=q * size, k=k * size, v=v, q_weight=weight[0], k_weight=weight[1], head_size=s["D"], eps=eps)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["H"] * s["D"]
    return Cost((4 * s["B"] + 8 * case.b) * n * (s["D"] + 1), itemsize * (s["B"] + case.b) * 4 * n)


fused = function("linear_attention", forward, backward, ("q", "k", "v"))
# head sizes of 16 and more: of four features often one is positive, o does not depend on it, and dq is rounding
CASES = [
    Case("small", dict(B=3, N=6, H=2, D=16), ("q", "k", "v")),
    Case("ragged", dict(B=3, N=5, H=3, D=24, b=1, small=1), ("q", "k", "v")),
    Case("no-norm", dict(B=2, N=5, H=2, D=16, plain=1, small=1), ("q", "k", "v")),
    Case("one-token", dict(B=2, N=1, H=2, D=32), ("q", "k", "v")),
    Case("keys-only", dict(B=2, N=5, H=2, D=16), ("k",)),
    Case("chunks", dict(B=2, N=70, H=2, D=20, b=1), ("q", "k", "v")),  # several tiles in several partial sums
    Case("sana-1.6b", dict(B=4, N=1024, H=70, D=32), ("q", "k", "v"), frozenset({"bench"})),
]
linear_attention = Op(
    "linear_attention", reference, inputs, cost, accepts, CASES, batched=("q", "k", "v"), triton=fused
)
