"""CUDA graphs of the transformer's blocks: the host launches all of them, forward or backward, by one call.

At a micro-batch of one or two the GPU waits for Python. A graph is recorded for each combination of shapes that
occurs, so for each b. It runs at fixed addresses: what comes in is copied to them, and gradients are copied from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emf_kernels import Dual

MOST = 8  # graphs of one network; each holds its own gradients, as many bytes as the weights
WARM = 2  # runs before a recording: kernels compile, libraries take their workspaces

Halves = list[Tensor | None]
"""Arguments laid flat: of each the value, and the tangent or None."""


def flat(*values: Any) -> Halves:
    return [half for a in values for half in (a if isinstance(a, Dual) else (a, None))]


def folded(halves: Sequence[Tensor | None]) -> list[Any]:
    return [p if d is None else Dual(p, d) for p, d in zip(halves[::2], halves[1::2], strict=True)]  # type: ignore[arg-type]


def record(run: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """(what run() returned, which lies at fixed addresses; what computes it there again)."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, which make batches, may allocate meanwhile. The outer block gives the stream back where the
    # recording fails: torch.cuda.graph then leaves the thread on its own.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        made = run()
    return made, graph.replay


def warm_up(run: Callable[[], Any]) -> None:
    """On a stream of its own, as recording asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)


class _Around(nn.Module):
    """`run` as the forward of a module that holds the weights, for torch.func.functional_call to replace them."""

    def __init__(self, run: Callable[..., Any], weights: nn.Module) -> None:
        super().__init__()
        self.run, self.weights = run, weights

    def forward(self, *values: Any) -> Any:
        return self.run(*values)


class Recorded:
    """Forward and backward of one combination of shapes."""

    def __init__(self, run: Callable[..., Any], halves: Halves, weights: nn.Module, pool: Any) -> None:
        # Autograd ties a weight to the stream on which it was first used, for as long as some graph lives (the last
        # micro-batch's loss, say), and a recording may wait for no other stream. So it computes with leaves of its own
        # that lie where the weights lie.
        self.around = _Around(run, weights)
        self.leaves = {
            name: p.detach().requires_grad_() for name, p in self.around.named_parameters() if p.requires_grad
        }
        self.inputs: Halves = [
            None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in halves
        ]
        self.wanted = [x for x in self.inputs if x is not None and x.requires_grad] + list(self.leaves.values())
        self.live: Tensor
        """The output with its graph of autograd, of the run that is being recorded."""
        self.number = 0
        """Of the last forward; the activations are its."""
        self.dy: Tensor | None = None

        def once() -> None:
            self.forward()
            torch.autograd.grad(self.live, self.wanted, torch.ones_like(self.live), allow_unused=True)

        warm_up(once)
        del self.live
        self.outputs, self.replay_forward = record(self.forward, pool)
        self.dy = torch.zeros_like(self.live)
        self.gradients, self.replay_backward = record(self.backward, pool)
        del self.live

    def forward(self) -> list[Tensor]:
        with torch.enable_grad():
            y = torch.func.functional_call(self.around, self.leaves, tuple(folded(self.inputs)))
        self.live = y.primal if isinstance(y, Dual) else y
        return [self.live.detach(), *((y.tangent,) if isinstance(y, Dual) else ())]

    def backward(self) -> Sequence[Tensor | None]:
        return torch.autograd.grad(self.live, self.wanted, self.dy, allow_unused=True)

    def start(self, halves: Sequence[Tensor | None]) -> list[Tensor]:
        self.number += 1
        with torch.no_grad():
            for held, x in zip(self.inputs, halves, strict=True):
                if held is not None and x is not None:
                    held.copy_(x)
        self.replay_forward()
        return [y.detach() for y in self.outputs]

    def finish(self, dy: Tensor) -> list[Tensor | None]:
        """The gradients, one for each input and weight, in memory of their own, which the next replay does not
        overwrite: copied by one call, where autograd would copy each by itself."""
        assert self.dy is not None
        self.dy.copy_(dy)
        self.replay_backward()
        own = iter(torch._foreach_mul([g for g in self.gradients if g is not None], 1))
        wanted = iter([None if g is None else next(own) for g in self.gradients])
        given = [next(wanted) if x is not None and x.requires_grad else None for x in self.inputs]
        return [*given, *wanted]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: Graphs, recorded: Recorded, n: int, *args: Tensor | None) -> Any:
        y = recorded.start(args[:n])
        graphs.last = ctx.last = (recorded, recorded.number)
        ctx.graphs = graphs
        ctx.mark_non_differentiable(*y[1:])
        ctx.set_materialize_grads(False)
        return tuple(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if ctx.last != ctx.graphs.last:
            raise RuntimeError(
                "graphs: this backward comes after another forward, which has overwritten its activations; go "
                "backward after each forward, or leave --graphs off"
            )
        recorded, _ = ctx.last
        if dy is None:
            return None, None, None, *(None,) * (len(recorded.inputs) + len(recorded.leaves))
        ctx.graphs.last = None  # the activations are used up
        return None, None, None, *recorded.finish(dy)


class Graphs:
    """run(*values) by graphs: `run` takes Tensors and Duals and returns one; of what else it computes with, the
    weights, the addresses stay the same, or all is recorded again.

    Without a gradient, and once there are MOST graphs, run itself is called.
    """

    def __init__(self, run: Callable[..., Any], weights: nn.Module) -> None:
        self.run, self.module = run, weights
        self.recorded: dict[Any, Recorded] = {}
        self.last: tuple[Recorded, int] | None = None
        """Whose activations are in the memory that all graphs share, and of which forward."""
        self.pool: Any = None
        self.places: list[tuple[int, bool]] = []

    def __call__(self, *values: Any, **constants: Any) -> Any:
        weights = list(self.module.parameters())
        trained = [p for p in weights if p.requires_grad]
        halves = flat(*values)
        if not torch.is_grad_enabled() or not (trained or any(x is not None and x.requires_grad for x in halves)):
            return self.run(*values, **constants)
        places = [(p.data_ptr(), p.requires_grad) for p in weights]
        if places != self.places:
            self.recorded.clear()
            self.places, self.last, self.pool = places, None, None
        key = (*constants.items(), *((x.shape, x.dtype, x.requires_grad) if x is not None else None for x in halves))
        if key not in self.recorded:
            if len(self.recorded) == MOST:
                return self.run(*values, **constants)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.last = None  # a recording uses the shared memory too
            run = lambda *held: self.run(*held, **constants)  # noqa: E731
            self.recorded[key] = Recorded(run, halves, self.module, self.pool)
        y = _Replayed.apply(self, self.recorded[key], len(halves), *halves, *trained)
        return Dual(*y) if len(y) > 1 else y[0]
