"""Fused operations that carry a value and its tangent together. See op.py for the contract; one operation a file."""

# isort: off
from .op import REGISTRY, Case, Cost, Op, backend, lift  # first: it decides whether kernels are interpreted

# isort: on
from .adaln import adaln
from .attention import attention
from .dual import Dual, each, primal
from .gated_residual import gated_residual
from .gated_residual_adaln import gated_residual_adaln
from .glumbconv import glumbconv
from .linear import linear
from .linear_attention import linear_attention
from .meanflow import meanflow
from .modulation import modulation
from .path import path
from .rmsnorm import rmsnorm
from .sdpa import scaled_dot_product_attention
from .silu import silu
from .time_embedding import time_embedding

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
