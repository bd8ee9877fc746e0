"""Logs of our own: JSON objects, a line each, that only ever grow. A kill may tear the last line; no other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from emf.files.fields import misfit
from emf.files.reading import Row, parse_json, read_bytes, why
from emf.files.writing import whole_file

Needs = Iterable[str] | Mapping[str, Any]
"""Keys that every row of a log has; of a mapping with the type of each, whose key may be missing where it is | None."""


def read_rows(path: Path, needs: Needs = ()) -> list[Row]:
    """The rows of a log; none where there is no file. A last line without its newline was torn by a kill, or is being
    written, and is left out. Raises ValueError, naming file and line, on another line that is no JSON object with what
    it needs."""
    if not path.exists():
        return []
    rows, kinds = [], dict(needs) if isinstance(needs, Mapping) else dict.fromkeys(needs, Any)
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1):
        try:
            row = parse_json(line.decode(), "")
        except ValueError:
            row = None
        if said := misfit(row, kinds):
            raise ValueError(f"{path}:{number} {said}; repair or remove the line")
        rows.append(row)
    return rows


def mend_rows(path: Path, needs: Needs = ()) -> list[Row]:
    """As read_rows; and a torn last line is cut off, so that what is appended next does not continue it."""
    rows = read_rows(path, needs)
    if path.exists():
        try:
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {why(error)}") from None
    return rows


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a log, and make sure that they are in the file. Raises ValueError where they cannot be written."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {why(error)}") from None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], writer: int | None = None) -> None:
    """A log of these rows in place of what there is; see emf.files.whole_file."""
    with whole_file(path, writer) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
