"""What is written is there whole or not at all, readable by whom the umask lets; a folder belongs to one maker."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from full_disk import full
from safetensors.torch import save_file

from emf.device import device
from emf.files import (
    append_rows,
    check_folder,
    claim,
    copy_file,
    copy_folder,
    mend_rows,
    read_json,
    read_rows,
    whole_file,
    whole_folder,
    write_json,
    write_settings,
    write_text,
)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_mode_is_the_umasks(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a.safetensors") as part:
            save_file({"x": torch.zeros(1)}, part)
        write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert [f.stat().st_mode & 0o777 for f in sorted(tmp_path.iterdir())] == [mode, mode]


def test_what_a_kill_left_lends_its_mode_to_nothing(tmp_path: Path) -> None:
    """Nor its place: it may be a link."""
    (tmp_path / "a.part").touch(mode=0o600)
    (tmp_path / "b.part").symlink_to(tmp_path / "mine")
    before = os.umask(0o022)
    try:
        for name in "ab":
            write_text(tmp_path / name, "x")
    finally:
        os.umask(before)
    assert [(f.name, f.stat().st_mode & 0o777) for f in sorted(tmp_path.iterdir())] == [("a", 0o644), ("b", 0o644)]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_text(file, "old")
    with pytest.raises(RuntimeError, match="mine"), whole_file(file) as part:
        part.write_text("new")
        raise RuntimeError("mine")
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and file.read_text() == "old"


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a", 0) as one, whole_file(tmp_path / "a", 1) as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"b cannot be written: File too large"), full():
        write_text(tmp_path / "a" / "b", "x")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["c"]
    with pytest.raises(ValueError, match=r"c cannot be written: No space left on device"):
        append_rows(tmp_path / "a" / "c", [{"x": 1}])


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (lambda p: write_text(p, "x"), lambda p: claim(p, {}, ())):
        with pytest.raises(ValueError, match="file is no folder$|file/a cannot be made a folder: Not a directory"):
            write(tmp_path / "file" / "a")
    unwritable = pytest.raises(ValueError, match="^who: .*file/a cannot be written: .*/file is no folder$")
    with unwritable, whole_folder(tmp_path / "file" / "a", "who: "):
        pass


def test_errors_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        (tmp_path / "b").read_text()


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as part:
        (part / "a").touch()
        raise RuntimeError
    assert not [*tmp_path.iterdir()]
    with whole_folder(tmp_path / "deep" / "out") as part:
        (part / "a").touch()
    assert [p.name for p in (tmp_path / "deep" / "out").iterdir()] == ["a"]
    with pytest.raises(ValueError, match="race exists"), whole_folder(tmp_path / "race") as part:
        (tmp_path / "race").mkdir()


def test_json_knows_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {1: (float("nan"), 1.5), "b": {"c": float("inf")}})
    assert read_json(tmp_path / "a.json") == {"1": [None, 1.5], "b": {"c": None}}


def test_rows_forgive_a_torn_last_line_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_rows(log) == mend_rows(log) == []
    append_rows(log, [{"step": 1}, {"step": 2}])
    with log.open("a") as file:
        file.write('{"step": 3}')  # a kill may fall between the object and its newline
    assert read_rows(log) == [{"step": 1}, {"step": 2}]
    assert mend_rows(log) == [{"step": 1}, {"step": 2}]
    append_rows(log, [{"step": 3}])
    assert read_rows(log, ["step"]) == [{"step": n} for n in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"log.jsonl:1 is no JSON object with loss"):
        read_rows(log, ["loss"])
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log.jsonl:2 is no JSON object; repair or remove"):
        read_rows(log)


def test_a_claimed_folder_is_gone_on_with_by_the_same_settings(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert not claim(out, {"size": 16, "weights": (1.0, 2.0)}, None)
    assert claim(out, {"size": 16, "weights": (1.0, 2.0)}, None)
    with pytest.raises(ValueError, match=r"^who: .*other settings \(size\); give another.*size was 16, is 32"):
        claim(out, {"size": 32, "weights": (1.0, 2.0)}, None, who="who: ")
    (out / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is JSON that ends too early"):
        claim(out, {"size": 16}, None)


def test_what_others_made_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "shard.part").touch()
    check_folder(tmp_path, None)
    (tmp_path / "results.json").touch()
    check_folder(tmp_path, ["scored.jsonl"])
    for own in (None, ["results.json"]):
        with pytest.raises(ValueError, match=r"results.json exists without settings.json.*; give another folder"):
            check_folder(tmp_path, own)
    with pytest.raises(ValueError, match="is no folder"):
        claim(tmp_path / "results.json", {}, ())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["results.json", "shard.part"]


def test_a_claim_may_grow(tmp_path: Path) -> None:
    claim(tmp_path, {"k": 1, "runs": {"a": "x"}}, (), growing="runs")
    assert json.loads((tmp_path / "settings.json").read_text()) == {"k": 1, "runs": {}}
    write_settings(tmp_path, {"k": 1, "runs": {"a": "x"}})
    assert claim(tmp_path, {"k": 1, "runs": {"b": "y", "a": "x"}}, (), growing="runs")
    for runs in ({"b": "y"}, {"a": "z"}):
        with pytest.raises(ValueError, match=r"holds results of a \(x\); name it too"):
            claim(tmp_path, {"k": 1, "runs": runs}, (), growing="runs")


def test_a_device_is_there_or_one_line() -> None:
    assert device("cpu") == torch.device("cpu") and device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "meta", "xpu", "cpu:7", "🙂"):
        with pytest.raises(ValueError, match="^device: .*expected auto or one of cpu") as error:
            device(name)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("whole", [True, False], ids=["by the file system", "byte by byte"])
def test_a_copy_shares_nothing(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a link's target, as a download cache has them, and of a file that only its owner may read."""
    blob, link, data = tmp_path / "blob", tmp_path / "link", bytes(range(256)) * 999
    blob.write_bytes(data)
    blob.chmod(0o400)
    link.symlink_to(blob)
    if not whole:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    copy_file(link, tmp_path / "copy")
    with (tmp_path / "copy").open("ab") as file:
        file.write(b"more")
    assert blob.read_bytes() == data and (tmp_path / "copy").read_bytes() == data + b"more"
    old = os.umask(0)
    os.umask(old)
    assert not (tmp_path / "copy").is_symlink() and (tmp_path / "copy").stat().st_mode & 0o777 == 0o666 & ~old


def test_a_copied_folder_is_ones_own(tmp_path: Path) -> None:
    """Its folders too have the umask's mode, whatever those of the source have."""
    source = tmp_path / "base"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_text("a")
    (source / "b").symlink_to(source / "deep" / "a")
    (source / "deep").chmod(0o555)
    copy_folder(source, tmp_path / "copy")
    (tmp_path / "copy" / "deep" / "a").write_text("mine")
    (tmp_path / "copy" / "b").write_text("mine")
    (tmp_path / "copy" / "deep" / "new").touch()
    assert (source / "b").read_text() == "a" and (tmp_path / "copy" / "deep").stat().st_mode & 0o200
    (source / "gone").symlink_to("nowhere")
    with pytest.raises(ValueError, match="base/gone does not exist"):
        copy_folder(source, tmp_path / "again")
