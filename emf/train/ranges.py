"""Named ranges of a training step, for nsys (NVTX) and for torch.profiler's trace: data, encode, forward by block,
backward, optimizer, communication. A tangent has none of its own: it travels with its value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import nvtx
from torch import nn
from torch.profiler import record_function


@contextmanager
def span(name: str) -> Iterator[None]:
    with nvtx.annotate(name), record_function(name):
        yield


def mark(module: nn.Module, name: str) -> None:
    """Every forward of module, a recomputed one too, becomes a range."""
    running: list[ExitStack] = []

    def before(*_: Any) -> None:
        running.append(ExitStack())
        running[-1].enter_context(span(name))

    module.register_forward_pre_hook(before)
    module.register_forward_hook(lambda *_: running.pop().close(), always_call=True)


def mark_network(network: nn.Module) -> None:
    """Every block."""
    for name, module in network.named_modules():
        parent, _, last = name.rpartition(".")
        if parent.endswith("transformer_blocks"):
            mark(module, f"block {last}")
