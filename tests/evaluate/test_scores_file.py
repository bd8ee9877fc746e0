"""No score is lost in silence for one that is worth less: scores.json of a run, and a benchmark's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emf.data.digits import TAGS
from emf.data.scores_file import CHECKS, EULER, SCORES, read_scores, refuse_lesser
from emf.evaluate import small_world
from emf.evaluate.benchmark import take
from emf.recipes import digits

ROW = {"model": "fm", "overall": 0.5, "by_tag": dict.fromkeys(TAGS, 0.5)}
WHOLE: dict[str, Any] = {"rows": [ROW | {"steps": n} for n in EULER], **dict.fromkeys(CHECKS, 0.5), "step": None}
FM = [("fm", n) for n in EULER]
HOW = {"captions": 300, "guidance": 1.25, "seed": 0}


@pytest.mark.parametrize(
    ("old", "now", "said"),
    [
        (HOW, {}, None),
        (HOW, {"captions": 600}, None),
        ({}, {}, None),  # an earlier version's
        ({}, {"guidance": 3.0}, None),
        (
            HOW,
            {"captions": 6},
            "is of 300 captions, guidance 1.25, seed 0; scores of 6 captions, guidance 1.25, seed 0 ",
        ),
        ({}, {"captions": 6}, "is of 300 captions; scores of 6 captions would replace it: score as many"),
        (HOW, {"seed": 1}, "scores of 300 captions, guidance 1.25, seed 1 would replace it"),
        (HOW, {"captions": 600, "guidance": 1.0}, "scores of 600 captions, guidance 1.0, seed 0 would replace it"),
    ],
)
def test_scores_of_more_are_not_replaced(
    tmp_path: Path, old: dict[str, Any], now: dict[str, Any], said: str | None
) -> None:
    refuse_lesser(tmp_path, HOW | now, FM)  # there are none
    (tmp_path / SCORES).write_text(json.dumps(WHOLE | old))
    assert read_scores(tmp_path / SCORES, "report") == {k: v for k, v in (WHOLE | old).items() if v is not None}
    if said is None:
        return refuse_lesser(tmp_path, HOW | now, FM)
    with pytest.raises(ValueError, match=f"^evaluate: .*{said}"):
        refuse_lesser(tmp_path, HOW | now, FM)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"captions": -5}, "it has captions -5; expected a whole number (at least 1) or null; move it away"),
        ({"captions": 0}, "it has captions 0; expected a whole number (at least 1) or null"),
        ({"seed": -1}, "it has seed -1; expected a whole number (at least 0) or null"),
        ({"step": -1}, "it has step -1; expected a whole number (at least 0) or null"),
        ({"noise": -0.1}, "it has noise -0.1; expected a finite number (at least 0 and at most 1)"),
        ({"ceiling": 1.5}, "it has ceiling 1.5; expected a finite number (at least 0 and at most 1)"),
        ({"rows": {"steps": 0}}, "row 4 of its rows has steps 0; expected a whole number (at least 1)"),
        ({"rows": {"overall": 7}}, "row 4 of its rows has overall 7; expected a finite number (at least 0 and at"),
        ({"rows": {"by_tag": dict.fromkeys(TAGS, -1)}}, f"by_tag of row 4 of its rows has {TAGS[0]} -1; expected"),
        ({"rows": {"steps": 4}}, "row 4 of its rows has model fm and steps 4, as row 2 has; move it away"),
    ],
)
def test_what_cannot_be(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """It is refused by a line that names the file, the row and the key, and the nearest that can be is read."""
    added = change.pop("rows", {"model": "emf"})
    scores = WHOLE | HOW | change | {"rows": WHOLE["rows"] + [ROW | {"steps": 8} | added]}
    (tmp_path / SCORES).write_text(json.dumps(scores))
    with pytest.raises(ValueError) as error:
        read_scores(tmp_path / SCORES, "report")
    start = f"report: {tmp_path / SCORES} is not what `emf evaluate digits` writes: {said}"
    assert str(error.value).startswith(start), error.value
    edge = {"captions": 1, "seed": 0, "step": 0, "noise": 0, "ceiling": 1}
    rows = WHOLE["rows"] + [ROW | {"steps": 1, "model": "emf", "overall": 1, "by_tag": dict.fromkeys(TAGS, 0)}]
    (tmp_path / SCORES).write_text(json.dumps(WHOLE | HOW | edge | {"rows": rows}))
    assert read_scores(tmp_path / SCORES, "report") == WHOLE | HOW | edge | {"rows": rows}


def test_a_folder_in_its_place_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / SCORES).mkdir()
    with pytest.raises(ValueError, match=r"^evaluate: .*scores\.json is a folder; move it away"):
        refuse_lesser(tmp_path, HOW, FM)


def test_a_row_that_is_not_scored_again_is_not_lost(tmp_path: Path) -> None:
    more = WHOLE["rows"] + [ROW | {"model": "emf", "steps": 16}]
    (tmp_path / SCORES).write_text(json.dumps(WHOLE | HOW | {"rows": more}))
    refuse_lesser(tmp_path, HOW, [*FM, ("emf", 16)])
    with pytest.raises(ValueError, match=r"^evaluate: .*scores.json has a row of emf in 16 steps, .*; move it"):
        refuse_lesser(tmp_path, HOW, [*FM, ("emf", 8)])


def test_a_run_is_not_drawn_for_scores_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_world, "at_newest", lambda *_: (digits(), None, 3))
    monkeypatch.setattr(small_world, "load_start", None)
    (tmp_path / SCORES).write_text(json.dumps(WHOLE | HOW))
    with pytest.raises(ValueError, match="move it and samples.png away first"):
        small_world.evaluate_run(tmp_path, 1, 1.25, 0)


def test_scores_are_of_one_folder_of_images(tmp_path: Path) -> None:
    """Those of earlier versions, which told it otherwise or not at all, are gone on with."""
    out, images, other = tmp_path / "out", tmp_path / "images", tmp_path / "other"
    settings: dict[str, Any] = {"benchmark": "GenEval"}
    take(out, images, settings, 1)
    take(out, images, settings, 1)
    with pytest.raises(ValueError, match=r"made by other settings \(images\)"):
        take(out, other, settings, 1)
    take(out / "4", out / "4" / "images", settings, 1)
    (out / "4").rename(tmp_path / "moved")
    take(tmp_path / "moved", tmp_path / "moved" / "images", settings, 1)  # with its images
    for n, told in enumerate(({}, {"images": str(images)})):
        (tmp_path / f"old{n}").mkdir()
        (tmp_path / f"old{n}" / "settings.json").write_text(json.dumps(settings | told))
        take(tmp_path / f"old{n}", images, settings, 1)


def test_a_result_of_more_images_is_not_replaced(tmp_path: Path) -> None:
    images, settings = tmp_path / "images", {"benchmark": "GenEval"}
    take(tmp_path, images, settings, 8)
    for told in ({"images": 8}, {}, [], {"images": "x"}):
        (tmp_path / "results.json").write_text(json.dumps(told))
        take(tmp_path, images, settings, 8)
    (tmp_path / "results.json").write_text(json.dumps({"images": 9}))
    with pytest.raises(ValueError, match=r"^evaluate: .*results.json is of 9 images, and of .* 8 are to be scored; p"):
        take(tmp_path, images, settings, 8)
    (tmp_path / "results.json").write_text("{")
    take(tmp_path, images, settings, 8)
