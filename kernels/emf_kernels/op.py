"""The contract that every operation of this library keeps: Dual, lift, Op, Case, the registry and the choice of
backend.

A network's Jacobian-vector product is computed here by carrying a value and its tangent together: `Dual(primal,
tangent)`. Every operation on a Dual is a named `Op`. An Op is right from its first line, because its dual defaults to
`lift(reference)`; a fused Triton kernel replaces that default where a record shows that it is faster, and is held to
the same reference by the same tests.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import launch
from .dual import Dual, check_dual, leading, primal

Backend = Literal["reference", "triton"]


def _jvp(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """Value (with its graph) and tangent (without one) of fn at args, of which the Duals are live."""
    live = [i for i, a in enumerate(args) if isinstance(a, Dual)]

    def closed(*primals: Tensor) -> Any:
        full = list(args)
        for i, p in zip(live, primals, strict=True):
            full[i] = p
        return fn(*full)

    y, y_dot, *_ = torch.func.jvp(
        closed, tuple(_own(args[i].primal) for i in live), tuple(_own(args[i].tangent) for i in live)
    )
    # The tangent's own graph (recorded because the primals require grad) ends here: nothing of it outlives this op.
    # On a GPU some of PyTorch's forward derivatives (of a norm in half precision) come in float32.
    if isinstance(y, tuple):
        return y, tuple(d.detach().to(o.dtype) for o, d in zip(y, y_dot, strict=True))
    return y, y_dot.detach().to(y.dtype)


def _own(x: Tensor) -> Tensor:
    """x as forward mode takes it: memory of which one element is several is copied (an expanded tensor), and under
    torch.compile, where forward mode refuses views, and tangents of sizes that are not fixed, everything; the compiler
    drops those copies."""
    if torch.compiler.is_compiling():
        return x.clone()
    return x.contiguous() if 0 in x.stride() else x


def lift(reference: Callable[..., Any], batched: Sequence[str] = ()) -> Callable[..., Any]:
    """The dual of any torch function, by torch.func.jvp.

    reference: tensors -> tensor or tuple of tensors, each [B, ...].
    batched: names of the arguments whose first dimension is the batch; a plain Tensor among them is a constant per
             sample, or has one entry for all samples. Duals always are.
    The result takes Duals where the reference takes tensors, and returns Duals. The batch is split (dual on the first b
    samples, plain on the rest), so no value is computed twice.
    """
    names = list(inspect.signature(reference).parameters)
    batch = frozenset(names.index(n) for n in batched)

    def dual(*args: Any) -> Any:
        duals = [a for a in args if isinstance(a, Dual)]
        name = getattr(reference, "__name__", "lift")
        if not duals:
            raise ValueError(f"{name}: no Dual among the arguments; expected one")
        for d in duals:
            check_dual(name, "an argument", d)
        b, total = leading(duals, name), duals[0].primal.shape[0]
        if b == total:
            y, y_dot = _jvp(reference, args)
        else:
            # split, not two slices: its backward is one concatenation instead of two zero-filled buffers and a sum
            halves = [
                torch.split(primal(a), [b, total - b])
                if isinstance(a, Dual) or (i in batch and isinstance(a, Tensor) and a.shape[0] == total)
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


INTERPRETED_DTYPES = (torch.float16, torch.float32)  # in which Triton's interpreter is right
MOST = 65535  # programs along the second and third dimension of a GPU's grid, where some kernels have the samples


def check_kernel_dtype(op: str, lead: Tensor) -> None:
    """Raises ValueError on a dtype for which the kernels are not right, RuntimeError where they cannot run."""
    if not lead.is_cuda and lead.dtype not in INTERPRETED_DTYPES:
        raise ValueError(
            f"{op}: dtype {lead.dtype} on {lead.device}; Triton's interpreter is right in float32 and float16 only"
        )
    if lead.is_cuda and lead.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: dtype {lead.dtype}; expected float16, bfloat16 or float32")
    if lead.ndim and lead.shape[0] > MOST:
        raise ValueError(f"{op}: a batch of {lead.shape[0]}; expected at most {MOST}, or several calls")
    if not lead.is_cuda and not launch.INTERPRETED:
        raise RuntimeError(
            f"{op}: kernels are compiled in this process and cannot run on {lead.device}; for Triton's interpreter "
            "import emf_kernels before triton where there is no GPU, or start Python with TRITON_INTERPRET=1"
        )


REGISTRY: dict[str, Op] = {}
KNOWN = 1024  # how many accepted calls an op remembers before it forgets them all
# what an argument may be that a reference annotates so; symbolic where torch.compile traces
NUMBERS = {"float": (float, int, torch.SymFloat, torch.SymInt), "int": (int, torch.SymInt)}
ADDED = ("eps", "c")  # small numbers that keep a root or a denominator from 0
_forced: ContextVar[Backend | None] = ContextVar("backend", default=None)


class _Traced(threading.local):
    """The same for torch.compile, which cannot read a ContextVar but compiles again when this one changes."""

    def __init__(self) -> None:
        self.forced: Backend | None = None  # of the instance: a class's attribute is not guarded


_traced = _Traced()


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force a backend inside the block, for this thread or asyncio task alone. `triton` on CPU tensors runs Triton's
    interpreter; an op without a kernel raises ValueError. The second forward of torch.utils.checkpoint on a GPU is run
    by a thread of autograd's own, which does not see the block."""
    if name not in ("reference", "triton"):
        raise ValueError(f"backend {name!r} is unknown; expected 'reference' or 'triton'")
    before, _traced.forced = _traced.forced, name
    token = None if torch.compiler.is_compiling() else _forced.set(name)
    try:
        yield
    finally:
        if token is not None:
            _forced.reset(token)
        _traced.forced = before


class Op:
    """One differentiable function, given up to three times: its reference, its fused kernel, its lifted default.

    reference: a few lines of plain torch without casts but `widened`: the definition, the oracle (in float64) and the
               CPU implementation. Autocast does not reach it.
    inputs:    (case, dtype, device, generator) -> dict of arguments by name, in the range that the model feeds.
    cases:     the named shapes.
    cost:      (case, itemsize) -> Cost of the dual at that case.
    accepts:   of the same arguments, Duals replaced by their primals: raises ValueError on what does not fit, the same
               for every backend. That tensors are Tensors and tangents fit their primals is seen to before.
    batched:   arguments whose first dimension is the batch (see lift).
    live:      arguments that may be Duals (default: batched).
    any_rank:  arguments taken with any number of dimensions from two on, as `x [B, ...]` is.
    differentiable: arguments with a gradient (default: every floating-point tensor).
    dual:      value and tangent in plain torch, where it beats lift(reference) on every device (the default).
    triton:    the fused function of the same arguments, Duals or Tensors alike.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        inputs: Callable[..., dict[str, Any]],
        cost: Callable[[Case, int], Cost],
        accepts: Callable[..., None],
        cases: Sequence[Case],
        *,
        batched: Sequence[str] = (),
        live: Sequence[str] | None = None,
        any_rank: Sequence[str] = (),
        differentiable: Sequence[str] | None = None,
        dual: Callable[..., Any] | None = None,
        triton: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.reference, self.inputs, self.cases, self.cost = name, reference, inputs, tuple(cases), cost
        self.batched, self.differentiable, self.triton = tuple(batched), differentiable, triton
        self.live, self.any_rank = self.batched if live is None else tuple(live), tuple(any_rank)
        self.dual, self.accepts = dual or lift(reference, batched), accepts
        self.signature = inspect.signature(reference)
        parameters = self.signature.parameters.values()
        self._required = sum(p.default is p.empty for p in parameters)
        self._defaults = tuple(p.default for p in parameters)
        # (name, whether a Tensor, whether None will do) of each argument
        self._arguments = [(p.name, "Tensor" in str(p.annotation), "None" in str(p.annotation)) for p in parameters]
        self._numbers = {p.name: kind for p in parameters for kind in NUMBERS if str(p.annotation).startswith(kind)}
        self._accepted: dict[tuple[Any, ...], bool] = {}
        self.__module__ = reference.__module__
        self.__doc__ = reference.__doc__
        REGISTRY[name] = self

    def __repr__(self) -> str:
        return f"Op({self.name}{self.signature})"

    def __reduce__(self) -> str:
        return self.name  # pickled as a function is: by its module and name

    def backend_for(self, x: Tensor) -> Backend:
        """The backend that a call with this tensor takes."""
        forced = _traced.forced if torch.compiler.is_compiling() else _forced.get()
        if forced is not None:
            if forced == "triton" and self.triton is None:
                raise ValueError(f"{self.name}: no Triton kernel yet; use backend('reference')")
            return forced
        return "triton" if x.is_cuda and self.triton is not None else "reference"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """With a Dual among the arguments: Duals out. Otherwise: tensors out. Raises ValueError, naming the argument,
        on what does not fit. A call like one that was accepted before is not looked at again."""
        if kwargs or not self._required <= len(args) <= len(self._defaults):
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        elif len(args) < len(self._defaults):
            args += self._defaults[len(args) :]
        if torch.compiler.is_compiling():
            chosen, dual = self._check(args)
            if chosen == "triton" and forward_ad._current_level >= 0:
                # torch.compile leaves out a kernel's forward derivative, in silence (pytorch #192985)
                raise RuntimeError(
                    f"{self.name}: torch.func.jvp inside torch.compile; carry Duals there, or do not compile"
                )
        else:
            chosen, dual = self._recognised(args)
            if forward_ad._current_level >= 0:
                self._refuse_tangents(args)
        run = self.triton if chosen == "triton" else self.dual if dual else self.reference
        assert run is not None
        if not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu"):
            return run(*args)
        lead = next(primal(a) for a in args if isinstance(a, (Dual, Tensor)))
        with torch.autocast(lead.device.type, enabled=False):  # a kernel would not follow it: no op does
            return run(*args)

    def _recognised(self, args: Sequence[Any]) -> tuple[Backend, bool]:
        """As _check, which is asked once for all calls of the same shapes, strides, dtypes, devices and constants."""
        key: list[Any] = []
        lead = None
        try:
            for a in args:
                if isinstance(a, Dual):
                    p, d = a
                    key += (Dual, p.shape, p.stride(), p.dtype, p.device, d.shape, d.stride(), d.dtype, d.device)
                    lead = p if lead is None else lead
                elif isinstance(a, Tensor):
                    key += (a.shape, a.stride(), a.dtype, a.device)
                    lead = a if lead is None else lead
                else:
                    key += (a.__class__, a)
            chosen = self.backend_for(lead)  # type: ignore[arg-type]
            known = (chosen, *key)
            dual = self._accepted.get(known)
        except (AttributeError, RuntimeError, TypeError):  # nothing that fits, or nothing that can be remembered
            return self._check(args)
        if dual is None:
            chosen, dual = self._check(args)
            if len(self._accepted) >= KNOWN:
                self._accepted.clear()
            self._accepted[known] = dual
        return chosen, dual

    def _check(self, args: Sequence[Any]) -> tuple[Backend, bool]:
        """(the backend, whether there are Duals). Raises ValueError on an argument that does not fit."""
        duals, lead = [], None
        for a, (name, tensor, optional) in zip(args, self._arguments, strict=True):
            if not tensor:
                if isinstance(a, (Dual, Tensor)):
                    raise ValueError(f"{self.name}: {name} is a {type(a).__name__}; expected a constant")
                kind = self._numbers.get(name)
                fits = (
                    not kind or (isinstance(a, NUMBERS[kind]) and not isinstance(a, bool)) or (a is None and optional)
                )
                if not fits:
                    raise ValueError(
                        f"{self.name}: {name} is {a!r}; expected {'an int' if kind == 'int' else 'a float'}"
                    )
                least = 0.0 if name in ADDED else -math.inf
                # a compiler's number has no value yet; torch.compile traces comparisons, and no math.isfinite
                if kind and type(a) in (int, float) and not (least <= a < math.inf and a > -math.inf):
                    low = ", at least 0" * (not least)
                    raise ValueError(f"{self.name}: {name} is {a}; expected a finite number{low}")
            elif isinstance(a, Dual):
                if name not in self.live:
                    raise ValueError(self._takes_none(name))
                check_dual(self.name, name, a, strided=self.triton is None)
                duals.append(a)
            elif not isinstance(a, Tensor) and not (a is None and optional):
                raise ValueError(f"{self.name}: {name} is {type(a).__name__}; expected a Tensor or a Dual")
            elif lead is None:
                lead = a
        leading(duals, self.name)
        self.accepts(*(primal(a) if isinstance(a, Dual) else a for a in args))
        lead = duals[0].primal if duals else lead
        assert lead is not None
        chosen = self.backend_for(lead)
        if chosen == "triton":
            check_kernel_dtype(self.name, lead)
        return chosen, len(duals) > 0

    def _takes_none(self, name: str) -> str:
        expected = f"a Dual for {', '.join(self.live)} alone" if self.live else "a Tensor"
        return f"{self.name}: {name} takes no tangent; expected {expected}"

    def _refuse_tangents(self, args: Sequence[Any]) -> None:
        """The same in forward-mode AD, for every backend."""
        for a, (name, _, _) in zip(args, self._arguments, strict=True):
            if name not in self.live and isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None:
                raise ValueError(self._takes_none(name))
