"""Layer norm without affine, modulated per sample (adaLN).

Shapes:   x [B, N, C]; scale, shift [B, C]; y [B, N, C]. Statistics over C.
Primal:   n = (x - mean) rstd;  y = n (1 + scale) + shift
Tangent:  n_dot = rstd (x_dot - mean(x_dot) - n mean(n x_dot));  y_dot = n_dot (1 + scale) + n scale_dot + shift_dot
Backward: g = dy (1 + scale);  dx = rstd (g - mean(g) - n mean(n g));  dscale = sum over tokens of dy n;  dshift = sum over tokens of dy
Source:   DiT (arXiv 2212.09748); SANA's norm1, norm2 and norm_out (eps 1e-6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Case, Cost, Op


def reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    n = torch.nn.functional.layer_norm(x, x.shape[-1:], None, None, eps)
    return torch.addcmul(shift.unsqueeze(1), n, 1 + scale.unsqueeze(1))


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    return dict(x=2 * normal(s["B"], s["N"], s["C"]) + 0.5, scale=0.5 * normal(s["B"], s["C"]), shift=normal(s["B"], s["C"]))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["N"] * s["C"]
    return Cost((8 * s["B"] + 14 * case.b) * n, itemsize * (s["B"] + case.b) * (2 * n + 2 * s["C"]))


adaln = Op(
    "adaln",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("x", "scale", "shift"),
    cases=[
        Case("small", dict(B=3, N=5, C=8), ("x", "scale", "shift")),
        Case("odd", dict(B=2, N=3, C=37, b=1), ("x", "scale", "shift")),
        Case("one-token", dict(B=1, N=1, C=16), ("x", "scale", "shift")),
        Case("x-only", dict(B=3, N=4, C=12, b=2), ("x",)),
        Case("modulation-only", dict(B=3, N=4, C=12), ("scale", "shift")),
        Case("sana-1.6b", dict(B=4, N=1024, C=2240), ("x", "scale", "shift"), frozenset({"bench"})),
    ],
)
