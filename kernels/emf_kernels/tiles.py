"""What several kernels share: rows and elements as tiles, the norm of a row and its tangent, strides and offsets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


def cdiv(n: int, size: int) -> int:
    """How many pieces of a size cover n. Triton's own function costs ten times as much on the host."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def strides(x: Tensor | None, n: int) -> Sequence[int]:
    """The first n strides; zeros for a tensor that is not there."""
    return (0,) * n if x is None else x.stride()[:n]


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for an output or a partial sum, on the device of a tensor and of its dtype, unless one is named."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def rows(kernel: str, x: Tensor, **free: int) -> dict[str, int]:
    """The configuration of a kernel that holds a row of x in one block. free: further parameters, at their defaults."""
    block = next_power_of_2(x.shape[-1])
    default = free | dict(num_warps=min(max(block // 512, 1), 8))
    return dict(BLOCK=block) | launch.configuration(kernel, x, default, C=block)


def elements(kernel: str, x: Tensor) -> dict[str, int]:
    """The configuration of a kernel that walks over the elements of a sample; the shape class is a sample's size."""
    n = min(next_power_of_2(x.numel() // x.shape[0]), 2**16)
    return launch.configuration(kernel, x, dict(BLOCK=1024, num_warps=4), n=n)


def precision(x: Tensor) -> str:
    """float32 by three tf32 products, which lose two bits of 24: by FMA a tile's operands spill kilobytes a thread."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def wide(*tensors: Tensor | None) -> bool:
    """Whether a row's place in some [B, N, ...] does not fit into 32 bits: a sequence-first view of more than 2^31
    elements."""
    return any(x is not None and x.shape[1] * x.stride(1) >= 2**31 for x in tensors)


def fitting(
    op: str, default: dict[str, int], q: Tensor, queries: int, keys: int, stays: str = "BLOCK_Q", *, pairs: int = 0
) -> dict[str, int]:
    """The tiles halved until they fit into a program's shared memory, which GPUs for desktops have half as much of.

    queries, keys: how many tensors a kernel holds a tile of; stays: of those named, one tile, of the others num_stages.
    pairs: bytes that it holds of each pair of a query and a key, num_stages times.
    """
    default, row = dict(default), max(16, next_power_of_2(q.shape[3])) * q.element_size()
    row = row if q.element_size() == 2 else 2 * row  # the parts of which the three products are made
    most, held = launch.shared_memory(q), {"BLOCK_Q": queries, "BLOCK_K": keys}

    def needed() -> int:
        stages = {name: 1 if name == stays else default["num_stages"] for name in held}
        both = pairs * default["num_stages"] * default["BLOCK_Q"] * default["BLOCK_K"] if pairs else 0
        return sum(stages[name] * held[name] * default[name] for name in held) * row + both

    while needed() > most:
        name = max(held, key=lambda name: (default[name] > 16, held[name] * default[name]))
        if default[name] > 16:
            default[name] //= 2
        elif default["num_stages"] > 1:
            default["num_stages"] = 1
        else:
            heads = f"heads of {q.shape[3]} in {q.dtype} take {needed() // 1024} KiB of shared memory"
            raise ValueError(f"{op}: {heads}, {q.device} has {most // 1024}; use half precision, or no tangents")
    return default


def planes(x: Tensor | None) -> Sequence[int]:
    """The strides of samples, channels and rows of x [B, ...], read as [B, C, H, W]; zero along what is not there."""
    if x is None:
        return 0, 0, 0
    batch, *middle, _ = x.stride()
    return batch, *(0, 0)[len(middle) :], *middle


def size(x: Tensor) -> tuple[int, int, int]:
    """(elements of a sample, H, W) of x [B, ...], read as [B, C, H, W]."""
    return x.numel() // x.shape[0], x.shape[-2] if x.ndim > 2 else 1, x.shape[-1]


@triton.jit
def offset(i, stride_c, stride_h, H, W):
    """Where element i of a sample lies, from its first element on."""
    return i // W // H * stride_c + i // W % H * stride_h + i % W


@triton.jit
def norm(x, inside, C, eps):
    """(n, mean, rstd) of a row."""
    mean = tl.sum(x) / C
    centred = tl.where(inside, x - mean, 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred) / C + tl.cast(eps, tl.float32))
    return centred * rstd, mean, rstd


@triton.jit
def norm_dot(x_dot, n, rstd, C):
    """n_dot. The same map takes g = dn to dx: the normalisation's derivative is symmetric."""
    return rstd * (x_dot - tl.sum(x_dot) / C - n * (tl.sum(n * x_dot) / C))


@triton.jit
def relu(x):
    """NaN stays NaN: a GPU's plain maximum would give 0."""
    return tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """x to the nearest number with the ten bits of tf32, to which the tensor cores truncate, a bias of -4e-4 a factor.
    What a product and a sum both see is rounded once, before both."""
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x
