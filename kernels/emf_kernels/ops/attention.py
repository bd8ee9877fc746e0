"""Softmax attention, self or cross: with masks, a bias, grouped queries, causal, or sequences packed in a row.

Shapes:   q [B, Nq, H, D]; k, v [B, Nk, G, D], query head h uses the head h // (H / G) of keys and values; o as q.
          mask: bool, True where a query attends to a key: [B, Nk], or [B or 1, H or 1, Nq, Nk], or with block = n one
          entry for n x n pairs, [B or 1, H or 1, ceil(Nq / n), ceil(Nk / n)]: dead blocks are not computed.
          causal: True: query i attends to the keys j <= i, as is_causal of PyTorch's SDPA (the upper left corner);
          "lower right": j <= i + Nk - Nq, as flash-attention since 2.1.
          scale: D^-1/2 where None. bias [B or 1, H or 1, Nq, Nk], added to the scaled scores, -inf where a query does
          not attend. It has a gradient and takes no tangent.
          cu_seqlens_q, cu_seqlens_k: int32 [B, n + 1], increasing: in each row of the batch, sequence s has the queries
          from place s on up to place s + 1, and attends to its own keys alone; causal is meant of each sequence. What
          lies before the first or after the last place belongs to none, and gives 0.
Primal:   s = q k^T scale + bias;  p = softmax(s);  o = p v.  A query without any key to attend to gives 0.
Tangent:  s_dot = (q_dot k^T + q k_dot^T) scale;  o_dot = (p * s_dot) v - rowsum(p * s_dot) o + p v_dot
Backward: dbias = p * (do v^T - rowsum(do * o));  ds = dbias scale;  dq = ds k;  dk = ds^T q;  dv = p^T do
Source:   FlashAttention-2 (arXiv 2307.08691) for the primal; for the tangent d softmax = p * (s_dot - <p, s_dot>).

The kernel keeps two wide accumulators, a = sum p v and a_dot = sum (p * s_dot) v + p v_dot, and two narrow ones,
l = sum p and mu = sum p * s_dot, with p = exp(s - m) and m the running maximum. At the end o = a / l and
o_dot = (a_dot - mu o) / l. The kernels are in attention_forward.py and attention_backward.py; the cases that tests and
benchmarks read are in attention_cases.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import attention_library as library
from .. import launch
from ..dual import check
from ..function import function, requires_grad
from ..op import Op
from ..tiles import cdiv, empty, fitting, next_power_of_2, precision, strides, wide
from .attention_backward import _bwd_bias, _bwd_kv, _bwd_q
from .attention_cases import CASES, cost, inputs
from .attention_forward import _fwd


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    block: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    (B, Nq, H, D), (Nk, G) = q.shape, k.shape[1:3]
    # packed here as the batched product packs them, but of a single sample too: its view would keep the whole batch's
    # storage until backward. The heads that share keys are rows of one product.
    q = q.transpose(1, 2).contiguous().view(B, G, H // G * Nq, D)
    k, v = k.permute(0, 2, 3, 1).contiguous(), v.transpose(1, 2).contiguous()
    s = (q @ k * (D**-0.5 if scale is None else scale)).view(B, H, Nq, Nk)
    s = s if bias is None else s + bias
    dead = unattended(q, Nq, Nk, mask, causal, bias, block, cu_seqlens_q, cu_seqlens_k)
    p = (s if dead is None else s.masked_fill(dead, torch.finfo(s.dtype).min)).softmax(-1)
    p = p if dead is None else p.masked_fill(dead, 0)
    return (p.view(B, G, H // G * Nq, Nk) @ v).view(B, H, Nq, D).transpose(1, 2)


def unattended(
    q: Tensor,
    Nq: int,
    Nk: int,
    mask: Tensor | None,
    causal: bool | str,
    bias: Tensor | None,
    block: int | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> Tensor | None:
    """True where a query does not attend to a key, broadcast to [B, H, Nq, Nk]; None: nowhere."""
    parts = [] if bias is None else [bias == float("-inf")]
    if mask is not None:
        if block is not None:
            mask = mask.repeat_interleave(block, 2)[:, :, :Nq].repeat_interleave(block, 3)[..., :Nk]
        parts.append(~(mask if mask.ndim == 4 else mask[:, None, None, :]))
    if cu_q is not None and cu_k is not None:
        of_q, i, many = sequences(cu_q, Nq)
        of_k, j, many_k = sequences(cu_k, Nk)
        other = (of_q[:, :, None] != of_k[:, None, :]) | (of_q < 0)[:, :, None]
        ahead = many_k[:, None, :] - many[:, :, None] if causal == "lower right" else 0
        parts.append((other | (j[:, None, :] > i[:, :, None] + ahead) if causal else other)[:, None])
    elif causal:
        ahead = Nk - Nq if causal == "lower right" else 0
        parts.append(torch.ones(Nq, Nk, dtype=torch.bool, device=q.device).triu(1 + ahead))
    return functools.reduce(torch.logical_or, parts) if parts else None


def sequences(cu: Tensor, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of N tokens [B, N]: which sequence it belongs to, -1: to none; its place in it; the sequence's length."""
    at = torch.arange(N, dtype=cu.dtype, device=cu.device).expand(len(cu), N).contiguous()
    of = torch.searchsorted(cu.contiguous(), at, right=True)
    inside = (of > 0) & (of < cu.shape[1])
    begin, end = cu.gather(1, (of - 1).clamp(0)), cu.gather(1, of.clamp(max=cu.shape[1] - 1)).clamp(max=N)
    return torch.where(inside, of, -1), at - begin, end - begin


def config(q: Tensor, Nk: int, live: Sequence[bool], masked: int, block: int | None = None) -> dict[str, int]:
    """Tile sizes, warps and stages: by head size, lengths up to 128, how many products a tile has, and what is added to
    its scores: 1: by a key mask, 2: by a mask or bias that differs by query."""
    block_d, nq, nk = (max(16, next_power_of_2(n)) for n in (q.shape[3], q.shape[1], Nk))
    most_q = 128 if block_d * q.element_size() <= 256 else 64
    most_k = 64 if block_d * q.element_size() <= 128 else 32
    block_q, block_k = min(most_q, nq), min(most_k, nk)
    default = dict(BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=8 if block_q >= most_q else 4, num_stages=2)
    if any(live) and q.element_size() == 4 and block_d >= 128:
        # of three-part products, larger tiles leave some of ptxas's results with 32 registers and 8 KB of spills, and
        # two groups of warps on one tile read memory that is not theirs (an H100, Triton 3.6)
        default |= dict(BLOCK_Q=min(16, block_q), BLOCK_K=min(16, block_k), num_warps=4)
    pairs = q.element_size() + 1 if masked == 2 else 0
    default = fitting("attention", default, q, 1 + live[0], 2 + live[1] + live[2], pairs=pairs)
    products = 2 + live[0] + live[1] + (live[0] or live[1]) + live[2]
    shape = dict(D=block_d, Nq=min(nq, 128), Nk=min(nk, 128), products=products, masked=int(masked))
    found = launch.configuration("attention._fwd", q, default, **shape)
    return dict(BLOCK_D=block_d) | within(found, block)


def config_backward(kernel: str, q: Tensor, Nk: int, by_pair: bool = False, block: int | None = None) -> dict[str, int]:
    """Tile sizes, warps and stages, by head size and lengths up to 128. What stays in a program is the wider."""
    block_d, nq, nk = (max(16, next_power_of_2(n)) for n in (q.shape[3], q.shape[1], Nk))
    most = 64 if block_d * q.element_size() <= 256 else 32
    block_q, stays = (32, "BLOCK_K") if kernel == "_bwd_kv" else (most, "BLOCK_Q")
    default = dict(BLOCK_Q=min(block_q, nq), BLOCK_K=min(most, nk), num_warps=4, num_stages=2)
    default = fitting("attention", default, q, 2, 2, stays, pairs=q.element_size() + 1 if by_pair else 0)
    shape = dict(D=block_d, Nq=min(nq, 128), Nk=min(nk, 128))
    found = launch.configuration(f"attention.{kernel}", q, default, **shape)
    return dict(BLOCK_D=block_d) | within(found, block)


def within(found: dict[str, int], block: int | None) -> dict[str, int]:
    """Tiles that divide the blocks of a mask, so that each is of one of them."""
    if block is None:
        return found
    most = block & -block
    tiles = {name: min(found[name], most) for name in ("BLOCK_Q", "BLOCK_K")}
    return found | tiles | dict(num_warps=min(found["num_warps"], 8 if tiles["BLOCK_Q"] >= 128 else 4))


def listed(mask: Tensor) -> Tensor:
    """Of each row of a mask of blocks, int32: how many of them are live, then their places, in ascending order."""
    order = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
    return torch.cat([mask.sum(-1, keepdim=True), order], -1).to(torch.int32)


def shared(x: Tensor | None, absent: int | None = None) -> Sequence[int | None]:
    """The strides of samples, heads and queries of x [B or 1, H or 1, Nq, Nk], or of a key mask [B, Nk]; 0 where one
    entry is for all. None, which Triton leaves out of a kernel, where there is none: a plain call stays as it was."""
    if x is None or x.ndim == 2:
        return absent if x is None else x.stride(0), None, None
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride(), strict=False))


def kind(mask: Tensor | None, block: int | None) -> str:
    """What the kernels call a mask."""
    return "none" if mask is None else "keys" if mask.ndim == 2 else "dense" if block is None else "blocks"


def tiles(N: int, block: int, places: int) -> int:
    """How many tiles cover a row of N tokens; packed, each sequence begins one of its own (_sequence)."""
    return N // block + places + 1 if places else cdiv(N, block)


def read_only(cu: Tensor | None) -> Tensor | None:
    """torch.compile takes for written whatever the address of a store is computed from: it is given a copy."""
    return cu.clone() if cu is not None and torch.compiler.is_compiling() else cu


def forward(values: Sequence[Any], dots: Sequence[Tensor | None], b: int) -> Any:
    q, k, v, mask, causal, scale, bias, block, cu_q, cu_k, wanted = values
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    (B, Nq, H, D), (Nk, G) = q.shape, k.shape[1:3]
    o, o_dot, lse = empty(q, B, Nq, H, D), empty(q, b, Nq, H, D), empty(q, B, H, Nq, dtype=torch.float32)
    what, places = kind(mask, block), 0 if cu_q is None else cu_q.shape[1]
    given = listed(mask) if what == "blocks" else mask
    by_pair, apart = what == "dense" or bias is not None, (cu_q.stride(0), cu_k.stride(0)) if places else (None, None)
    # the first b samples with their tangents, then the rest without: the second launch compiles to plain attention
    for first, count, live in ((0, b, [d is not None for d in dots]), (b, B - b, [False] * 3)):
        if count:
            constants = config(q, Nk, live, 2 if by_pair else mask is not None and block is None, block)
            edge = what in ("keys", "dense") or causal or places or Nk % (block or constants["BLOCK_K"]) > 0
            _fwd[(tiles(Nq, constants["BLOCK_Q"], places), H, count)](
                q, k, v, given, bias, read_only(cu_q), read_only(cu_k), *dots, o, o_dot, lse,
                *strides(q, 3), *strides(k, 3), *strides(v, 3), *shared(given, 0), *shared(bias),
                *apart, *(stride for d in dots for stride in strides(d, 3)),
                first, Nq, Nk, scale, H, D, H // G, places, what, block or 1, bias is not None,
                bool(causal), causal == "lower right", wide(q, k, v, *dots), precision(q), *live, bool(edge),
                **constants,
            )  # fmt: skip
    return (o,), (o_dot,), (q, k, v, mask, o, lse, causal, scale, bias, block, cu_q, cu_k, wanted)


def backward(saved: Sequence[Any], do: Tensor) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, and dbias where it is wanted) from the saved lse: by one of PyTorch's kernels where it has one, else
    by ours. Of causal with Nq != Nk they have the lower right corner."""
    q, k, v, mask, o, lse, causal, scale, bias, block, cu_q, cu_k, wanted = saved
    (B, Nq, H, D), (Nk, G) = q.shape, k.shape[1:3]
    plain = mask is None and bias is None and cu_q is None and (not causal or Nq == Nk or causal == "lower right")
    if plain and (given := library.backward(do, q, k, v, o, lse, causal=bool(causal), scale=scale)):
        return given
    dq, dk, dv, do_o = empty(q, B, Nq, H, D), empty(k, B, Nk, G, D), empty(v, B, Nk, G, D), empty(lse, *lse.shape)
    what, places = kind(mask, block), 0 if cu_q is None else cu_q.shape[1]
    blocks = what == "blocks"
    of_q, of_kv = (listed(mask), listed(mask.mT)) if blocks else (mask, mask)
    apart = (cu_q.stride(0), cu_k.stride(0)) if places else (None, None)
    read = (*strides(do, 3), *strides(q, 3), *strides(k, 3), *strides(v, 3))
    rest = (
        *shared(bias), *apart, Nq, Nk, scale, H, D, H // G, places, what, block or 1, bias is not None,
        bool(causal), causal == "lower right", wide(do, q, k, v), precision(q),
    )  # fmt: skip
    by_pair = what == "dense" or bias is not None
    for_q, for_kv = (config_backward(kernel, q, Nk, by_pair, block) for kernel in ("_bwd_q", "_bwd_kv"))
    _bwd_q[(tiles(Nq, for_q["BLOCK_Q"], places), H, B)](
        do,
        q,
        k,
        v,
        of_q,
        bias,
        read_only(cu_q),
        read_only(cu_k),
        o,
        lse,
        dq,
        do_o,
        *read,
        *shared(of_q, 0),
        *rest,
        **for_q,
    )
    _bwd_kv[(tiles(Nk, for_kv["BLOCK_K"], places), G, B)](
        do,
        q,
        k,
        v,
        of_kv,
        bias,
        read_only(cu_q),
        read_only(cu_k),
        lse,
        do_o,
        dk,
        dv,
        *read,
        *shared(of_kv, 0),
        *rest,
        **for_kv,
    )
    if not wanted:
        return dq, dk, dv
    dbias, for_bias = empty(bias, *bias.shape), config_backward("_bwd_bias", q, Nk, by_pair, block)
    each = cdiv(Nq, for_bias["BLOCK_Q"]) * cdiv(Nk, for_bias["BLOCK_K"])
    _bwd_bias[(each, bias.shape[1], bias.shape[0])](
        do, q, k, v, mask, bias, lse, do_o, dbias, *read, *shared(mask), *shared(bias),
        B // bias.shape[0], H // bias.shape[1], Nq, Nk, scale, H, D, H // G, "dense" if blocks else what, block or 1,
        bool(causal), causal == "lower right", precision(q), **for_bias,
    )  # fmt: skip
    return dq, dk, dv, None, None, None, dbias


def accepts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    block: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or not 1 <= q.shape[3] <= 256:
        shapes = f"q is {tuple(q.shape)}, k is {tuple(k.shape)}"
        raise ValueError(f"attention: {shapes}; expected [B, N, H, D] with D at most 256")
    (B, Nq, H, D), (Nk, G) = q.shape, k.shape[1:3]
    if not G or H % G:
        raise ValueError(f"attention: k has {G} heads; expected a number that divides the {H} of q")
    check("attention", q, q=(q, (B, Nq, H, D)), k=(k, (B, Nk, G, D)), v=(v, (B, Nk, G, D)))
    if causal not in (False, True, "lower right"):
        raise ValueError(f"attention: causal is {causal!r}; expected False, True or 'lower right'")
    if block is not None and (mask is None or mask.ndim != 4 or block < 16 or block % 16):
        raise ValueError(f"attention: block is {block}; expected a multiple of 16, with a mask of four dimensions")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"attention: mask is {mask.dtype}; expected bool, True where a query attends to a key")
    rows, columns = cdiv(Nq, block or 1), cdiv(Nk, block or 1)
    full = lambda x, *shape: tuple(1 if n == 1 else m for n, m in zip(x.shape, shape, strict=False))[:2] + shape[2:]  # noqa: E731
    if mask is not None:
        check("attention", q, mask=(mask, full(mask, B, H, rows, columns) if mask.ndim == 4 else (B, Nk)))
    if bias is not None:
        check("attention", q, bias=(bias, full(bias, B, H, Nq, Nk)))
    given = {
        name: cu for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)) if cu is not None
    }
    if given and (len(given) < 2 or mask is not None or bias is not None):
        what = f"{' and '.join(given)} {'beside a mask or bias' if len(given) == 2 else 'alone'}"
        raise ValueError(f"attention: {what}; expected cu_seqlens_q and cu_seqlens_k, without a mask or bias")
    sizes = {tuple(cu.shape) for cu in given.values()}
    for name, cu in given.items():
        if cu.dtype != torch.int32 or cu.device != q.device:
            raise ValueError(f"attention: {name} is {cu.dtype} on {cu.device}; expected torch.int32 on {q.device}")
        if len(sizes) > 1 or cu.ndim != 2 or cu.shape[0] != B or not 2 <= cu.shape[1] <= MOST_PLACES:
            are = " and ".join(map(str, sorted(sizes)))
            raise ValueError(f"attention: cu_seqlens are {are}; expected [{B}, n + 1] with n at most {MOST_PLACES - 1}")
        if cu.stride(1) != 1:
            raise ValueError(f"attention: {name} has stride {cu.stride(1)} in its last dimension; expected 1")


MOST_PLACES = 2048  # of a row's sequences: a program holds them all
fused = function("attention", forward, backward, ("q", "k", "v"))


def kernel(*args: Any) -> Any:
    """fused, which is told whether the bias wants a gradient: a mask that is added wants none, and it is as large."""
    return fused(*args, args[6] is not None and torch.is_grad_enabled() and requires_grad(args[6]))


attention = Op(
    "attention",
    reference,
    inputs,
    cost,
    accepts,
    CASES,
    batched=("q", "k", "v", "mask", "bias", "cu_seqlens_q", "cu_seqlens_k"),
    live=("q", "k", "v"),
    triton=kernel,
)
