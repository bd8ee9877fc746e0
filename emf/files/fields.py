"""A dataclass from what a JSON file holds, its names and kinds of values checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from emf.files.reading import read_object
from emf.limits import Within

T = TypeVar("T")
WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", NoneType: "null"}


def filled(kind: type[T], tree: Any, where: str) -> T:
    """The dataclass `kind` with the values of a JSON object. where: the file, for errors. Raises ValueError on a name
    that it does not know, one that is missing, a value of another kind, and on what the dataclass itself refuses."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where} is no JSON object")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(tree.keys() - known.keys()):
        raise ValueError(f"{where}: {unknown[0]!r} is not known; expected {', '.join(known)}")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in tree]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    hints = get_type_hints(kind)
    for name, value in tree.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{where}: {name} {repr(value)[:40]}; expected {in_words(hints[name])}")
    try:
        return kind(**tree)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_fields(kind: type[T], path: Path, who: str) -> T:
    """The dataclass `kind` that a JSON file holds; see filled and emf.files.read_object. Raises ValueError."""
    return filled(kind, read_object(path, who), f"{who}: {path}")


def misfit(tree: Any, kinds: Mapping[str, Any]) -> str | None:
    """What is wrong with a JSON object that needs these keys, with the kind of each one's value: words to follow its
    name; None where nothing is. A key whose kind is `| None` may be missing; others that are there do not matter."""
    needed = [key for key, kind in kinds.items() if kind is Any or not fits(None, kind)]
    if not isinstance(tree, dict) or not all(key in tree for key in needed):
        return f"is no JSON object with {', '.join(needed)}" if needed else "is no JSON object"
    if odd := [key for key, kind in kinds.items() if key in tree and not fits(tree[key], kind)]:
        return f"has {odd[0]} {repr(tree[odd[0]])[:40]}; expected {in_words(kinds[odd[0]])}"
    return None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that JSON can hold is of the kind of a field, and in its range, as its type says it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = (note for note in parts[1:] if isinstance(note, Within))
        return fits(value, parts[0]) and not any(limit.fault(value) for limit in limits)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (list, dict):
        inner = value.values() if origin is dict and isinstance(value, dict) else value
        return isinstance(value, origin) and all(fits(item, parts[-1]) for item in inner)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # a larger whole number is no float
    if hint is int:
        return type(value) is int and abs(value) < 2**63  # what arrays and tensors hold
    return hint is Any or type(value) is hint


def in_words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        said = " and ".join(note.words for note in parts[1:] if isinstance(note, Within))
        return in_words(parts[0]) + (f" ({said})" if said else "")
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, parts))
    if origin in (list, dict):
        each = "" if parts[-1] is Any else f", each {in_words(parts[-1])}"
        return ("a list" if origin is list else "an object") + each
    return WORDS.get(hint, "another kind of value")
