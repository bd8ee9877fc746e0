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

Three launches: the rows' norms, which need all heads; S and s, a head at a time, in `chunks` partial sums over N; o.
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
from emf_kernels.tiles import cdiv, empty, next_power_of_2, rows, strides

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
    q, k = (x if w is None else rmsnorm_reference(x, w) for x, w in ((q, q_weight), (k, k_weight)))
    q, k, v = (x.unflatten(-1, (-1, head_size)).transpose(1, 2) for x in (q.relu(), k.relu(), v))
    a, z = q @ (k.transpose(-1, -2) @ v), q @ k.sum(2).unsqueeze(-1)
    return (a / (z + eps)).transpose(1, 2).flatten(2)


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
    rstd = 1 / tl.sqrt(tl.sum(x * x) / C + eps)
    tl.store(rstd_ptr + row, rstd)
    if LIVE:  # noqa: SIM102
        if sample < b:
            x_dot = tl.load(x_dot_ptr + sample * x_dot_b + token * x_dot_n + c, mask=c < C, other=0).to(tl.float32)
            tl.store(mean_dot_ptr + row, rstd * rstd * tl.sum(x * x_dot) / C)


@triton.jit
def _tile(ptr, stride_b, stride_n, sample, n, c, inside):
    return tl.load(ptr + sample * stride_b + n[:, None] * stride_n + c[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def _features(
    x_ptr, x_dot_ptr, weight_ptr, rstd_ptr, mean_dot_ptr, x_b, x_n, x_dot_b, x_dot_n, sample, n, c, inside, N, C,
    NORMED: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    """relu(rmsnorm(x)) of a tile of one head, and its tangent (zeros where there is none)."""
    x = _tile(x_ptr, x_b, x_n, sample, n, c, inside)
    x_dot = tl.zeros_like(x)
    if LIVE:
        x_dot = _tile(x_dot_ptr, x_dot_b, x_dot_n, sample, n, c, inside)
    if NORMED:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0).to(tl.float32)[None, :]
        rstd = tl.load(rstd_ptr + sample * N + n, mask=n < N, other=0)[:, None]
        if LIVE:
            x_dot = rstd * (x_dot - x * tl.load(mean_dot_ptr + sample * N + n, mask=n < N, other=0)[:, None]) * weight
        x = x * rstd * weight
    return tl.maximum(x, 0), tl.where(x > 0, x_dot, 0)


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
    k_b, k_n, v_b, v_n, k_dot_b, k_dot_n, v_dot_b, v_dot_n, first, N, H, C, tokens,
    NORMED: tl.constexpr, K_LIVE: tl.constexpr, V_LIVE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: `tokens` tokens of one head of one sample
    head, chunk, sample = tl.program_id(0), tl.program_id(1), first + tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    c = head * D + d
    S, s = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    S_dot, s_dot = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(chunk * tokens, min(chunk * tokens + tokens, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (d < D)[None, :]
        k, k_dot = _features(
            k_ptr, k_dot_ptr, weight_ptr, rstd_ptr, mean_dot_ptr, k_b, k_n, k_dot_b, k_dot_n,
            sample, n, c, inside, N, C, NORMED, K_LIVE,
        )  # fmt: skip
        v = _tile(v_ptr, v_b, v_n, sample, n, c, inside)
        S += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        s += tl.sum(k, 0)
        if K_LIVE:
            S_dot += tl.dot(tl.trans(k_dot), v, input_precision=PRECISION)
            s_dot += tl.sum(k_dot, 0)
        if V_LIVE:
            v_dot = _tile(v_dot_ptr, v_dot_b, v_dot_n, sample, n, c, inside)
            S_dot += tl.dot(tl.trans(k), v_dot, input_precision=PRECISION)
    at = (sample * tl.num_programs(1) + chunk) * H + head
    _store_sums(S_ptr, s_ptr, S, s, at, D, BLOCK_D)
    if K_LIVE or V_LIVE:
        _store_sums(S_dot_ptr, s_dot_ptr, S_dot, s_dot, at, D, BLOCK_D)


@triton.jit
def _apply(
    q_ptr, q_dot_ptr, weight_ptr, rstd_ptr, mean_dot_ptr, S_ptr, s_ptr, S_dot_ptr, s_dot_ptr, o_ptr, o_dot_ptr,
    q_b, q_n, q_dot_b, q_dot_n, first, N, H, C, chunks, eps,
    NORMED: tl.constexpr, Q_LIVE: tl.constexpr, STATE_LIVE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N tokens of one head of one sample
    head, sample = tl.program_id(1), first + tl.program_id(2).to(tl.int64)
    n, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    c = head * D + d
    inside = (n < N)[:, None] & (d < D)[None, :]
    q, q_dot = _features(
        q_ptr, q_dot_ptr, weight_ptr, rstd_ptr, mean_dot_ptr, q_b, q_n, q_dot_b, q_dot_n,
        sample, n, c, inside, N, C, NORMED, Q_LIVE,
    )  # fmt: skip
    S, s = _sums(S_ptr, s_ptr, sample, head, chunks, H, D, BLOCK_D)
    z = tl.sum(q * s[None, :], 1) + eps
    o = tl.dot(q, S, input_precision=PRECISION) / z[:, None]
    out = (sample * N + n[:, None]) * C + c[None, :]
    tl.store(o_ptr + out, o, mask=inside)
    if Q_LIVE or STATE_LIVE:
        a_dot, z_dot = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        if Q_LIVE:
            a_dot += tl.dot(q_dot, S, input_precision=PRECISION)
            z_dot += tl.sum(q_dot * s[None, :], 1)
        if STATE_LIVE:
            S_dot, s_dot = _sums(S_dot_ptr, s_dot_ptr, sample, head, chunks, H, D, BLOCK_D)
            a_dot += tl.dot(q, S_dot, input_precision=PRECISION)
            z_dot += tl.sum(q * s_dot[None, :], 1)
        tl.store(o_dot_ptr + out, (a_dot - o * z_dot[:, None]) / z[:, None], mask=inside)


@triton.jit
def _bwd_q(
    do_ptr, q_ptr, weight_ptr, rstd_ptr, S_ptr, s_ptr, dq_ptr, dS_ptr, ds_ptr,
    do_b, do_n, q_b, q_n, N, H, C, chunks, tokens, eps, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # as _states: dS and ds in partial sums, and the gradient of q before its norm's backward
    head, chunk, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    c = head * D + d
    S, s = _sums(S_ptr, s_ptr, sample, head, chunks, H, D, BLOCK_D)
    dS, ds = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(chunk * tokens, min(chunk * tokens + tokens, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (d < D)[None, :]
        q, _ = _features(
            q_ptr, q_ptr, weight_ptr, rstd_ptr, rstd_ptr, q_b, q_n, q_b, q_n, sample, n, c, inside, N, C, NORMED, False
        )
        z = tl.sum(q * s[None, :], 1) + eps
        o = tl.dot(q, S, input_precision=PRECISION) / z[:, None]
        do = _tile(do_ptr, do_b, do_n, sample, n, c, inside)
        da = do / z[:, None]
        dz = -tl.sum(do * o, 1) / z
        dq = tl.dot(da, tl.trans(S), input_precision=PRECISION) + dz[:, None] * s[None, :]
        tl.store(dq_ptr + (sample * N + n[:, None]) * C + c[None, :], tl.where(q > 0, dq, 0), mask=inside)
        dS += tl.dot(tl.trans(q), da, input_precision=PRECISION)
        ds += tl.sum(q * dz[:, None], 0)
    _store_sums(dS_ptr, ds_ptr, dS, ds, (sample * tl.num_programs(1) + chunk) * H + head, D, BLOCK_D)


@triton.jit
def _bwd_kv(
    k_ptr, v_ptr, weight_ptr, rstd_ptr, dS_ptr, ds_ptr, dk_ptr, dv_ptr, k_b, k_n, v_b, v_n, N, H, C, chunks,
    NORMED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    c = head * D + d
    inside = (n < N)[:, None] & (d < D)[None, :]
    k, _ = _features(
        k_ptr, k_ptr, weight_ptr, rstd_ptr, rstd_ptr, k_b, k_n, k_b, k_n, sample, n, c, inside, N, C, NORMED, False
    )
    v = _tile(v_ptr, v_b, v_n, sample, n, c, inside)
    dS, ds = _sums(dS_ptr, ds_ptr, sample, head, chunks, H, D, BLOCK_D)
    dk = tl.dot(v, tl.trans(dS), input_precision=PRECISION) + ds[None, :]
    out = (sample * N + n[:, None]) * C + c[None, :]
    tl.store(dk_ptr + out, tl.where(k > 0, dk, 0), mask=inside)
    tl.store(dv_ptr + out, tl.dot(k, dS, input_precision=PRECISION), mask=inside)


def config(kernel: str, x: Tensor, D: int, **free: int) -> dict[str, int]:
    """Tokens of a tile, and warps. free: further parameters, at their defaults."""
    block_d, n = (max(16, next_power_of_2(size)) for size in (D, x.shape[1]))
    default = free | dict(BLOCK_N=min(64, n), num_warps=4)
    return dict(BLOCK_D=block_d, D=D) | launch.configuration(kernel, x, default, D=block_d, N=min(n, 4096))


def tokens_of_a_chunk(N: int, chunks: int, block_n: int) -> int:
    """Whole tiles; the last chunks may have none."""
    return cdiv(cdiv(N, chunks), block_n) * block_n


def precision(x: Tensor) -> str:
    """How float32 operands are multiplied: exactly for float32 tensors, in tf32 (10 bits) for half precision."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    (q, k, v, q_weight, k_weight, D, eps), (q_dot, k_dot, v_dot) = values, dots
    B, N, C = q.shape
    wide = lambda *shape: empty(q, *shape, dtype=torch.float32)  # noqa: E731
    # the states' sums in `chunks` parts, so that a small batch fills a GPU too
    states = config("linear_attention._states", k, D, chunks=4)
    chunks = min(states.pop("chunks"), cdiv(N, states["BLOCK_N"]))
    tokens, H = tokens_of_a_chunk(N, chunks, states["BLOCK_N"]), C // D
    tiles, norms = config("linear_attention._apply", q, D), rows("linear_attention._norms", q)
    q_rstd, k_rstd, q_mean_dot, k_mean_dot = (
        None if w is None else wide(samples, N) for samples in (B, b) for w in (q_weight, k_weight)
    )
    for x, x_dot, rstd, mean_dot in ((q, q_dot, q_rstd, q_mean_dot), (k, k_dot, k_rstd, k_mean_dot)):
        if rstd is not None:
            _norms[(B * N,)](
                x, x_dot, rstd, mean_dot, *strides(x, 2), *strides(x_dot, 2), N, C, b, NORM_EPS, x_dot is not None,
                **norms,
            )  # fmt: skip
    o, o_dot, S, s = empty(q, B, N, C), empty(q, b, N, C), wide(B, chunks, H, D, D), wide(B, chunks, H, D)
    S_dot, s_dot = wide(b, chunks, H, D, D), wide(b, chunks, H, D)
    # the first b samples with their tangents, then the rest without
    for first, count, (q_live, k_live, v_live) in ((0, b, [d is not None for d in dots]), (b, B - b, [False] * 3)):
        if count:
            _states[(H, chunks, count)](
                k, v, k_dot, v_dot, k_weight, k_rstd, k_mean_dot, S, s, S_dot, s_dot,
                *strides(k, 2), *strides(v, 2), *strides(k_dot, 2), *strides(v_dot, 2), first, N, H, C, tokens,
                k_weight is not None, k_live, v_live, precision(q), **states,
            )  # fmt: skip
            _apply[(cdiv(N, tiles["BLOCK_N"]), H, count)](
                q, q_dot, q_weight, q_rstd, q_mean_dot, S, s, S_dot, s_dot, o, o_dot,
                *strides(q, 2), *strides(q_dot, 2), first, N, H, C, chunks, eps,
                q_weight is not None, q_live, k_live or v_live, precision(q), **tiles,
            )  # fmt: skip
    return (o,), (o_dot,), (q, k, v, q_weight, k_weight, q_rstd, k_rstd, S, s, D, eps)


def backward(saved: Sequence[Any], do: Tensor) -> Any:
    q, k, v, q_weight, k_weight, q_rstd, k_rstd, S, s, D, eps = saved
    (B, N, C), (chunks, H) = q.shape, s.shape[1:3]
    for_q, for_kv = (config(f"linear_attention.{kernel}", q, D) for kernel in ("_bwd_q", "_bwd_kv"))
    tokens = tokens_of_a_chunk(N, chunks, for_q["BLOCK_N"])
    dq, dk, dv = (empty(q, B, N, C) for _ in range(3))
    dS, ds = (empty(a, *a.shape) for a in (S, s))
    _bwd_q[(H, chunks, B)](
        do, q, q_weight, q_rstd, S, s, dq, dS, ds, *strides(do, 2), *strides(q, 2), N, H, C, chunks, tokens,
        eps, q_weight is not None, precision(q), **for_q,
    )  # fmt: skip
    _bwd_kv[(cdiv(N, for_kv["BLOCK_N"]), H, B)](
        k, v, k_weight, k_rstd, dS, ds, dk, dv, *strides(k, 2), *strides(v, 2), N, H, C, chunks,
        k_weight is not None, precision(q), **for_kv,
    )  # fmt: skip
    dq_weight = dk_weight = None
    if q_weight is not None:
        dq, dq_weight = rmsnorm_backward((q, q_weight, q_rstd), dq)
    if k_weight is not None:
        dk, dk_weight = rmsnorm_backward((k, k_weight, k_rstd), dk)
    return dq, dk, dv, dq_weight, dk_weight


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
    check(op, q, q=(q, shape), k=(k, shape), v=(v, shape), q_weight=(q_weight, (C,)), k_weight=(k_weight, (C,)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | int | None]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    c = s["H"] * s["D"]
    q, k, v = (normal(s["B"], s["N"], c) for _ in range(3))
    weight = [None if s.get("plain") else 1 + 0.2 * normal(c) for _ in range(2)]
    return dict(q=q, k=k, v=v, q_weight=weight[0], k_weight=weight[1], head_size=s["D"])


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["H"] * s["D"]
    return Cost((4 * s["B"] + 8 * case.b) * n * (s["D"] + 1), itemsize * (s["B"] + case.b) * 4 * n)


linear_attention = Op(
    "linear_attention",
    reference,
    inputs=inputs,
    cost=cost,
    accepts=accepts,
    batched=("q", "k", "v"),
    triton=function("linear_attention", forward, backward, ("q", "k", "v")),
    # head sizes of 16 and more: of four features often one is positive, o does not depend on it, and dq is rounding
    cases=[
        Case("small", dict(B=3, N=6, H=2, D=16), ("q", "k", "v")),
        Case("ragged", dict(B=3, N=5, H=3, D=24, b=1), ("q", "k", "v")),
        Case("no-norm", dict(B=2, N=5, H=2, D=16, plain=1), ("q", "k", "v")),
        Case("one-token", dict(B=2, N=1, H=2, D=32), ("q", "k", "v")),
        Case("keys-only", dict(B=2, N=5, H=2, D=16), ("k",)),
        Case("chunks", dict(B=2, N=70, H=2, D=20, b=1), ("q", "k", "v")),  # several tiles in several partial sums
        Case("sana-1.6b", dict(B=4, N=1024, H=70, D=32), ("q", "k", "v"), frozenset({"bench"})),
    ],
)
