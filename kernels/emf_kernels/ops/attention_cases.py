"""The cases of attention: shapes with a name each, and their arguments and cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..op import Case, Cost

QKV = ("q", "k", "v")
BENCH = frozenset({"bench"})
# G: heads of keys and values, H where not given. mask: 1: of keys, 2: of pairs, a block's size: of blocks. mask_b,
# mask_h, bias_b, bias_h: sizes of a mask's or bias's first dimensions, 1 where not given. causal: 2: lower right.
# packed: 2: the sequences of queries are as long as those of keys.
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
    Case("upper-left", dict(B=1, Nq=37, Nk=70, H=1, D=16, causal=1), QKV),
    Case("lower-right", dict(B=1, Nq=37, Nk=70, H=1, D=16, causal=2), QKV),
    Case("lower-right-more-queries", dict(B=2, Nq=70, Nk=35, H=1, D=16, causal=2, b=1), ("q", "v")),
    Case("dense-mask", dict(B=2, Nq=19, Nk=70, H=1, D=16, masked=2, mask_b=2, b=1), QKV),
    Case("dense-mask-of-heads", dict(B=2, Nq=5, Nk=19, H=2, D=16, masked=2, mask_h=2, causal=2), ("q", "v")),
    Case("bias", dict(B=2, Nq=19, Nk=70, H=2, D=16, biased=1, bias_h=2, b=1), QKV),
    Case("bias-key-mask", dict(B=3, Nq=9, Nk=21, H=1, D=16, biased=1, bias_b=3, masked=1), ("q", "k")),
    Case("bias-dense-mask-causal", dict(B=2, Nq=9, Nk=21, H=2, G=1, D=16, biased=2, masked=2, causal=1), ("q",)),
    Case("block-mask", dict(B=2, Nq=50, Nk=100, H=1, D=16, masked=48, mask_b=2, b=1), QKV),
    Case("block-mask-past-the-keys", dict(B=2, Nq=50, Nk=64, H=1, D=16, masked=48, mask_b=2, b=1), QKV),
    Case(
        "block-mask-bias-causal",
        dict(B=1, Nq=37, Nk=37, H=2, G=1, D=16, masked=16, mask_h=2, biased=1, bias_h=2, causal=1),
        ("q",),
    ),
    Case("grouped", dict(B=2, Nq=40, Nk=9, H=4, G=2, D=16, b=1), QKV),
    Case("one-head-of-keys", dict(B=2, Nq=9, Nk=13, H=3, G=1, D=16, masked=1, causal=2), QKV),
    Case("packed", dict(B=2, Nq=30, Nk=25, H=1, D=16, packed=1, b=1), QKV),
    Case("packed-causal-grouped", dict(B=1, Nq=20, Nk=20, H=2, G=1, D=16, packed=2, causal=1), ("q",)),
    Case("packed-tiles-lower-right", dict(B=1, Nq=190, Nk=140, H=1, D=16, packed=1, causal=2), QKV),
    Case("sana-1.6b-cross", dict(B=4, Nq=1024, Nk=730, H=20, D=112), ("q",), BENCH),
    Case("sana-1.6b-masked", dict(B=4, Nq=1024, Nk=300, H=20, D=112, masked=1), ("q",), BENCH),
    Case("self-64", dict(B=1, Nq=2048, Nk=2048, H=8, D=64), QKV, BENCH),
    Case("self-128", dict(B=1, Nq=2048, Nk=2048, H=8, D=128), QKV, BENCH),
]


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Any]:
    s = case.shape
    B, Nq, Nk, H, masked = s["B"], s["Nq"], s["Nk"], s["H"], s.get("masked", 0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    heads = s.get("G", H)
    args = dict(q=normal(B, Nq, H, s["D"]), k=normal(B, Nk, heads, s["D"]), v=normal(B, Nk, heads, s["D"]))
    mask, bias, block = None, None, masked if masked > 2 else None
    if masked == 1:  # sample 0 attends to one key, the last to none, the others to a growing number; one alone to most
        lengths = torch.linspace(1, Nk, B).round()
        lengths[-1] = 0 if B > 1 else Nk - Nk // 3
        mask = (torch.arange(Nk)[None] < lengths[:, None]).to(device)
    elif masked:
        rows, columns = (-(-n // (block or 1)) for n in (Nq, Nk))
        mask = torch.rand(s.get("mask_b", 1), s.get("mask_h", 1), rows, columns, generator=generator) < 0.6
        mask[..., 0, :2] = torch.tensor([False, True])
        if mask.shape[1] > 1:  # heads differ in what they attend to, and in how much
            mask[:, 0, -2], mask[:, 1, -2, 0] = False, True
        mask[..., -1, :] = False  # the last queries attend to nothing
        mask = mask.to(device)
    if s.get("biased"):
        bias = normal(s.get("bias_b", 1), s.get("bias_h", 1), Nq, Nk)
        if s["biased"] > 1:
            bias[..., ::3] = float("-inf")
    causal = {0: False, 1: True, 2: "lower right"}[s.get("causal", 0)]
    scale = s["half_scale"] / 2 if s.get("half_scale") else None
    places: tuple[Tensor | None, Tensor | None] = (None, None)
    if s.get("packed"):
        of_q, of_k = (0.7, 0.7, 1), (0.5, 1, 1)  # the second has no queries, the third has no keys
        places = packed(B, Nq, of_q).to(device), packed(B, Nk, of_q if s["packed"] > 1 else of_k).to(device)
    return args | dict(
        mask=mask, causal=causal, scale=scale, bias=bias, block=block, cu_seqlens_q=places[0], cu_seqlens_k=places[1]
    )


def packed(B: int, N: int, ends: tuple[float, ...]) -> Tensor:
    """The places of sequences in B rows of N tokens. The last row begins and ends with tokens that belong to none."""
    margin = torch.arange(B)[:, None] + (B == 1)
    return (margin + (N - 2 * margin) * torch.tensor([0.0, *ends])).round().to(torch.int32)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    products = 2 * s["B"] + case.b * (2 + 2 * ("k" in case.live) / 2 + ("v" in case.live))
    q, k = s["Nq"] * s["H"] * s["D"], s["Nk"] * s.get("G", s["H"]) * s["D"]
    moved = 2 * q * (s["B"] + case.b) + k * (2 * s["B"] + case.b * (("k" in case.live) + ("v" in case.live)))
    return Cost(2 * products * q * s["Nk"] / (2 if s.get("causal") else 1), itemsize * moved)
