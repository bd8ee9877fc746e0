"""The core of SANA's GLUMBConv: SiLU, depthwise 3x3 convolution, gated linear unit, in channels-last layout.

Shapes:   x [B, H, W, 2 F]; weight [2 F, 1, 3, 3]; bias [2 F]; y [B, H, W, F]. Zero padding of 1 after the activation.
Primal:   c = conv(silu(x)) + bias;  a, g = halves of c along channels;  y = a silu(g)
Tangent:  c_dot = conv(silu'(x) x_dot);  y_dot = a_dot silu(g) + a silu'(g) g_dot
Backward: da = dy silu(g), dg = dy a silu'(g);  dx = silu'(x) conv^T(dc);  dweight, dbias = correlations of dc with
          silu(x), sums of dc
Source:   SANA's Mix-FFN (arXiv 2410.10629); the only place where position enters the network.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .op import Case, Cost, Op
from .silu import reference as silu


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    c = conv2d(silu(x).permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0])
    a, g = c.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return a * silu(g)


def inputs(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    s = case.shape
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
    f = 2 * s["F"]
    return dict(x=normal(s["B"], s["H"], s["W"], f), weight=normal(f, 1, 3, 3) / 3, bias=0.1 * normal(f))


def cost(case: Case, itemsize: int) -> Cost:
    s = case.shape
    n = s["H"] * s["W"] * 2 * s["F"]
    return Cost((s["B"] * 28 + case.b * 38) * n, itemsize * (s["B"] + case.b) * n * 1.5 + itemsize * 20 * s["F"])


glumbconv = Op(
    "glumbconv",
    reference,
    inputs=inputs,
    cost=cost,
    batched=("x",),
    cases=[
        Case("small", dict(B=3, H=4, W=5, F=3), ("x",)),
        Case("ragged", dict(B=3, H=3, W=2, F=4, b=1), ("x",)),
        Case("one-pixel", dict(B=2, H=1, W=1, F=4), ("x",)),
        Case("sana-1.6b", dict(B=4, H=32, W=32, F=5600), ("x",), frozenset({"bench"})),
    ],
)
