"""What the app draws: the pictures of `emf generate`, with settings and times, and what a visitor is told."""

from __future__ import annotations

import json
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from digits_run import small_config, small_run
from PIL import Image

from emf import config as configs
from emf.app.studio import MOST, Asked, Column, Studio, Way, zipped
from emf.app.visit import DRAWING, KEPT, Desk, Shown, header, said
from emf.cli.main import main
from emf.recipes import openmoji
from emf.sample.sampler import Sampler

CAPTION = "a red seven"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(small_run(tmp_path_factory.mktemp("small") / "run"))


def test_worlds_of_pixels_are_told_from_those_of_an_autoencoder(studio: Studio) -> None:
    assert studio.digits and studio.pixels
    named = Studio.__new__(Studio)
    named.sampler = Sampler(openmoji(), studio.sampler.network)
    assert named.pixels and not named.digits


def pixels(files: list[Path]) -> list[bytes]:
    return [Image.open(file).tobytes() for file in files]


def draw(studio: Studio, asked: Asked, out: Path) -> list[Column]:
    out.mkdir(parents=True, exist_ok=True)
    return list(studio.draw(asked, out))


def visit(studio: Studio, folder: Path, **changes: Any) -> list[Shown]:
    asked = dict(caption=CAPTION, seed=0, n=1) | changes
    return list(Desk(studio, folder).draw(asked["caption"], [1, 2], [1], (1.25, asked["seed"], asked["n"]), []))


def test_the_columns_are_what_the_command_line_draws(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each way of sampling, by the very command that the page shows."""
    asked = Asked(CAPTION, (2, 1, 2), (3,), 1.5, 7, 2)
    assert asked.ways == [Way(1), Way(2), Way(3, True)]
    for column in draw(studio, asked, tmp_path / "app"):
        out = tmp_path / column.way.name
        words = shlex.split(studio.command(asked, column.way))
        monkeypatch.setattr(sys, "argv", [str(out) if word == "DIR" else word for word in words])
        main()
        assert pixels(column.files) == pixels(sorted(out.glob("*.png"))) and len(column.files) == 2


def test_a_seed_says_the_picture(studio: Studio, tmp_path: Path) -> None:
    def drawn(seed: int, name: str) -> list[bytes]:
        columns = draw(studio, Asked(CAPTION, (1, 2), (), None, seed), tmp_path / name)
        return [x for column in columns for x in pixels(column.files)]

    first, again, other = drawn(0, "a"), drawn(0, "b"), drawn(1, "c")
    assert first == again and not set(first) & set(other)


def test_a_file_says_how_it_was_drawn(studio: Studio, tmp_path: Path) -> None:
    asked = Asked(CAPTION, (2,), (), None, 3, 2)
    (column,) = draw(studio, asked, tmp_path)
    told = Image.open(column.files[1]).info
    want = dict(prompt=CAPTION, number="1", steps="2", guidance="1.25", seed="3", run=str(studio.run))
    assert want | {"flow_matching": "False"} == {k: told[k] for k in (*want, "flow_matching")}
    assert list(column.seconds) == ["text", "transformer"]
    assert float(told["seconds_transformer"]) == pytest.approx(column.seconds["transformer"], abs=1e-6)
    packed = zipfile.ZipFile(zipped(asked, tmp_path))
    names = [f"a_red_seven_seed_3/{file.name}" for file in column.files]
    assert packed.namelist() == [*names, "a_red_seven_seed_3/manifest.jsonl"]
    rows = [json.loads(line) for line in packed.read(packed.namelist()[-1]).splitlines()]
    assert [(r["file"], r["steps"], r["number"]) for r in rows] == [(p.name, 2, i) for i, p in enumerate(column.files)]


def test_times_are_a_share_of_what_was_computed_together(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of an earlier drawing do not count; the first of its kind says so."""
    draw(studio, Asked(CAPTION, (1,), (), n=3), tmp_path / "a")
    images = studio.sampler.images

    def slow(*args: Any, **kwargs: Any) -> Any:
        made = images(*args, **kwargs)
        studio.sampler.seconds.update(text=0.3, transformer=6.0)
        return made

    monkeypatch.setattr(studio.sampler, "images", slow)
    (column,) = draw(studio, Asked(CAPTION, (1,), (), n=3), tmp_path / "b")
    assert column.seconds == pytest.approx({"text": 0.1, "transformer": 2.0}) and not column.first
    (column,) = draw(studio, Asked(CAPTION, (1,), (), n=5), tmp_path / "c")
    assert column.first
    assert "6300 ms: text 300 ms, transformer 6000 ms" in visit(studio, tmp_path)[-1].html
    assert "3150 ms each: text 150 ms, transformer 3000 ms" in visit(studio, tmp_path, n=2)[-1].html


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (dict(caption=" "), "caption is empty"),
        (dict(n=0), f"0 pictures; expected 1 to {MOST}"),
        (dict(n=MOST + 1), f"{MOST + 1} pictures"),
        (dict(steps=()), "no number of steps"),
        (dict(steps=(0,)), "steps 0 must be"),
        (dict(seed=-1), "seed -1"),
        (dict(guidance=float("nan")), "guidance nan"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Asked(**({"caption": CAPTION} | asked))


def test_an_export_has_one_network_for_both(studio: Studio, tmp_path: Path) -> None:
    """It may fill a GPU's memory; a run's start is another network."""
    from emf.weights.export import export

    export(studio.run, tmp_path / "export")
    ours = Studio(tmp_path / "export")
    assert ours.euler().network is ours.sampler.network and not ours.euler().settings.average
    assert ours.euler().stamp == ours.sampler.stamp
    few, euler = draw(ours, Asked(CAPTION, (2,), (2,)), tmp_path / "drawn")
    assert pixels(few.files) != pixels(euler.files)
    assert "own velocity" in euler.note and not few.note


def test_a_run_of_flow_matching_alone_is_drawn_with_that(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    (run / "config.json").write_text(configs.to_json(small_config()).replace('"meanflow"', '"flow_matching"'))
    ours = Studio(run)
    assert not ours.few_step and ours.euler() is ours.sampler and "flow matching alone" in header(ours)
    assert [column.way for column in draw(ours, Asked(CAPTION, (), (1,)), tmp_path)] == [Way(1, True)]
    with pytest.raises(ValueError, match="trained for flow matching alone; choose steps of flow matching"):
        draw(ours, Asked(CAPTION, (1,)), tmp_path)


def test_a_visit_sees_each_column_as_it_comes(studio: Studio, tmp_path: Path) -> None:
    shown = visit(studio, tmp_path, n=2)
    assert [now.html.count('class="waiting"') for now in shown] == [6, 4, 2, 0, 0]
    assert [now.html.count("<img") for now in shown] == [0, 2, 4, 6, 6]
    last = shown[-1]
    assert last.pack is not None and last.pack.is_file() and last.drawings is not None
    assert said(Path(last.drawings[0][-1])) == "Flow matching, 1 step · seed 0 · a red seven"
    assert "emf generate 'a red seven'" in last.html.replace("&#x27;", "'") and "picture 2" in last.html


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (dict(caption="a red <b>cat"), "word &#x27;&lt;b&gt;cat&#x27; of caption"),
        (dict(seed=None), "seed None; expected a whole number"),
        (dict(seed=0.5), "seed 0.5"),
        (dict(n=None), "0 pictures"),
    ],
)
def test_what_is_wrong_is_shown(studio: Studio, tmp_path: Path, asked: dict[str, Any], told: str) -> None:
    last = visit(studio, tmp_path, **asked)[-1]
    assert told in last.html and 'role="alert"' in last.html and last.pack is None and last.drawings is None


def test_a_full_memory_is_said_and_another_fault_is_not_hidden(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_with(error: Exception) -> list[Shown]:
        def failing(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(studio.sampler, "images", failing)
        return visit(studio, tmp_path)

    for error in (MemoryError(), RuntimeError("can't allocate memory: x")):
        assert "The memory is full" in failing_with(error)[-1].html
    with pytest.raises(RuntimeError, match="another"):
        failing_with(RuntimeError("another"))


def test_old_drawings_go_with_their_files(studio: Studio, tmp_path: Path) -> None:
    desk, drawings = Desk(studio, tmp_path), []
    for i in range(5):
        (tmp_path / f"{DRAWING}{i}").mkdir()
        drawings.append([str(tmp_path / f"{DRAWING}{i}" / f"{j}.png") for j in range(KEPT // 3)])
    assert desk.kept(drawings) == drawings[:3]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{DRAWING}{i}" for i in range(3)]
    assert desk.kept([drawings[0] * 4]) == [drawings[0] * 4]
    desk.forget(drawings)  # twice does no harm
    assert not [*tmp_path.iterdir()]


def test_nothing_but_a_drawing_of_ours_is_ever_removed(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a list of drawings says: relative names, the folder itself, others' folders, a link to one."""
    desk = Desk(studio, tmp_path / "served")
    for name in ("served/other", "work", "drawing-elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").touch()
    (tmp_path / "served" / f"{DRAWING}link").symlink_to(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    before = sorted(tmp_path.rglob("*"))
    named = ["a.png", "", "served/a.png", "other/a.png", f"{DRAWING}link/a.png"]
    desk.forget([[name] for name in named] + [[str(desk.folder / name)] for name in named])
    desk.forget([[str(tmp_path / "drawing-elsewhere" / "a.png")], []])
    assert sorted(tmp_path.rglob("*")) == before
