"""Two stages of one way at once: while a batch is worked on, the next one is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from threading import Event
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
GoOn = Callable[[], None]
"""Called between the steps of a work: ends it where nobody waits for its result any more."""


class Unwanted(Exception):
    """Nobody waits for this work's result any more."""


def nothing() -> None:
    """The GoOn of work that is waited for."""


def work_aside(items: Iterable[Item], work: Callable[[Item, GoOn], Result], device: torch.device) -> Iterator[Result]:
    """work(item, go_on) of each item, in their order. The next item is made here while the last one is worked on in a
    thread, on a GPU in a stream of its own; one item is under way, and one is made.

    What is made belongs to this thread, for some of it asks for the main one: CUDA graphs and compiled code keep their
    state by thread, and engines start processes. `work` ends with its result on the CPU, so that nothing on the GPU
    reads an item after it. An error of either side comes here as it is, after the results of the items before it. An
    interrupt ends what is under way at its next go_on.
    """
    ended, source = Event(), iter(items)
    aside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def go_on() -> None:
        if ended.is_set():
            raise Unwanted

    def begin(item: Item, made: torch.cuda.Event | None) -> Result:
        with nullcontext() if aside is None else torch.cuda.stream(aside):
            if aside is not None and made is not None:
                aside.wait_event(made)
            return work(item, go_on)

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[Result] | None = None
        fault: Exception | None = None
        try:
            while fault is None:
                try:
                    item = next(source)
                except StopIteration:
                    break
                except Exception as error:  # comes after the result that is waited for
                    fault = error
                    break
                last = waiting
                if last is not None:
                    last.result()  # its error comes before more is begun
                made = None if aside is None else torch.cuda.current_stream(device).record_event()
                # a thread begins without what is in force here, such as a backend
                waiting = pool.submit(copy_context().run, begin, item, made)
                del item
                if last is not None:  # handed out once the next is under way, for the caller may take its time with it
                    yield last.result()
            if waiting is not None:
                yield waiting.result()
            if fault is not None:
                raise fault
        finally:
            ended.set()
