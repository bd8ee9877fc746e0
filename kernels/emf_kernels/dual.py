"""Dual, and what every op asks of its arguments before it computes anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dual(NamedTuple):
    """A value and its tangent. A NamedTuple: wrappers such as DeepSpeed and pytree rebuild those, dataclasses they
    skip.

    primal:  [B, ...]
    tangent: [b, ...], 0 <= b <= B; belongs to the FIRST b samples. b = B is the full dual, b = 0 a plain forward.

    The tangent never requires grad: gradients flow through the primal only. A constant is a plain Tensor. There is no
    arithmetic on a Dual: a tuple's own `+` and `*` would concatenate and repeat without a word.
    """

    primal: Tensor
    tangent: Tensor

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            "a Dual has no arithmetic: call an Op of emf_kernels, or each(fn, x) for a linear rearrangement"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse  # type: ignore[assignment, misc]
    __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = _refuse  # type: ignore[misc]


def each(fn: Callable[[Tensor], Tensor], x: Tensor | Dual) -> Any:
    """Apply a linear rearrangement that keeps the batch first (reshape, permute, slice of channels) to a Tensor or to
    both halves of a Dual."""
    return Dual(fn(x.primal), fn(x.tangent)) if isinstance(x, Dual) else fn(x)


def primal(x: Tensor | Dual) -> Tensor:
    """The value: [B, ...]."""
    return x.primal if isinstance(x, Dual) else x


def widened(x: Tensor) -> Tensor:
    """float32 in place of half precision, every other dtype as it is. What a reference squares and sums, it does in
    this, as the kernels do: the square of 300 is beyond float16."""
    return x.float() if x.dtype.itemsize == 2 else x


def leading(duals: Sequence[Dual], op: str) -> int:
    """b, the number of leading samples that carry a tangent; 0 without Duals. Raises ValueError where they differ."""
    sizes = {d.tangent.shape[0] if d.tangent.ndim else -1 for d in duals}
    if len(sizes) > 1:
        raise ValueError(
            f"{op}: the tangents cover different numbers of leading samples {sorted(sizes)}; expected one number"
        )
    return sizes.pop() if sizes else 0


def check_dual(op: str, name: str, x: Dual, strided: bool = True) -> None:
    """Raises ValueError on a tangent that is not [b, ...] like its primal, with b at most B. strided: as for check."""
    p, d = x
    if not isinstance(p, Tensor) or not isinstance(d, Tensor):
        raise ValueError(f"{op}: {name} is a Dual of {type(p).__name__} and {type(d).__name__}; expected Tensors")
    if not p.ndim or d.ndim != p.ndim or d.shape[0] > p.shape[0] or d.shape[1:] != p.shape[1:]:
        expected = f"[b, ...] with b at most {p.shape[0]}" if p.ndim else "a batch"
        raise ValueError(f"{op}: {name}'s tangent {tuple(d.shape)} does not fit primal {tuple(p.shape)}; {expected}")
    if d.dtype != p.dtype or d.device != p.device:
        raise ValueError(f"{op}: {name}'s tangent is {d.dtype} on {d.device}; expected {p.dtype} on {p.device}")
    if not strided and d.shape[-1] > 1 and d.stride(-1) != 1:
        raise ValueError(f"{op}: {name}'s tangent has stride {d.stride(-1)} in its last dimension; expected 1")


def check(op: str, lead: Tensor, *, strided: bool = False, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """name=(tensor or None, shape): all of lead's dtype and device. One ValueError that names what does not fit;
    nothing is ever copied or cast to fit.

    strided: the last dimension need not be contiguous.
    """
    for name, (x, shape) in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point() and x.dtype != torch.bool:
            raise ValueError(f"{op}: {name} is {x.dtype}; expected floating point")
        if tuple(x.shape) != shape:
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}; expected {shape}")
        if 0 in shape and not name.endswith("_dot"):
            raise ValueError(f"{op}: {name} is empty {shape}; expected at least one element along every dimension")
        if x.device != lead.device or (x.dtype != lead.dtype and x.dtype != torch.bool):
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}; expected {lead.dtype} on {lead.device}")
        if not strided and shape and shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{op}: {name} {shape} has stride {x.stride(-1)} in its last dimension; expected 1")
