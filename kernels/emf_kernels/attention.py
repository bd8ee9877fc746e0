"""Softmax attention, self or cross, with a key mask.

Shapes:   q [B, Nq, H, D]; k, v [B, Nk, H, D]; mask [B, Nk] bool (True = attend) or None; o [B, Nq, H, D].
Primal:   s = q k^T D^-1/2;  p = softmax(s);  o = p v.  A masked key has weight 0; a sample without any key to attend to gives 0.
Tangent:  s_dot = (q_dot k^T + q k_dot^T) D^-1/2;  o_dot = (p * s_dot) v - rowsum(p * s_dot) o + p v_dot
Backward: ds = p * (do v^T - rowsum(do * o));  dq = ds k D^-1/2;  dk = ds^T q D^-1/2;  dv = p^T do
Source:   FlashAttention-2 (arXiv 2307.08691) for the primal; the tangent follows from d softmax = p * (s_dot - <p, s_dot>).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Case, Cost, Op


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    s = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    dead = None if mask is None else ~mask[:, None, None, :]
    p = s.softmax(-1) if dead is None else s.masked_fill(dead, torch.finfo(s.dtype).min).softmax(-1).masked_fill(dead, 0)
    return (p @ v.transpose(1, 2)).transpose(1, 2)


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
    cases=[
        Case("self", dict(B=3, Nq=9, Nk=9, H=2, D=16), QKV),
        Case("cross-masked", dict(B=3, Nq=10, Nk=7, H=2, D=16, masked=1, b=2), ("q",)),
        Case("all-live-masked", dict(B=3, Nq=5, Nk=19, H=2, D=24, masked=1), QKV),
        Case("one-key", dict(B=2, Nq=3, Nk=1, H=1, D=16, b=1), QKV),
        Case("head-112", dict(B=2, Nq=17, Nk=35, H=1, D=112), ("q",)),
        Case("sana-1.6b-cross", dict(B=4, Nq=1024, Nk=730, H=20, D=112), ("q",), frozenset({"bench"})),
    ],
)
