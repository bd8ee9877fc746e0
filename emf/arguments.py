"""Command-line arguments: tyro's errors as one line, and a config file's contents as arguments, so that one parser
checks names and types for both."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

NEEDS_EXTRA = "error: the emf commands need more than the kernels do: pip install 'emf-meanflow[train]'"
"""What a command says where tyro is not installed."""


def one_line(parser: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A parser of tyro's, with what it found wrong as one line of a ValueError instead of a framed page and an
    exit."""
    page = io.StringIO()
    try:
        with redirect_stderr(page):
            return parser(*args, **kwargs)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        lines = (line.strip("│ ") for line in page.getvalue().splitlines() if not line.startswith(("╭", "╰")))
        found = "; ".join(re.sub(r"[─ ]+", " ", " ".join(lines)).split("For full helptext")).strip()
        raise ValueError(re.sub(r" ?; ?,? (run|see):? ", "; see ", found)) from None


def to_arguments(tree: dict[str, Any], prefix: str = "--") -> list[str]:
    """A config file's contents as command-line arguments."""
    arguments: list[str] = []
    for key, value in tree.items():
        name = prefix + key.replace("_", "-")
        if isinstance(value, dict):
            arguments += to_arguments(value, name + ".")
        else:
            arguments += [name, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return arguments
