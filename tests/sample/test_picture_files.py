"""Pictures as files: names that say the prompt, a manifest, and nothing overwritten."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from emf.sample.picture_files import MANIFEST, check_pictures_folder, words_of, write_images


def images(n: int) -> Tensor:
    """n grey pictures [n, 3, 2, 2], each another grey."""
    return torch.linspace(-1, 1, n)[:, None, None, None].expand(n, 3, 2, 2)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red seven", "a_red_seven"),
        ("  A cat, “quoted” / ../../etc & more?\n", "A_cat_quoted_etc_more"),
        ("-rf *", "rf"),
        ("…", ""),
        ("", ""),
        ("两只猫 и кошка", "两只猫_и_кошка"),
        ("e\u0301te\u0301", "été"),  # put together
        ("हिन्दी", "हिन्दी"),  # marks belong to their letters
        ("a\u202eb\x00c\x7f\u200bd", "a_b_c_d"),  # what turns, hides or ends a line of text
        ("😀 cat", "cat"),
        ("half \ud800 a letter", "half_a_letter"),
        ("x" * 300, "x" * 80),
        ("猫" * 300, "猫" * 26),  # of three bytes each
        ("ab " * 99, "ab_" * 26 + "ab"),
    ],
)
def test_a_prompt_in_a_files_name(prompt: str, name: str) -> None:
    assert words_of(prompt) == name
    assert len(words_of(prompt).encode()) <= 80


def test_pictures_say_their_prompt_and_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "new"
    told = {"steps": 2, "guidance": 1.5, "seed": 7}
    check_pictures_folder(out)
    assert not out.exists()
    first = write_images(images(2), ["<b>[x]", "…"], out, told, range(4, 6))
    (out / "00009_mine.png").write_text("mine")
    check_pictures_folder(out)
    more = write_images(images(1), ["<b>[x]"], out, told, [0])
    assert [p.name for p in (*first, *more)] == ["00000_b_x.png", "00001.png", "00010_b_x.png"]
    assert (out / "00009_mine.png").read_text() == "mine"
    assert rows(out) == [
        {"file": path.name, "prompt": prompt, "number": number, **told}
        for path, prompt, number in zip((*first, *more), ("<b>[x]", "…", "<b>[x]"), (4, 5, 0), strict=True)
    ]
    with Image.open(first[0]) as picture:
        info = {"prompt": "<b>[x]", "number": "4", "steps": "2", "guidance": "1.5", "seed": "7"}
        assert picture.size == (16, 16) and picture.info == info
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(r["file"] for r in rows(out)), "00009_mine.png", MANIFEST]
    )


def test_a_line_that_was_torn_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(images(1), ["a"], tmp_path, {}, [0])
    with (tmp_path / MANIFEST).open("a") as file:
        file.write('{"file": "00001_b.p')
    check_pictures_folder(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "manifest.jsonl: its last line was torn" in said and "00001_b.p" in said
    check_pictures_folder(tmp_path)
    assert not capsys.readouterr().err
    write_images(images(1), ["b"], tmp_path, {}, [1])
    assert [row["prompt"] for row in rows(tmp_path)] == ["a", "b"]


def test_two_that_write_in_one_folder_take_other_numbers(tmp_path: Path) -> None:
    def write() -> None:
        for i in range(5):
            write_images(images(1), ["a cat"], tmp_path, {}, [i])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{i:05d}_a_cat.png" for i in range(20)]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == names
    assert sorted(row["file"] for row in rows(tmp_path)) == names


def test_where_pictures_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=r"^generate: .*file.* no folder"):
            check_pictures_folder(out)
    own = tmp_path / "own"
    own.mkdir()
    (own / MANIFEST).write_text('{"my": "manifest"}\n')
    with pytest.raises(ValueError, match=r"manifest.jsonl:1 is no JSON object with file, prompt"):
        check_pictures_folder(own)
    assert (own / MANIFEST).read_text() == '{"my": "manifest"}\n'
    (own / MANIFEST).write_text("precious")
    with pytest.raises(ValueError, match=r"^generate: .*manifest.jsonl lists no pictures of ours; give another --out$"):
        check_pictures_folder(own)
    assert (own / MANIFEST).read_text() == "precious"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match="new cannot be written: .* may not be written to"):
        check_pictures_folder(tmp_path / "new")


def test_a_picture_is_enlarged_by_its_longer_side(tmp_path: Path) -> None:
    written = [write_images(torch.zeros(1, 3, h, w), ["a"], tmp_path, {}, [0])[0] for w, h in ((72, 18), (18, 72))]
    written += write_images(torch.zeros(1, 3, 18, 60), ["a"], tmp_path, {}, [0])
    assert [Image.open(path).size for path in written] == [(72, 18), (18, 72), (480, 144)]


def test_without_locks_it_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert write_images(images(1), ["a"], tmp_path, {}, [0])[0].is_file()
