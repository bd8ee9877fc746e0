"""Command-line arguments: one way to write lists and switches in every command, tyro's errors as one line, and a config
file's contents as arguments, so that one parser checks names and types for both."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

NEEDS_EXTRA = "error: the emf commands need more than the kernels do: pip install 'emf-meanflow[train]'"
"""What a command says where tyro is not installed."""
ON_OFF = {"true": True, "false": False}


def one_line(parser: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A parser of tyro's, with what it found wrong as one line of a ValueError instead of a framed page and an
    exit."""
    page = io.StringIO()
    try:
        with redirect_stderr(page):
            return parser(*args, **kwargs)
    except SystemExit as end:
        if end.code != 2:  # --help; or SIGTERM, which may come at any time
            raise
        # the frame is of + - | where stdout's encoding has no better letters
        lines = (line.strip("│| ") for line in page.getvalue().splitlines() if not line.startswith(("╭", "╰", "+-")))
        found = "; ".join(re.sub(r"(─| |-{9,})+", " ", " ".join(lines)).split("For full helptext")).strip()
        # what a dataclass refuses says for itself where it is
        found = re.sub(r"^Value error (Error parsing \S+: (?=[a-z]+: ))?", "", found)
        raise ValueError(re.sub(r" ?; ?,? (run|see):? ", "; see ", found)) from None


def parse(what: Any, arguments: Iterable[str], prog: str, **how: Any) -> Any:
    """A dataclass made, or a function called, from arguments in any of the spellings that `spelled` knows. how: further
    arguments of tyro.cli. Raises ValueError, in one line, on what does not fit."""
    import tyro  # not needed by who takes a recipe from Python

    return one_line(tyro.cli, what, args=spelled(arguments, options_of(what)), prog=prog, **how)


Reads = Callable[[str], bool]
"""Whether a word can be an item of a list."""


def options_of(what: Any, prefix: str = "--") -> dict[str, bool | Reads | type[Path]]:
    """The options of a function or a dataclass that are switches, lists or paths, by name: of a switch what it sets,
    also under its name with no-; of a list of numbers or choices which words can be in it. A list of texts is none of
    them: a comma may be part of a text."""
    found: dict[str, bool | Reads | type[Path]] = {}
    for name, hint in get_type_hints(what, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        kind = get_args(hint)[0] if notes else hint
        plain = name.replace("_", "-")
        if kind is bool:
            found |= {f"{prefix}{plain}": True, f"{prefix}no-{plain}": False}
        elif Path in (kind, *get_args(kind)):
            found[f"{prefix}{plain}"] = Path
        elif is_dataclass(kind):
            flat = any(getattr(note, "name", None) == "" for note in notes)
            found |= options_of(kind, prefix if flat else f"{prefix}{plain}.")
        elif get_origin(kind) is tuple and (reads := _reader(get_args(kind)[0])):
            found[f"{prefix}{plain}"] = reads
    return found


def _reader(item: Any) -> Reads | None:
    if get_origin(item) is Literal:
        return get_args(item).__contains__
    if item not in (int, float):
        return None

    def reads(word: str) -> bool:
        try:
            item(word)
        except ValueError:
            return False
        return True

    return reads


def spelled(arguments: Iterable[str], options: Mapping[str, bool | Reads | type[Path]]) -> list[str]:
    """The same arguments in the one spelling that the parser knows.

    A switch is --flag, --flag True or --flag=true; off it is --no-flag or --flag False. A list of numbers or choices is
    --steps 1 2 4 or --steps 1,2,4; it is put behind everything else, so that it does not swallow what follows it.
    Raises ValueError on another value of a switch, and on an empty path, as "$OUT" is where OUT is not set: it would be
    the folder where one is.
    """
    told: list[str] = []
    lists: list[str] = []
    rest = list(arguments)
    while rest and rest[0] != "--":
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        option = options.get(name := name.replace("_", "-"))
        if isinstance(option, bool):
            if not equals and option and rest and rest[0].lower() in ON_OFF:
                value = rest.pop(0)
            if equals and value.lower() not in ON_OFF:
                raise ValueError(f"{name} is a switch, {value!r} neither on nor off; say {name}, or {name} False")
            section, dot, last = name.removeprefix("--").rpartition(".")
            off = value.lower() == "false"
            told.append(f"--{section}{dot}no-{last}" if off and option else name)
        elif isinstance(option, type):
            if equals and not value or not equals and rest and not rest[0]:
                raise ValueError(f"{name} is empty; give a path")
            told.append(word)
        elif option is not None:
            words = _items(value, option) if equals else []
            while rest and (more := _items(rest[0], option)):
                words += more
                rest.pop(0)
            lists += [name, *words] if words else []
            told += [] if words else [word]  # the parser says what is wrong with it
        else:
            told.append(word)
    return [*told, *lists, *rest]


def _items(word: str, reads: Reads) -> list[str]:
    """The items in a word of a list, which commas may hold together; none where one of them cannot be in the list."""
    parts = [part.strip() for part in word.removesuffix(",").split(",")]
    return parts if all(map(reads, parts)) else []


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
