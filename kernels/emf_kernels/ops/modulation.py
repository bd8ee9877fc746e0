"""Per-sample modulation vectors: a learned table plus the time embedding (adaLN-single).

Shapes:   m [B, S C] or [B, C] (shared by all S rows); table [S, C]; S outputs, each [B, C].
Primal:   y_s = table_s + m_s
Tangent:  y_s_dot = m_s_dot
Backward: dm = stack dy_s (summed over s where shared);  dtable_s = sum over samples of dy_s
Source:   PixArt-alpha's adaLN-single (arXiv 2310.00426), as used by SANA: S = 6 in a block, S = 2 before the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dual import Dual, check
from ..op import Case, Cost, Op


def reference(m: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return (m.reshape(m.shape[0], -1, table.shape[1]) + table).unbind(1)


def dual(m: Dual, table: Tensor) -> tuple[Dual, ...]:
    # lift(reference) is right, but forward-mode AD takes the host thirty times as long as the sum and these views
    b, C = len(m.tangent), table.shape[1]
    m_dot = m.tangent.reshape(b, m.primal.shape[1] // C, C).expand(b, len(table), C).unbind(1)
    return tuple(map(Dual, reference(m.primal, table), m_dot))


def accepts(m: Tensor, table: Tensor) -> None:
    if m.ndim != 2 or table.ndim != 2 or m.shape[1] not in (table.shape[1], table.numel()):
        raise ValueError(
            f"modulation: m is {tuple(m.shape)}, table is {tuple(table.shape)}; expected [B, C] or [B, S C], and [S, C]"
        )
    check("modulation", m, strided=True, m=(m, tuple(m.shape)), table=(table, tuple(table.shape)))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    rows = 1 if s.get("shared") else s["S"]
    m = torch.randn(s["B"], rows * s["C"], generator=generator, dtype=dtype).to(device)
    return dict(m=m, table=torch.randn(s["S"], s["C"], generator=generator, dtype=dtype).to(device) * s["C"] ** -0.5)


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = (s["B"] + case.b) * s["S"] * s["C"]
    return Cost(s["B"] * s["S"] * s["C"], itemsize * (2 * n + s["S"] * s["C"]))


CASES = [
    Case("small", dict(B=3, S=6, C=5), ("m",)),
    Case("shared", dict(B=3, S=2, C=5, shared=1, b=2), ("m",)),
    Case("sana-1.6b", dict(B=16, S=6, C=2240), ("m",), frozenset({"bench"})),
]
modulation = Op("modulation", reference, inputs, cost, accepts, CASES, dual=dual, batched=("m",))
