"""ReLU linear attention with the RMS norm of queries and keys inside.

Shapes:   q, k, v [B, N, C], C = H D; q_weight, k_weight [C] or None (no norm); head_size D; o [B, N, C].
Primal:   q' = relu(rmsnorm(q)), k' = relu(rmsnorm(k)), norms across all heads;  per head
          S = sum_n k'_n v_n^T, s = sum_n k'_n;  o_n = (q'_n S) / (q'_n . s + eps)
Tangent:  q'_dot, k'_dot by rmsnorm and the step function;  S_dot = sum k'_dot v^T + k' v_dot^T;  s_dot = sum k'_dot;
          with a = q' S, z = q' . s + eps:
          o_dot = (q'_dot S + q' S_dot - o (q'_dot . s + q' . s_dot)) / z
Backward: through z, a, S, s in turn; the same two sums over N
Source:   SANA (arXiv 2410.10629); diffusers' SanaLinearAttnProcessor2_0: a row of ones in v makes s, eps 1e-15, no
          scale, no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Case, Cost, Op
from .rmsnorm import reference as rmsnorm_reference


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


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor | int | None]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    c = s["H"] * s["D"]
    q, k, v = (normal(s["B"], s["N"], c) for _ in range(3))
    weight = (None, None) if s.get("plain") else (1 + 0.2 * normal(c), 1 + 0.2 * normal(c))
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
    batched=("q", "k", "v"),
    cases=[
        Case("small", dict(B=3, N=6, H=2, D=4), ("q", "k", "v")),
        Case("ragged", dict(B=3, N=5, H=3, D=4, b=1), ("q", "k", "v")),
        Case("no-norm", dict(B=2, N=5, H=2, D=4, plain=1), ("q", "k", "v")),
        Case("one-token", dict(B=2, N=1, H=2, D=8), ("q", "k", "v")),
        Case("sana-1.6b", dict(B=4, N=1024, H=70, D=32), ("q", "k", "v"), frozenset({"bench"})),
    ],
)
