"""Bars on the terminal while something is done. A description is shown as it is written, a [ in a file's name
included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str = "", total: float | None = None, **how: Any) -> Iterator[Item]:
    """The items, one after the other, with a bar; see rich.progress.track."""
    yield from progress.track(items, escape(description), total, **how)


def bars(*columns: ProgressColumn, **how: Any) -> Progress:
    """Bars of tasks by description, and beside it what `columns` say: by default how many are done of how many, and the
    time that is left. See rich.progress.Progress."""
    columns = columns or (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}", markup=False), *columns, **how)


@contextmanager
def count_bytes(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A bar over bytes on stderr, where that is a terminal; yields what is told of bytes done."""
    console = Console(stderr=True)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with bars(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
