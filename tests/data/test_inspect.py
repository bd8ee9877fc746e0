"""`emf data inspect`: what it tells of the data, and the sheet that it draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, noise, tar_and_folder, write_folder
from PIL import Image

from emf.data import inspect as inspecting
from emf.data.images import Images
from emf.data.inspect import inspect
from emf.data.sources import Source
from emf.show.sheet import GAP


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return tar_and_folder(tmp_path_factory.mktemp("data"))


def test_inspect_tells_and_draws(two_sources: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    figures = inspect(two_sources, 35, out)
    assert json.loads((out / "inspect.json").read_text()) == figures
    tar, folder = figures["sources"]
    assert (tar["samples"], tar["read"], tar["usable"], tar["upscaled"]) == (9, 9, 7, 7)
    assert (folder["samples"], folder["usable"], folder["weight"]) == (7, 6, 1.0)
    assert {(d["reason"], d["count"]) for d in figures["drops"]} == {
        ("corrupt image", 1),
        ("empty image file", 1),
        ("empty caption", 1),
    }
    spread = figures["quantiles"]
    assert spread["width"]["50"] == 40 and spread["height"]["100"] == 32 and spread["width / height"]["0"] == 1.25
    assert spread["caption, words"]["50"] == 2
    text = " ".join(capsys.readouterr().out.split())
    for word in ("a.tar", "corrupt image", "0003", "0026", "caption, words", "1.25"):
        assert word in text, word
    sheet = np.asarray(Image.open(out / "contact.png").convert("RGB")).astype(int)
    cell = inspecting.CELL
    picture = sheet[GAP : GAP + cell, GAP : GAP + cell]
    images = Images(two_sources, cell)
    assert np.abs(picture - ((images.get(0, 0).image.permute(1, 2, 0).numpy() + 1) * 127.5)).max() <= 1
    assert (sheet[GAP + cell : GAP + cell + 17, GAP : GAP + cell] < 128).any()  # its caption


def test_an_interrupted_inspection_leaves_nothing(
    two_sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the same command can be called again."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(inspecting, "write_sheet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inspect(two_sources, 35, tmp_path, 2)
    assert list(tmp_path.iterdir()) == []
    inspect(two_sources, 35, tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["contact.png", "inspect.json"]


def test_inspect_writes_over_nothing(two_sources: list[Source], tmp_path: Path) -> None:
    for name in ("inspect.json", "contact.png"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match="exists"):
            inspect(two_sources, 16, out)
        assert [f.read_text() for f in out.iterdir()] == ["mine"]


def test_inspect_reads_as_many_as_asked(two_sources: list[Source], tmp_path: Path) -> None:
    figures = inspect(two_sources, 16, tmp_path / "a", limit=3)
    assert [s["read"] for s in figures["sources"]] == [3, 3] and [s["samples"] for s in figures["sources"]] == [9, 7]
    assert inspect(two_sources, 16, tmp_path / "b", limit=3) == figures
    for wrong in (dict(limit=0), dict(size=0)):
        with pytest.raises(ValueError, match="at least 1"):
            inspect(two_sources, **(dict(size=16, out=tmp_path / "c") | wrong))
    assert not (tmp_path / "c").exists()


def test_inspect_survives_long_names_captions_and_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"[red]x.png": encoded(noise(0)), "[red]x.txt": "wörter 猫 ".encode() * 300}
    folder = write_folder(tmp_path / "[bold]", members | {"[/b]y.png": b"", "[/b]y.txt": b"a"})
    figures = inspect([Source(str(folder))], 16, tmp_path / "out")
    assert figures["quantiles"]["caption, words"]["100"] == 600
    assert "[/b]y" in capsys.readouterr().out and (tmp_path / "out" / "contact.png").exists()


def test_inspect_of_nothing_usable_still_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "a", {"x.png": b"", "x.txt": b"a"})
    figures = inspect([Source(str(folder))], 16, tmp_path / "out")
    assert figures["sources"][0]["usable"] == 0 and "empty image file" in " ".join(capsys.readouterr().out.split())
