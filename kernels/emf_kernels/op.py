"""The contract that every operation of this library keeps: Dual, lift, Op, Case, the registry and the choice of
backend.

A network's Jacobian-vector product is computed here by carrying a value and its tangent together: `Dual(primal,
tangent)`. Every operation on a Dual is a named `Op`. An Op is right from its first line, because its dual defaults to
`lift(reference)`; a fused Triton kernel replaces that default where a record shows that it is faster, and is held to
the same reference by the same tests.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# `triton.jit` decides at decoration whether a kernel is compiled or interpreted. Without a GPU only the interpreter can
# run one; set before
# the first kernel file is imported, and never against the user's own choice.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

Backend = Literal["reference", "triton"]


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


def each(fn: Callable[[Tensor], Tensor], x: Tensor | Dual) -> Any:
    """Apply a linear rearrangement that keeps the batch first (reshape, permute, slice of channels) to a Tensor or to
    both halves of a Dual."""
    return Dual(fn(x.primal), fn(x.tangent)) if isinstance(x, Dual) else fn(x)


def primal(x: Tensor | Dual) -> Tensor:
    """The value: [B, ...]."""
    return x.primal if isinstance(x, Dual) else x


def leading(duals: Sequence[Dual], op: str) -> int:
    """b, the number of leading samples that carry a tangent. Raises ValueError where the Duals disagree or do not
    fit."""
    sizes = {d.tangent.shape[0] for d in duals}
    if len(sizes) != 1:
        raise ValueError(
            f"{op}: the tangents cover different numbers of leading samples {sorted(sizes)}; expected one number"
        )
    for d in duals:
        if d.tangent.shape[0] > d.primal.shape[0] or d.tangent.shape[1:] != d.primal.shape[1:]:
            raise ValueError(
                f"{op}: tangent {tuple(d.tangent.shape)} does not fit primal {tuple(d.primal.shape)}; expected [b, ...]"
            )
    return sizes.pop()


def _jvp(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """Value (with its graph) and tangent (without one) of fn at args, of which the Duals are live."""
    live = [i for i, a in enumerate(args) if isinstance(a, Dual)]

    def closed(*primals: Tensor) -> Any:
        full = list(args)
        for i, p in zip(live, primals, strict=True):
            full[i] = p
        return fn(*full)

    y, y_dot, *_ = torch.func.jvp(closed, tuple(args[i].primal for i in live), tuple(args[i].tangent for i in live))
    # The tangent's own graph (recorded because the primals require grad) ends here: nothing of it outlives this op.
    return y, tuple(d.detach() for d in y_dot) if isinstance(y_dot, tuple) else y_dot.detach()


def lift(reference: Callable[..., Any], batched: Sequence[str] = ()) -> Callable[..., Any]:
    """The dual of any torch function, by torch.func.jvp.

    reference: tensors -> tensor or tuple of tensors, each [B, ...].
    batched: names of the arguments whose first dimension is the batch; a plain Tensor among them is a constant per
             sample. Duals always are.
    The result takes Duals where the reference takes tensors, and returns Duals. The batch is split (dual on the first b
    samples, plain on the rest), so no value is computed twice.
    """
    names = list(inspect.signature(reference).parameters)
    batch = frozenset(names.index(n) for n in batched)

    def dual(*args: Any) -> Any:
        duals = [a for a in args if isinstance(a, Dual)]
        b, total = leading(duals, getattr(reference, "__name__", "lift")), duals[0].primal.shape[0]
        if b == total:
            y, y_dot = _jvp(reference, args)
        else:
            # split, not two slices: its backward is one concatenation instead of two zero-filled buffers and a sum
            halves = [
                torch.split(primal(a), [b, total - b])
                if isinstance(a, Dual) or (i in batch and isinstance(a, Tensor))
                else (a, a)
                for i, a in enumerate(args)
            ]
            rest = reference(*(h[1] for h in halves))
            if b == 0:
                y, y_dot = rest, _each_output(lambda o: o.detach()[:0], rest)
            else:
                first, y_dot = _jvp(
                    reference,
                    [Dual(h[0], a.tangent) if isinstance(a, Dual) else h[0] for a, h in zip(args, halves, strict=True)],
                )
                y = tuple(map(_concatenate, first, rest)) if isinstance(rest, tuple) else _concatenate(first, rest)
        return tuple(map(Dual, y, y_dot)) if isinstance(y, tuple) else Dual(y, y_dot)

    return dual


def _each_output(fn: Callable[[Tensor], Tensor], y: Any) -> Any:
    return tuple(map(fn, y)) if isinstance(y, tuple) else fn(y)


def _concatenate(first: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([first, rest])


@dataclass(frozen=True)
class Case:
    """A named shape of an Op, read alike by tests, bench, static compile and tuning.

    shape: the letters of the op's docstring and their sizes (b, where present, is the number of samples that carry a
           tangent; default B).
    live: names of the arguments that carry a tangent.
    tags: "test" (small, every commit) and / or "bench" (a model's real size).
    """

    name: str
    shape: Mapping[str, int]
    live: tuple[str, ...]
    tags: frozenset[str] = field(default=frozenset({"test"}))

    @property
    def b(self) -> int:
        return self.shape.get("b", self.shape["B"])


class Cost(NamedTuple):
    """The least work of one call: floating-point operations, and bytes moved to and from memory."""

    flops: float
    bytes: float


def check(op: str, lead: Tensor, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """A kernel's arguments: name=(tensor or None, shape). One ValueError that names what does not fit; nothing is
    ever copied or cast to fit."""
    if not lead.is_cuda and lead.dtype not in (torch.float16, torch.float32):
        raise ValueError(
            f"{op}: dtype {lead.dtype} on {lead.device}; Triton's interpreter is right in float32 and float16 only"
        )
    if lead.is_cuda and lead.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: dtype {lead.dtype}; expected float16, bfloat16 or float32")
    for name, (x, shape) in tensors.items():
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}; expected {shape}")
        if 0 in shape and not name.endswith("_dot"):
            raise ValueError(f"{op}: {name} is empty {shape}; expected at least one element along every dimension")
        if x.device != lead.device or (x.dtype != lead.dtype and x.dtype != torch.bool):
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}; expected {lead.dtype} on {lead.device}")
        if x.stride(-1) != 1 and shape[-1] > 1:
            raise ValueError(f"{op}: {name} {shape} has stride {x.stride(-1)} in its last dimension; expected 1")


def strides(x: Tensor | None, n: int) -> list[int]:
    """The first n strides; zeros for a tensor that is not there."""
    return [0] * n if x is None else [x.stride(i) for i in range(n)]


def halves(x: Any) -> tuple[Any, Tensor | None]:
    """(primal, tangent or None)."""
    return (x.primal, x.tangent) if isinstance(x, Dual) else (x, None)


def forward_mode(
    ctx: Any, fused: Callable[..., Any], args: Sequence[Any], dots: Sequence[Tensor | None]
) -> list[Tensor]:
    """The `jvp` of a kernel's autograd.Function: the tangents of its outputs, for torch.func.jvp of a model that knows
    no Duals. The value is computed once more beside them.

    args: fused's positional arguments; dots: a tangent or None for as many of them, from the first.
    ctx.dual: whether the call had Duals already.
    """
    if ctx.dual:
        raise RuntimeError("forward-mode AD around a Dual: its tangent would have none; use one or the other")
    live = [*dots, *[None] * (len(args) - len(dots))]
    y = fused(*(a if d is None else Dual(a, d) for a, d in zip(args, live, strict=True)))
    return [_Constant.apply(d.tangent, d.primal) for d in ([y] if isinstance(y, Dual) else y)]


class _Constant(torch.autograd.Function):
    """A tangent that forward mode hands out. A gradient through it raises: without this it would be missing, in
    silence."""

    @staticmethod
    def forward(x_dot: Tensor, x: Tensor) -> Tensor:
        return x_dot.view_as(x_dot)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError("a kernel's tangent has no gradient: detach it (MeanFlow's target is a constant)")


REGISTRY: dict[str, Op] = {}
_forced: list[Backend] = []


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force a backend inside the block. `triton` on CPU tensors runs Triton's interpreter; an op without a kernel
    raises ValueError."""
    if name not in ("reference", "triton"):
        raise ValueError(f"backend {name!r} is unknown; expected 'reference' or 'triton'")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


class Op:
    """One differentiable function, given up to three times: its reference, its fused kernel, its lifted default.

    reference: one to five lines of plain torch without casts: the definition, the oracle (in float64) and the CPU
    implementation.
    inputs:    (case, dtype, device, generator) -> dict of arguments by name, in the range that the model feeds.
    cases:     the named shapes.
    cost:      (case, itemsize) -> Cost of the dual at that case.
    batched:   arguments whose first dimension is the batch (see lift).
    differentiable: arguments with a gradient (default: every floating-point tensor).
    dual:      value and tangent in plain torch, where it beats lift(reference) on every device (the default).
    triton:    the fused function of the same arguments, Duals or Tensors alike.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        inputs: Callable[..., dict[str, Any]],
        cases: Sequence[Case],
        cost: Callable[[Case, int], Cost],
        batched: Sequence[str] = (),
        differentiable: Sequence[str] | None = None,
        dual: Callable[..., Any] | None = None,
        triton: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.reference, self.inputs, self.cases, self.cost = name, reference, inputs, tuple(cases), cost
        self.batched, self.differentiable, self.triton = tuple(batched), differentiable, triton
        self.dual = dual or lift(reference, batched)
        self.signature = inspect.signature(reference)
        self.__doc__ = reference.__doc__
        REGISTRY[name] = self

    def __repr__(self) -> str:
        return f"Op({self.name}{self.signature})"

    def backend_for(self, x: Tensor) -> Backend:
        """The backend that a call with this tensor takes."""
        if _forced:
            if _forced[-1] == "triton" and self.triton is None:
                raise ValueError(f"{self.name}: no Triton kernel yet; use backend('reference')")
            return _forced[-1]
        return "triton" if x.is_cuda and self.triton is not None else "reference"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """With a Dual among the arguments: Duals out. Otherwise: tensors out."""
        if kwargs:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        duals = [a for a in args if isinstance(a, Dual)]
        lead = duals[0].primal if duals else next(a for a in args if isinstance(a, Tensor))
        if self.backend_for(lead) == "triton":
            assert self.triton is not None
            if torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
                # torch.compile leaves out a kernel's forward derivative, in silence (pytorch #192985)
                raise RuntimeError(
                    f"{self.name}: torch.func.jvp inside torch.compile; carry Duals there, or do not compile"
                )
            return self.triton(*args)
        return self.dual(*args) if duals else self.reference(*args)
