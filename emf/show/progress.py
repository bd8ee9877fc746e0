"""How far something is: bars on stderr where that is a terminal, and elsewhere, as in a log, a line every half minute.
stdout is left to results. A description is shown as it is written, a [ in a file's name included."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")
EVERY = 30.0
"""Seconds between two lines."""


def say(text: str) -> None:
    """A line on stderr: what begins now, and may take long."""
    print(text, file=sys.stderr, flush=True)


class Bars(Progress):
    """Progress of rich's. Where stderr is no terminal it says in lines how far the task is that moved last."""

    def __init__(self, *columns: ProgressColumn, counted: Callable[[int], str] = str, **how: Any) -> None:
        console, off = Console(stderr=True), how.pop("disable", False)
        self.counted, self.last = counted, time.monotonic()
        self.lines = not console.is_terminal and not off
        super().__init__(*columns, console=console, disable=off or self.lines, **how)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._line(task_id)

    def update(self, task_id: TaskID, **how: Any) -> None:
        super().update(task_id, **how)
        self._line(task_id)

    def _line(self, task_id: TaskID) -> None:
        """Say how far a task is, where the last line is long enough ago."""
        if not self.lines or time.monotonic() - self.last < EVERY:
            return
        self.last = time.monotonic()
        task = self._tasks[task_id]
        of = "" if task.total is None else f" of {self.counted(int(task.total))}"
        left = "" if task.time_remaining is None or task.finished else f", about {minutes(task.time_remaining)} left"
        say(f"{task.description}: {self.counted(int(task.completed))}{of} after {minutes(task.elapsed or 0)}{left}")


def minutes(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def bars(*columns: ProgressColumn, **how: Any) -> Bars:
    """Bars of tasks by description, and beside it what `columns` say: by default how many are done of how many, and the
    time that is left. how: see rich.progress.Progress; counted: how a line says a number."""
    columns = columns or (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Bars(TextColumn("{task.description}", markup=False), *columns, **how)


def track(items: Iterable[Item], description: str, total: int | None = None, **how: Any) -> Iterator[Item]:
    """The items, one after the other, with a bar. how: see rich.progress.Progress."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with bars(**how) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


@contextmanager
def count_bytes(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A bar over bytes; yields what is told of bytes done."""
    with bars(BarColumn(), DownloadColumn(), TransferSpeedColumn(), counted=decimal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
