"""Bars on the terminal while something is done. A description is shown as it is written, a [ in a file's name
included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich import progress
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str = "", total: float | None = None, **how: Any) -> Iterator[Item]:
    """The items, one after the other, with a bar; see rich.progress.track."""
    yield from progress.track(items, escape(description), total, **how)


def bars(*columns: ProgressColumn, **how: Any) -> Progress:
    """Bars of tasks by description, and beside it what `columns` say: by default how many are done of how many, and the
    time that is left. See rich.progress.Progress."""
    columns = columns or (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}", markup=False), *columns, **how)
