"""The differentiable function of a kernel, made from what launches it forward and what launches it backward.

All that is the same for every kernel is here: Duals are split and packed, what backward needs is saved, tangents are
marked as having no gradient and cost no zeros, and a second derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dual import Dual, leading

Outputs = tuple[Tensor, ...]
Forward = Callable[[Sequence[Any], Sequence[Tensor | None], int], tuple[Outputs, Outputs, Sequence[Any]]]
Backward = Callable[..., Sequence[Tensor | None]]


def function(
    op: str, forward: Forward, backward: Backward, live: Sequence[str] = (), constant: int = 0
) -> Callable[..., Any]:
    """The function of Tensors or Duals that an Op calls as its kernel, with every argument given by position.

    forward:  (values, dots, b) -> (outputs, tangents, saved). values: the arguments, Duals replaced by their primals;
              dots: a tangent [b, ...] or None for each of the first arguments, those in live; outputs: new tensors;
              tangents: as many, [b, ...], or none where live is empty; saved: what backward needs, tensors or not.
    backward: (saved, *grads) -> a gradient or None for each of the first arguments; the others have none. grads: one
              for each output, with a contiguous last dimension, or None where the output was not used.
    live:     names of the arguments that may be Duals; the first ones.
    constant: how many of the outputs, from the last, have no gradient.

    There are two functions behind it. The cheap one has no forward derivative, so that torch.compile takes it. The
    other is used only while torch.func transforms, or forward-mode AD, are active.
    """
    forward, backward = _there(forward), _there(backward)
    dotted = len(live)
    none = (None,) * dotted
    gradient = _gradient(op, backward)
    halves = 2 if live else 1

    class Carried(torch.autograd.Function):
        """Values and tangents of a training step."""

        @staticmethod
        def forward(ctx: Any, b: int, n: int, *args: Any) -> Any:
            y, y_dot, saved = forward(args[:n], args[n:], b)
            _save(ctx, saved)
            ctx.args = len(args)
            ctx.mark_non_differentiable(*y[len(y) - constant :], *y_dot)
            ctx.set_materialize_grads(False)  # no zeros for the tangents' gradients, which there never are
            return *y, *y_dot

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            given = gradient(_restore(ctx), grads[: len(grads) // halves])
            return None, None, *given, *(None,) * (ctx.args - len(given))

    class Transformed(torch.autograd.Function):
        """The same with a forward derivative. torch.func asks that what is saved be an argument or an output."""

        @staticmethod
        def forward(note: _Note, b: int, n: int, *args: Any) -> Any:
            y, y_dot, saved = forward(args[:n], args[n:], b)
            held: list[Any] = [*args, *y, *y_dot]
            more: list[Any] = []
            note.outputs, note.saved = len(y), []
            for a in saved:
                at = next((i for i, h in enumerate(held) if h is a), None)
                note.saved.append(len(held) + len(more) if at is None else at)
                more += [a] if at is None else []
            return *y, *y_dot, *more

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            note, _, n, *args = inputs
            held = [*args, *output]
            _save(ctx, [held[i] for i in note.saved])
            ctx.save_for_forward(*(a for a in args[:n] if isinstance(a, Tensor)))
            ctx.constants_by_position = {i: a for i, a in enumerate(args[:n]) if not isinstance(a, Tensor)}
            ctx.n, ctx.dual = n, any(a is not None for a in args[n:])
            ctx.args, ctx.outputs, ctx.rest = len(args), note.outputs, len(output) - note.outputs
            ctx.mark_non_differentiable(*(a for a in output[note.outputs - constant :] if isinstance(a, Tensor)))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            given = gradient(_restore(ctx), grads[: ctx.outputs])
            return None, None, None, *given, *(None,) * (ctx.args - len(given))

        @staticmethod
        def jvp(ctx: Any, *dots: Any) -> Any:
            """The tangents, for a model that knows no Duals. The value is computed once more beside them."""
            if ctx.dual:
                raise RuntimeError(f"{op}: forward-mode AD around a Dual: its tangent would have none; use one of them")
            tensors, constants, dots = iter(ctx.saved_tensors), ctx.constants_by_position, dots[3 : 3 + ctx.n]
            values = [constants[i] if i in constants else next(tensors) for i in range(ctx.n)]
            if not dotted or any(d is not None for d in dots[dotted:]):
                taken = ", ".join(live) or "no argument"
                raise RuntimeError(f"{op}: {taken} alone can carry a tangent in forward-mode AD")
            y = fused(*(a if d is None else Dual(a, d) for a, d in zip(values, dots, strict=True)))
            y_dot = [_Constant.apply(d.tangent, d.primal) for d in ([y] if isinstance(y, Dual) else y)]
            return *y_dot, *(None,) * ctx.rest

    def fused(*args: Any) -> Any:
        duals = [a for a in args[:dotted] if isinstance(a, Dual)]
        if duals:
            b, n = leading(duals, op), len(args)
            dots = [a.tangent if isinstance(a, Dual) else None for a in args[:dotted]]
            args = (*(a.primal if isinstance(a, Dual) else a for a in args), *dots)
        else:
            b, n, args = 0, len(args), (*args, *none)
        if transforming():
            note = _Note()
            out = Transformed.apply(note, b, n, *args)[: halves * note.outputs]
        elif torch.is_grad_enabled():
            out = Carried.apply(b, n, *args)
        else:
            y, y_dot, _ = forward(args[:n], args[n:], b)
            out = *y, *y_dot
        half = len(out) // halves
        if not duals:
            return out[0] if half == 1 else out[:half]
        return Dual(*out) if half == 1 else tuple(map(Dual, out[:half], out[half:]))

    return fused


def _there(launches: Callable[..., Any]) -> Callable[..., Any]:
    """launches(tensors, ...), on the device of the tensors: Triton itself takes the current one."""

    def run(tensors: Sequence[Any], *rest: Any) -> Any:
        lead = next((a for a in tensors if isinstance(a, Tensor)), None)
        if (
            lead is None
            or not lead.is_cuda
            or torch.compiler.is_compiling()
            or lead.device.index == torch.cuda.current_device()
        ):
            return launches(tensors, *rest)
        with torch.cuda.device(lead.device):
            return launches(tensors, *rest)

    return run


def transforming() -> bool:
    """Whether torch.func transforms or forward-mode AD are active. Compiled code carries Duals: see Op."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def requires_grad(x: Tensor) -> bool:
    """Whether a gradient of x may be asked for, by any of the transforms that it is wrapped in."""
    while not x.requires_grad:
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


class _Note:
    """What Transformed's forward tells its setup_context: how many outputs there are, and what is saved: positions
    among the arguments and outputs."""

    outputs: int
    saved: list[int]


def _save(ctx: Any, saved: Sequence[Any]) -> None:
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in saved))
    ctx.constants = tuple(None if isinstance(a, Tensor) else a for a in saved)


def _restore(ctx: Any) -> list[Any]:
    """What was saved. The tensors are unpacked once: torch.utils.checkpoint allows no more."""
    return [c if a is None else a for a, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]


def _gradient(op: str, backward: Backward) -> Callable[[Sequence[Any], Sequence[Tensor | None]], Sequence[Any]]:
    """backward, with gradients as the kernels take them, and not to be differentiated itself."""

    class Gradient(torch.autograd.Function):
        """Stands between a gradient and all that it depends on, so that whoever differentiates it meets an error."""

        @staticmethod
        def forward(n: int, *args: Any) -> Any:
            return tuple(launched(args[:n], args[n:]))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(f"{op}: a kernel has no second derivative; use backend('reference') for one")

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(f"{op}: a kernel's gradient has no forward derivative; use backend('reference') for one")

    def launched(saved: Sequence[Any], grads: Sequence[Tensor | None]) -> Sequence[Any]:
        return backward(saved, *(g if g is None or g.stride(-1) == 1 else g.contiguous() for g in grads))

    def gradient(saved: Sequence[Any], grads: Sequence[Tensor | None]) -> Sequence[Any]:
        if all(g is None for g in grads):
            return ()
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or transforming()):
            return launched(saved, grads)
        return Gradient.apply(len(saved), *saved, *grads)

    return gradient


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
