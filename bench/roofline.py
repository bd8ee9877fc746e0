"""Every named op of a forward at its measured place under the device's own roofs: operations a byte against
operations a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.meters import Count
from bench.records import GPU
from emf_kernels import Dual, Op, backend

Watch = Callable[[Op, Callable[[], Any], tuple[Any, ...]], Any]


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Every call of an Op goes through watch(op, call, arguments), which returns call()."""
    original = Op.__call__

    def call(self: Op, *args: Any, **kwargs: Any) -> Any:
        return watch(self, lambda: original(self, *args, **kwargs), (*args, *kwargs.values()))

    Op.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Op.__call__ = original  # type: ignore[method-assign]


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (Dual, tuple, list)):
        for part in x:
            yield from tensors(part)


def work(forward: Callable[[], Any]) -> list[tuple[str, int, int]]:
    """(op, operations, bytes) of each call in order: products by formula and one operation an element of every other
    result of the reference, halves of a batch and tangents included; bytes of arguments and results, each once: what a
    fused kernel must move."""
    rows = []

    def watch(op: Op, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        with Count() as count:
            y = call()
        moved = {(t.data_ptr(), t.numel()): t.nbytes for t in tensors((args, y))}
        rows.append((op.name, count.flops + count.elements, sum(moved.values())))
        return y

    with torch.no_grad(), backend("reference"), watched(watch):
        forward()
    return rows


def seconds(forward: Callable[[], Any]) -> list[float]:
    """Seconds of each call in order; values alone are kept, no graph."""
    took = []

    def watch(op: Op, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        y = call()
        if GPU:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
        return y

    with torch.no_grad(), watched(watch):
        forward()
    return took


def roofline(forward: Callable[[], Any], ceiling: dict[str, float], rounds: int = 3) -> list[dict[str, Any]]:
    """A row an op, summed over its calls: operations a byte, the share of the measured ceiling of products and of
    copies that it reaches, and of the forward's ops that it takes; the slowest first."""
    counted = work(forward)
    forward()
    runs = [seconds(forward) for _ in range(rounds)]
    took = [statistics.median(times) for times in zip(*runs, strict=True)]
    sums: dict[str, list[float]] = {}
    for (name, *counts), t in zip(counted, took, strict=True):
        total = sums.setdefault(name, [0, 0, 0, 0])
        for i, x in enumerate((1, *counts, t)):
            total[i] += x
    rows = []
    for name, (calls, flops, moved, t) in sorted(sums.items(), key=lambda item: -item[1][3]):
        row: dict[str, Any] = dict(op=name, calls=int(calls), intensity=flops / moved, time_share=t / sum(took))
        row |= dict(product_share=flops / t / ceiling["flop_s"], copy_share=moved / t / ceiling["bytes_s"])
        rows.append(row | (dict(ms=1e3 * t) if GPU else {}))
    return rows
