"""A user's files of text, JSON, JSON lines and CSV, whatever program wrote them.

One rule for all: text is UTF-8, or what its byte-order mark says (UTF-8, UTF-16, UTF-32), and the mark is no part of
the text; a line ends with LF, CR LF or CR, and with nothing else; the last line needs no end. Errors are ValueErrors of
one line, which name the file, and its line where there is one. A file that is missing, one that may not be read and one
that holds something else have different messages.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks and what they stand for; UTF-32's first, for it begins with UTF-16's."""


def why(error: BaseException) -> str:
    """What an error says, in one line that is never empty: of the system's errors its reason alone."""
    text = str((isinstance(error, OSError) and error.strerror) or error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def read_bytes(path: Path) -> bytes:
    """Raises ValueError where there is no such file, where it is a folder, and where it may not be read."""
    with _said(path):
        return path.read_bytes()


def whole_path(path: Path | str) -> Path:
    """The path from the root with every link followed, by which a place is written down and known again: however it was
    spelled and wherever a command is called from, it has this one name. Of a run's own settings see
    emf.train.paths.whole, which keeps links."""
    return Path(path).expanduser().resolve()


def place_or_name(text: str) -> str:
    """The same of what may be a folder or a name on the Hub, which stays as it is."""
    return str(whole_path(text)) if Path(text).exists() else text


def check_readable(path: Path) -> None:
    """Raises ValueError where there is no such file, and where it, or a file in it if it is a folder, may not be read;
    folders in it and hidden files are not looked at.

    For what libraries open themselves: several of them say of a file that may not be read that it is not there, or
    that it is broken.
    """
    with _said(path):
        inside = sorted(path.iterdir()) if path.is_dir() else None
    files = [path] if inside is None else [f for f in inside if f.is_file() and not f.name.startswith(".")]
    for file in files:
        with _said(file):
            file.open("rb").close()


def files_in(folder: Path, *patterns: str) -> list[Path]:
    """What lies in a folder under names of one of these patterns, in order; nothing where there is no such folder.
    Raises ValueError where it may not be read, of which pathlib's glob says that nothing is in it."""
    if not folder.is_dir():
        return []
    with _said(folder):
        names = os.listdir(folder)
    return sorted(folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """What the system says of a file that cannot be opened, in the words of this module."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; expected a file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {why(error)}") from None


def decode_text(data: bytes, name: str) -> str:
    """The text of a file's bytes by the rule above, its lines ended by LF alone. name: of the file, for the error.
    Raises ValueError where they are no such text; a zero letter is none, as it tells of UTF-16 without its mark."""
    encoding = next((e for mark, e in MARKS if data.startswith(mark)), "utf-8")  # UTF-8's mark is taken off below
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        where = f"{name}:{_line(before, len(before))}"
        raise ValueError(
            f"{where} is not {encoding.upper()} (byte {data[error.start]:#04x}); save it as UTF-8"
        ) from None
    if "\0" in text:
        where = f"{name}:{_line(text, text.index(chr(0)))}"
        raise ValueError(f"{where} holds a zero byte, so it is no text in UTF-8; save it as UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # files that were put together bring their marks along
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")


def _line(text: str, place: int) -> int:
    before = text[:place].replace("\r\n", "\n").replace("\r", "\n")
    return before.count("\n") + 1


def check_text(text: str, name: str) -> str:
    """The text. Raises ValueError where it holds half of a surrogate pair, as JSON that was cut within an escape does,
    and a command line of bytes that are not UTF-8: no tokenizer takes that, and no file can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"half of a letter ({text[error.start]!r}, a lone surrogate)"
        if 0x80 <= (byte := ord(text[error.start]) - 0xDC00) <= 0xFF:
            what += f", or the byte {byte:#04x}, which is not UTF-8"
        raise ValueError(f"{name} holds {what}") from None
    return text


def parse_json(text: str, name: str) -> Any:
    """What a JSON text holds, in whose texts there may be half of a letter (check_text). Raises ValueError where it is
    no JSON."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise ValueError(f"{name} is empty; expected JSON") from None
        if error.pos >= len(text.rstrip()):
            raise ValueError(f"{name} is JSON that ends too early; it was torn") from None
        lines = text.count("\n") > 0
        raise ValueError(f"{name}{f':{error.lineno}' * lines} is not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{name} is JSON nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{name} is not JSON: {why(error)}") from None
    return tree


def _whole_letters(tree: Any, text: str, name: str) -> Any:
    """The tree. Raises ValueError where a text in it holds half of a letter, as check_text does."""
    if "\\ud" in text.lower():
        check_text(json.dumps(tree, ensure_ascii=False), name)
    return tree


def read_text(path: Path) -> str:
    """A file's text; see this module's rule. Raises ValueError."""
    return decode_text(read_bytes(path), str(path))


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, line without space around it) of a text file's lines that are not blank. Raises ValueError."""
    lines = ((number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def read_lines(path: Path) -> list[str]:
    """A text file's lines that are not blank, without space around them: prompts. Raises ValueError."""
    return [line for _, line in numbered_lines(path)]


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError, also where a text in it holds half of a letter."""
    text = read_text(path)
    return _whole_letters(parse_json(text, str(path)), text, str(path))


def read_object(path: Path, who: str, expected: str = "") -> Row:
    """The object that a JSON file holds: settings, an index of shards. who: who asks, which stands before what is
    wrong; expected: what should be there, which stands after it. Raises ValueError where there is no such file, and
    where it holds no object."""
    try:
        tree = read_json(path)
        if not isinstance(tree, dict):
            raise ValueError(f"{path} is no JSON object")
    except ValueError as error:
        raise ValueError(f"{who}: {error}{'; expected ' * bool(expected)}{expected}") from None
    return tree


def numbered_jsonl(path: Path) -> list[tuple[int, Row]]:
    """(number of its line from 1, object) of a file of JSON objects, a line each; blank lines do not count. Raises
    ValueError on a line that is none."""
    rows = []
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        row = _whole_letters(parse_json(line, where), line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is no JSON object; expected one a line")
        rows.append((number, row))
    return rows


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a user's file of JSON lines. Its last line counts without a newline too, unlike in a log of our
    own (emf.files.read_rows). Raises ValueError on a line that is none."""
    return [row for _, row in numbered_jsonl(path)]


def read_csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(number of the line it ends at, cells by the header's names) of a CSV file's rows; a cell that is missing at a
    row's end is empty. Raises ValueError on a row of more cells than the header."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
    rows = []
    try:
        for row in reader:
            if None in row:
                raise ValueError(f'{path}:{reader.line_num} has more cells than the first line; put " around a comma')
            rows.append((reader.line_num, dict(row)))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is no line of CSV: {why(error)}") from None
    return rows
