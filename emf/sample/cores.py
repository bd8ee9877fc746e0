"""Work shared among the cores of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_every_core(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """work(item) of each item, in their order; as many at once as torch computes with threads, each on one.

    By itself torch shares every operation among its threads, which wait for each other at its end, by spinning. Of a
    small network that is thousands of ends a second, and where another program has one of the cores, each costs a time
    slice: a run beside other work takes ten times as long, and the cores' time is spent on waiting. Here they meet once
    an item. A result does not depend on the number of threads.
    """
    threads = torch.get_num_threads()
    contexts = [copy_context() for _ in items]  # a thread begins without what is in force here, such as a backend
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(lambda context, item: context.run(work, item), contexts, items)
    finally:
        torch.set_num_threads(threads)
