"""Whatever bytes a user's file holds, its reader gives a value or raises a ValueError of one line that names it."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from damaged import damaged, holds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emf.files import (
    BrokenImage,
    decode_text,
    files_in,
    filled,
    image_size,
    open_image,
    parse_json,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    read_object,
    read_text,
)

READERS: tuple[Callable[[Path], Any], ...] = (read_text, read_lines, read_json, read_jsonl, read_csv, open_image)


def encoded(format: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


TEXTS = [
    codecs.BOM_UTF8 + b'{"prompt": "a dog"}\r\n{"prompt": "a cat \\ud83d\\ude00"}',
    codecs.BOM_UTF16_LE + 'item_id,text\n1,"a, b"\n'.encode("utf-16-le"),
    b'{"a": [1, 2, {"b": null}]}',
    "überall\n".encode("latin-1"),
    b"[" * 3000,
    b'{"n": ' + b"9" * 5000 + b"}",
]
IMAGES = [encoded("PNG"), encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), encoded("WEBP")]


@given(data=st.one_of(st.binary(max_size=200), damaged(TEXTS), damaged(IMAGES)))
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_any_bytes_give_a_value_or_one_line(
    read: Callable[[Path], Any], data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.bin"
    file.write_bytes(data)
    holds(lambda: read(file), "any.bin")


@given(damaged(IMAGES))
def test_a_size_that_a_header_tells_is_that_of_the_picture(data: bytes) -> None:
    """What has no size cannot be opened; what can be opened has the size that was told."""
    try:
        size = image_size(data)
    except BrokenImage:
        with pytest.raises(BrokenImage):
            open_image(data)
        return
    with suppress(BrokenImage):
        assert open_image(data).size == size


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=40))
def test_every_encoding_gives_the_same_text(text: str) -> None:
    expected = text.removeprefix("\ufeff").replace("\n\ufeff", "\n")
    if not text.startswith("\ufeff"):
        assert decode_text(text.encode(), "x") == expected
    for data in (text.encode("utf-8-sig"), text.encode("utf-16"), text.encode("utf-32")):
        assert decode_text(data, "x") == expected
    assert decode_text(text.replace("\n", "\r\n").encode("utf-8-sig"), "x") == expected


def test_lines_end_with_line_ends_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\u2028b\r\n\r\n  c\x0cd \re\n\ufefff".encode())
    assert read_lines(file) == ["a\u2028b", "c\x0cd", "e", "f"]


def test_jsonl_needs_no_last_line_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}')
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{}\n{", r"a.jsonl:2 is JSON that ends too early"),
        (b"{}\n\n[1]", r"a.jsonl:3 is no JSON object"),
        (b"{}\n{'a': 1}", r"a.jsonl:2 is not JSON: Expecting property name"),
        (b'{"a": "\\ud83d"}', r"a.jsonl:1 holds half of a letter"),
        (b"{}\n\xe9", r"a.jsonl:2 is not UTF-8 \(byte 0xe9\); save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), r"a.jsonl:1 holds a zero byte"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_jsonl(tmp_path / "a.jsonl")


def test_json_errors_say_which(tmp_path: Path) -> None:
    for text, says in (("", "x is empty"), ('{"a":\n 1', "ends too early"), ('{\n"a" 1}', "x:2 is not JSON")):
        with pytest.raises(ValueError, match=says):
            parse_json(text, "x")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000, "x")
    with pytest.raises(ValueError, match=r"no\.json does not exist"):
        read_json(tmp_path / "no.json")
    with pytest.raises(ValueError, match="is a folder; expected a file"):
        read_json(tmp_path)


def test_objects(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": [1]}', encoding="utf-16")
    assert read_object(file, "who") == {"a": [1]}
    file.write_text("[1]")
    with pytest.raises(ValueError, match=f"^who: {file} is no JSON object$"):
        read_object(file, "who")
    with pytest.raises(ValueError, match=f"^who: {file} is no JSON object; expected settings$"):
        read_object(file, "who", "settings")
    file.write_text('{"a"')
    with pytest.raises(ValueError, match=f"^who: {file} is JSON that ends too early; .*; expected settings$"):
        read_object(file, "who", "settings")


def test_what_may_not_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in READERS:
        with pytest.raises(ValueError, match=r"a cannot be read: Permission denied$"):
            read(tmp_path / "a")


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(codecs.BOM_UTF8 + b'id,text\r\n1,"a\r\nb, c"\r\n2')
    assert read_csv(file) == [(3, {"id": "1", "text": "a\nb, c"}), (4, {"id": "2", "text": ""})]
    file.write_text("id,text\n1,a,b\n")
    with pytest.raises(ValueError, match=r"a\.csv:2 has more cells than the first line"):
        read_csv(file)
    file.write_text("id\n" + "x" * 140_000)
    with pytest.raises(ValueError, match=r"a\.csv:1 is no line of CSV: field larger than field limit"):
        read_csv(file)


def test_json_round_trip_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"é": "😀"}), encoding="utf-16")
    assert read_json(tmp_path / "a.json") == {"é": "😀"}


def test_a_folder_that_may_not_be_read_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.png", "a.png", "c.txt", "A.PNG"):
        (tmp_path / name).touch()
    assert [file.name for file in files_in(tmp_path, "*.png", "c*")] == ["a.png", "b.png", "c.txt"]
    assert files_in(tmp_path / "none", "*") == files_in(tmp_path / "c.txt", "*") == []

    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be read: Permission denied$"):
        files_in(tmp_path, "*")


@dataclass(frozen=True)
class Kinds:
    a: int
    b: float | None = None
    c: Literal["x", "y"] = "x"
    d: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("a is below 0")


def test_a_dataclass_from_json() -> None:
    assert filled(Kinds, {"a": 1, "b": 2, "d": {"k": [3]}}, "file") == Kinds(1, 2, "x", {"k": [3]})
    assert filled(Kinds, {"a": 1, "b": None, "c": "y"}, "file").b is None
    wrong = {
        "is no JSON object": [1],
        "lacks a": {"b": 1.0},
        "'e' is not known; expected a, b, c, d": {"a": 1, "e": 1},
        "a True; expected a whole number": {"a": True},
        "b nan; expected a finite number or null": {"a": 1, "b": float("nan")},
        "c 'z'; expected one of x, y": {"a": 1, "c": "z"},
        "d .*; expected an object, each a list, each a whole number": {"a": 1, "d": {"k": ["3"]}},
        "a is below 0": {"a": -1},
    }
    for says, tree in wrong.items():
        with pytest.raises(ValueError, match=f"^file:? {says}$"):
            filled(Kinds, tree, "file")
