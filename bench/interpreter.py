"""Triton's interpreter as tests and benchmarks need it: what it computes is what a GPU would.

As Triton has it, it keeps bfloat16 as the integers of its bits and computes with those; it multiplies float32 exactly
where tensor cores drop all but ten bits of an operand; and its maximum of a number and NaN is NaN, where a GPU's is the
number. Users have it as Triton has it, and the kernels refuse bfloat16 in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy
import torch
from numpy import ndarray

from emf_kernels import REGISTRY, launch

with launch.decorating():
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

ATOMIC_ADD, TF32 = interpreter._ir.ATOMIC_OP.FADD, interpreter._ir.INPUT_PRECISION.TF32


def widened(x: TensorHandle) -> TensorHandle:
    """bfloat16 as float32; everything else as it is."""
    if x.dtype != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)


def narrowed(x: ndarray) -> TensorHandle:
    """float32 as the nearest bfloat16, of two the even one, by torch's own rounding."""
    wide = torch.from_numpy(numpy.array(x, numpy.float32))
    return TensorHandle(wide.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def arithmetic(name: str, count: int) -> Callable[..., TensorHandle]:
    """A method of the builder in float32, its first `count` arguments widened. A number that it gives is of the last
    one's dtype, a comparison's truth is not."""
    exact = getattr(InterpreterBuilder, name)

    def run(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        y = exact(self, *map(widened, args[:count]), *args[count:])
        return narrowed(y.data) if args[count - 1].dtype == tl.bfloat16 and y.data.dtype.kind == "f" else y

    return run


def cast(self: InterpreterBuilder, x: TensorHandle, to: Any) -> TensorHandle:
    x, to = widened(x), to.scalar
    return narrowed(x.data) if to == tl.bfloat16 else TensorHandle(x.data.astype(interpreter._get_np_dtype(to)), to)


def truncated(x: TensorHandle) -> TensorHandle:
    """float32 as a tensor core reads it."""
    return TensorHandle((x.data.view(numpy.int32) & -0x2000).view(numpy.float32), tl.float32)


def dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: Any, *rest: Any
) -> TensorHandle:
    a, b = (truncated(x) if x.dtype == tl.float32 and precision == TF32 else widened(x) for x in (a, b))
    return DOT(self, a, b, c, precision, *rest)


def atomic(
    self: InterpreterBuilder, what: Any, at: TensorHandle, x: TensorHandle, mask: TensorHandle, *rest: Any
) -> TensorHandle:
    """bfloat16 is added one element after the other: several may go to one place."""
    if x.dtype != tl.bfloat16 or what != ATOMIC_ADD:
        return ATOMIC(self, what, at, x, mask, *rest)
    places, values, inside = (numpy.broadcast_to(h.data, at.data.shape).flatten() for h in (at, widened(x), mask))
    before = numpy.zeros(places.shape, numpy.uint16)
    for i in numpy.flatnonzero(inside):
        place, one = places[i : i + 1], numpy.ones(1, bool)  # the builder's own load has other arguments from 3.9 on
        there = interpreter._interpreter.load(place, one, numpy.zeros(1, numpy.uint16), numpy.dtype(numpy.uint16))
        before[i : i + 1] = there
        added = narrowed(widened(TensorHandle(there, tl.bfloat16)).data + values[i])
        interpreter._interpreter.store(place, added.data, one)
    return TensorHandle(before.reshape(at.data.shape), tl.bfloat16)


def reduce(self: ReduceScanOpInterface, input: Any) -> Any:
    if not isinstance(input, tuple):
        return self.apply((input,))[0]
    of = lambda x, handle: tl.tensor(handle, x.type.with_element_ty(handle.dtype))  # noqa: E731
    many = REDUCE(self, tuple(of(x, widened(x.handle)) for x in input))
    brain = input[0].dtype == tl.bfloat16
    return tuple(of(y, narrowed(y.handle.data)) if brain and y.dtype == tl.float32 else y for y in many)


@cache
def languages(fn: Callable[..., Any]) -> tuple[Any, ...]:
    return tuple(module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values()))


def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """What a kernel calls. Triton would look through its whole language each time for what to replace in it, which
    takes a third of a test; here only where that has not been done."""
    if any(tl.core.is_builtin(module.arange) for module in languages(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


DOT, ATOMIC = InterpreterBuilder.create_dot, InterpreterBuilder.create_atomic_rmw
REDUCE = ReduceScanOpInterface.apply
METHODS = dict(
    binary_op=arithmetic("binary_op", 2),
    create_fma=arithmetic("create_fma", 3),  # what has one argument, such as exp, Triton has in float32 alone
    cast_impl=cast,
    create_dot=dot,
    create_atomic_rmw=atomic,
    create_maxnumf=lambda self, a, b: self.binary_op(a, b, numpy.fmax),
    create_minnumf=lambda self, a, b: self.binary_op(a, b, numpy.fmin),
    get_bf16=lambda self, value: narrowed(numpy.array([value])),
)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, kernels in the interpreter compute as on a GPU, and take bfloat16. Where kernels are compiled, nothing
    changes."""
    with ExitStack() as stack:
        if launch.INTERPRETED:
            for name, method in METHODS.items():
                create = name == "get_bf16"  # a constant of bfloat16, which it has not got
                stack.enter_context(mock.patch.object(InterpreterBuilder, name, method, create=create))
            stack.enter_context(mock.patch.object(ReduceScanOpInterface, "apply", reduce))
            stack.enter_context(mock.patch.object(InterpretedFunction, "__call__", call))
            dtypes = (torch.float16, torch.bfloat16, torch.float32)
            stack.enter_context(mock.patch("emf_kernels.op.INTERPRETED_DTYPES", dtypes))
            for op in REGISTRY.values():  # what was accepted inside is refused again afterwards
                stack.enter_context(mock.patch.object(op, "_accepted", {}))
        yield
