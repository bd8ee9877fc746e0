"""Tables of text: in Markdown, and in a terminal."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

NARROW = 130  # characters of an output that is no terminal


class Markdown(str):
    """A cell that is Markdown already, such as a figure in bold."""


def cell(text: str) -> str:
    """A text for a cell of a Markdown table, so that a reader sees it as it is written: what Markdown or HTML would
    take for a sign has a backslash before it, a line break is one in the cell. Markdown stays as it is."""
    if isinstance(text, Markdown):
        return text
    return re.sub(r"([\\`*_<>\[\]|~$&])", r"\\\1", text.strip()).replace("\r\n", "\n").replace("\n", "<br>")


def bold(text: str) -> Markdown:
    """A text in bold, otherwise as it is written."""
    return Markdown(f"**{cell(text)}**")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; texts as `cell` shows them."""
    lines = ["| " + " | ".join(cell(c) for c in row) + " |" for row in (heads, *rows)]
    lines = [re.sub(r"\|\s+(?=\|)", "| ", line) for line in lines]
    return [lines[0], "|--" * len(heads) + "|", *lines[1:]]


def terminal(
    heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", words: Collection[int] = ()
) -> Table:
    """A table to print: columns of numbers stand to the right, those numbered in `words` to the left. No text in it is
    markup: a [ stays a [."""
    made = Table(title=Text(title, "table.title") if title else None, title_justify="left")
    for j, head in enumerate(heads):
        made.add_column(Text(head), overflow="fold", justify="left" if j in words else "right")
    for row in rows:
        made.add_row(*(Text(c) for c in row))
    return made


class Terminal(Console):
    """rich's, but that a reader who has enough is for emf.errors to deal with, as anywhere else."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """The terminal, or an output of NARROW characters; what is printed on it is no markup."""
    return Terminal(width=None if Console().is_terminal else NARROW, markup=False, highlight=False)
