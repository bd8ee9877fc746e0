"""Fused operations that carry a value and its tangent together. See op.py for the contract; ops/ has one a file.

Without a GPU the kernels are made for Triton's interpreter when this package is imported, unless the environment has
TRITON_INTERPRET. The environment itself is left as it was: see launch.decorating.
"""

from . import launch
from .dual import Dual, each, primal
from .op import REGISTRY, Case, Cost, Op, backend, lift

with launch.decorating():
    from .ops.adaln import adaln
    from .ops.attention import attention
    from .ops.gated_residual import gated_residual
    from .ops.gated_residual_adaln import gated_residual_adaln
    from .ops.glumbconv import glumbconv
    from .ops.linear import linear
    from .ops.linear_attention import linear_attention
    from .ops.meanflow import meanflow
    from .ops.modulation import modulation
    from .ops.path import path
    from .ops.rmsnorm import rmsnorm
    from .ops.silu import silu
    from .ops.time_embedding import time_embedding
from . import hub_layers as layers
from .sdpa import scaled_dot_product_attention

__all__ = [
    "REGISTRY",
    "Case",
    "Cost",
    "Dual",
    "Op",
    "adaln",
    "attention",
    "backend",
    "each",
    "gated_residual",
    "gated_residual_adaln",
    "glumbconv",
    "layers",
    "lift",
    "linear",
    "linear_attention",
    "meanflow",
    "modulation",
    "path",
    "primal",
    "rmsnorm",
    "scaled_dot_product_attention",
    "silu",
    "time_embedding",
]
