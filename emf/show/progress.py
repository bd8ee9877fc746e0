"""A bar on the terminal while something is gone through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich import progress
from rich.markup import escape

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str = "", total: float | None = None, **how: Any) -> Iterator[Item]:
    """rich.progress.track; the description is shown as it is written, a [ in a file's name included."""
    yield from progress.track(items, escape(description), total, **how)
