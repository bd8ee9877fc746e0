"""Benchmarks' images from a checkpoint: layouts, resumption, ranks, and the whole way to a table."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digits_run import small_run
from PIL import Image
from same_pictures import assert_same_pictures

from emf.cli import evaluate as commands
from emf.evaluate import pictures
from emf.evaluate.drawing import Drawing

PROMPTS = ["a red seven", "two blue threes", "a four above a one"]
ITEMS = ["long", "other", "third"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("draw") / "run")


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    rows = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": p} for p in PROMPTS]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "evaluation_metadata.jsonl"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name, prompt in zip(ITEMS, PROMPTS, strict=True):
        (tmp_path / "texts" / f"{name}.txt").write_text(prompt + "\n")
    return tmp_path / "texts"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(folder: Path) -> dict[str, bytes]:
    return {name: held for name, held in files(folder).items() if not name.endswith(".png")}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def geneval(run: Path, out: Path, metadata: Path, **further: Any) -> None:
    settings: dict[str, Any] = dict(steps=(1, 2), images_only=True) | further
    commands.geneval(out, prompts=metadata, draw=Drawing(checkpoint=run, **settings))


def test_genevals_layout_and_that_noise_follows_the_image(run: Path, metadata: Path, tmp_path: Path) -> None:
    geneval(run, tmp_path / "a", metadata)
    geneval(run, tmp_path / "b", metadata, batch=5)
    images = tmp_path / "a" / "1" / "images"
    assert json.loads((images / "00001" / "metadata.jsonl").read_text())["prompt"] == PROMPTS[1]
    drawn = sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))
    assert drawn == [f"{i:05d}/samples/{j:04d}.png" for i in range(3) for j in range(4)]
    assert len({p.read_bytes() for p in images.rglob("*.png")}) == 12
    assert pixels(images / drawn[0]).shape == (18, 18, 3)
    for steps in ("1", "2"):
        assert_same_pictures(*(tmp_path / x / steps / "images" for x in "ab"))  # the batches have other sizes
    assert files(tmp_path / "a" / "1") != files(tmp_path / "a" / "2")


def test_what_is_there_is_not_drawn_again(run: Path, metadata: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    geneval(run, out, metadata)
    shutil.copytree(out, tmp_path / "whole")
    images = sorted(out.rglob("*.png"))
    for image in images[3:9]:
        image.unlink()
    images[3].with_name(f"{images[3].name}.0.part").write_bytes(b"torn")
    times = {p: p.stat().st_mtime_ns for p in images[:3] + images[9:]}
    geneval(run, out, metadata)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert_same_pictures(out, tmp_path / "whole")  # what was missing came in smaller batches
    assert texts_of(out) == texts_of(tmp_path / "whole")


def test_drawn_again_in_the_same_batches_it_is_bitwise_the_same(run: Path, metadata: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        geneval(run, tmp_path / name, metadata)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_ranks_share_the_work(
    run: Path, metadata: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geneval(run, tmp_path / "one", metadata)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(pictures, "PATIENCE", 0)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="8 images are missing"):
        geneval(run, tmp_path / "two", metadata)  # of 24, in batches of 4 the second of three
    monkeypatch.setenv("RANK", "1")
    geneval(run, tmp_path / "two", metadata)
    assert files(tmp_path / "one") == files(tmp_path / "two")  # a rank draws whole batches of the one rank's
    monkeypatch.setenv("RANK", "0")
    geneval(run, tmp_path / "two", metadata)


@pytest.mark.parametrize("change", [dict(seed=1), dict(guidance=2.0), dict(flow_matching=True), dict(weights=1)])
def test_other_settings_are_refused(run: Path, metadata: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    geneval(run, tmp_path / "out", metadata, steps=(1,))
    before = files(tmp_path / "out")
    other = small_run(tmp_path / "other", seed=1) if "weights" in change else run
    change = {k: v for k, v in change.items() if k != "weights"}
    with pytest.raises(ValueError, match="other settings"):
        geneval(other, tmp_path / "out", metadata, steps=(1,), **change)
    assert files(tmp_path / "out") == before


def test_images_of_other_prompts_are_not_scored_as_these(run: Path, metadata: Path, tmp_path: Path) -> None:
    """A word, the order and the number of the prompts count; how many of them are drawn does not."""
    out, whole = tmp_path / "out", metadata.read_text()
    geneval(run, out, metadata, steps=(1,), limit=2)
    first = files(out)
    rows = whole.splitlines()
    for other in (whole.replace("seven", "six"), "\n".join(rows[::-1]), "\n".join(rows[:2])):
        metadata.write_text(other + "\n")
        with pytest.raises(ValueError, match=r"other settings \(prompts\); give another folder"):
            geneval(run, out, metadata, steps=(1,))
        assert files(out) == first
    metadata.write_text(whole)
    geneval(run, out, metadata, steps=(1,))
    assert len(list(out.rglob("*.png"))) == 12 and first.items() <= files(out).items()


def test_dpg_and_hps_know_their_prompts_again(run: Path, texts: Path, tmp_path: Path) -> None:
    styles, drawing = tmp_path / "styles", Drawing(checkpoint=run, steps=(1,), images_only=True)
    styles.mkdir()
    for style in pictures.STYLES:
        (styles / f"{style}.json").write_text(json.dumps(PROMPTS[:1]))
    commands.dpg(tmp_path / "dpg", prompts=texts, draw=drawing)
    commands.hps(tmp_path / "hps", prompts=styles, draw=drawing)
    (texts / "other.txt").write_text("two red threes")
    (styles / "photo.json").write_text(json.dumps(PROMPTS[1:2]))
    with pytest.raises(ValueError, match=r"other settings \(prompts\)"):
        commands.dpg(tmp_path / "dpg", prompts=texts, draw=drawing)
    with pytest.raises(ValueError, match=r"other settings \(prompts\)"):
        commands.hps(tmp_path / "hps", prompts=styles, draw=drawing)


def test_a_checkpoint_spelled_otherwise_is_the_same(
    run: Path, metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geneval(run, tmp_path / "out", metadata, steps=(1,))
    before = files(tmp_path / "out")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run.parent)
    for spelled in (Path(run.name), Path("..") / run.parent.name / run.name, tmp_path / "link"):
        geneval(spelled, tmp_path / "out", metadata, steps=(1,))
    assert files(tmp_path / "out") == before
    told = json.loads((tmp_path / "out" / "1" / "images" / "drawing.json").read_text())
    assert told["checkpoint"] == str(run.resolve()) and told["vae"] is None


def test_somebodys_own_images_are_left_alone(run: Path, metadata: Path, tmp_path: Path) -> None:
    own = tmp_path / "out" / "1" / "images" / "00000" / "samples" / "0000.png"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(ValueError, match="exists without drawing.json"):
        geneval(run, tmp_path / "out", metadata, steps=(1,))
    assert own.read_text() == "mine"


def test_geneval_to_a_table(run: Path, metadata: Path, tmp_path: Path) -> None:
    found = [{"label": "dog", "score": 0.9, "box": [0, 0, 5, 5], "color": "red"}]
    names = [(f"{i:05d}/samples/{j:04d}.png", i) for i in range(3) for j in range(4)]
    detections = tmp_path / "detections.jsonl"
    rows = [{"filename": n, "detections": found if i else []} for n, i in names]
    detections.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def scored(*steps: int, by: Path = detections, **how: Any) -> None:
        drawing = Drawing(checkpoint=run, steps=steps, **how)
        commands.geneval(tmp_path / "out", prompts=metadata, draw=drawing, detections=by, name="ours")

    scored(1, 4)
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["steps"] for r in tree["results"]] == [1, 4] and tree["results"][0]["overall"] == pytest.approx(2 / 3)
    table = (tmp_path / "out" / "results.md").read_text()
    assert (
        "| EMF, paper | 4 | 0.90 |" in table and "| **ours**, GenEval (recorded detections) | 4 | **0.667** |" in table
    )
    assert "| task | 1 step | 4 steps |" in table and "3 prompts instead of 553" in table
    assert "12 images each." in table
    # the rows of other steps stay, which were drawn and scored in the same way, and a call with others is refused
    held = files(tmp_path / "out")
    (tmp_path / "fewer.jsonl").write_text("".join(json.dumps(row | {"detections": found}) + "\n" for row in rows))
    for how, said in (
        (dict(guidance=2.0), r"a row of 1 step: .*1/images holds what was made by other settings \(guidance\); give"),
        (dict(flow_matching=True), r"a row of 1 step: .*1/images holds .*flow_matching"),
        (dict(by=tmp_path / "fewer.jsonl"), r"a row of 1 step scored by other settings \(detections\); give another"),
    ):
        with pytest.raises(ValueError, match=f"^evaluate: .*results.json has {said}"):
            scored(2, **how)
        assert files(tmp_path / "out") == held
    scored(2, limit=1)
    more = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["steps"], r["images"]) for r in more["results"]] == [(1, 12), (2, 4), (4, 12)]
    assert [more["results"][0], more["results"][2]] == tree["results"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| task | 1 step | 2 steps | 4 steps |" in table and "12, 4, 12 images, in the order of the steps" in table
    assert "1 prompts instead of 553" in table
    scored(2)  # all of its prompts, in the place of its row
    assert "| 2 | **0.667** |" in (tmp_path / "out" / "results.md").read_text()
    (tmp_path / "out" / "4" / "images" / "drawing.json").unlink()
    with pytest.raises(ValueError, match=r"has a row of 4 steps: .*drawing.json is not there, which says how"):
        scored(1)
    (tmp_path / "out" / "results.json").write_text(json.dumps(more | {"results": [{"steps": 1}]}))
    with pytest.raises(ValueError, match=r"results.json is no table that can be added to: row 1 of its .*; move it"):
        scored(2)


def test_dpg_draws_grids(run: Path, texts: Path, tmp_path: Path) -> None:
    drawing = Drawing(checkpoint=run, steps=(2,), batch=8)
    questions, answers = tmp_path / "dpg_bench.csv", tmp_path / "answers.jsonl"
    columns = ["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"]
    with questions.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([name, "", 1, "0", "entity - whole (x)", "is it there?"] for name in ["skipped", *ITEMS])
    rows = [{"filename": f"{n}.png", "crop": c, "answers": {"1": "yes"}} for n in ITEMS for c in range(4)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands.dpg(tmp_path / "out", prompts=texts, questions=questions, answers=answers, draw=drawing)
    images = tmp_path / "out" / "2" / "images"
    assert sorted(p.name for p in images.glob("*.png")) == [f"{n}.png" for n in ITEMS]
    grid = pixels(images / "long.png")
    assert (
        grid.shape == (36, 36, 3)
        and len({grid[y : y + 18, x : x + 18].tobytes() for y in (0, 18) for x in (0, 18)}) == 4
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["overall"] == 100
    how: dict[str, Any] = dict(prompts=texts, questions=questions, answers=answers)
    with pytest.raises(ValueError, match=r"has a row of 2 steps scored by other settings \(last_crop_categories\)"):
        commands.dpg(tmp_path / "out", draw=replace(drawing, steps=(1,)), last_crop_categories=False, **how)
    commands.dpg(tmp_path / "out", draw=replace(drawing, steps=(1,)), **how)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [r["steps"] for r in results] == [1, 2]


def test_hps_draws_by_style(run: Path, tmp_path: Path) -> None:
    (tmp_path / "styles").mkdir()
    for style in pictures.STYLES:
        (tmp_path / "styles" / f"{style}.json").write_text(json.dumps(PROMPTS))
    drawing = Drawing(checkpoint=run, steps=(1,), images_only=True, limit=2)
    commands.hps(tmp_path / "out", prompts=tmp_path / "styles", draw=drawing)
    drawn = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("*.jpg"))
    assert drawn == [f"1/images/{style}/{i:05d}.jpg" for style in pictures.STYLES for i in range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(draw=Drawing()), "folder of images, or --checkpoint"),
        (dict(images=Path("x"), draw=Drawing(checkpoint=Path("y"))), "folder of images, or --checkpoint"),
        (dict(draw=Drawing(checkpoint=Path("y"))), "expected evaluation_metadata.jsonl"),
        (dict(images=Path("absent")), "is no folder"),
        (dict(images=Path("x"), draw=Drawing(guidance=2.0)), "--guidance is of images that are drawn"),
        (dict(images=Path("x"), draw=Drawing(images_only=True)), "--images-only is of images that are drawn"),
        (dict(images=Path("x"), prompts=Path("y")), "--prompts is of images that are drawn"),
    ],
)
def test_what_is_missing_is_said(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        commands.geneval(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(steps=()), "--steps is empty; expected numbers"),
        (dict(steps=(1, 0)), "--steps 1 0 must be at least 1"),
        (dict(limit=0), "--limit 0 must be at least 1"),
        (dict(batch=0), "--batch 0 must be at least 1"),
        (dict(seed=2**43), "--seed 8796093022208 must be at least 0 and below 8796093022208"),
        (dict(guidance=float("nan")), "--guidance nan must be finite"),
    ],
)
def test_what_cannot_be_drawn_is_said_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Drawing(**wrong)


def test_benchmarks_files_are_asked_for(run: Path, tmp_path: Path) -> None:
    drawing = Drawing(checkpoint=run, images_only=True)
    with pytest.raises(ValueError, match="dpg_bench/prompts"):
        commands.dpg(tmp_path / "out", prompts=tmp_path, draw=drawing)
    with pytest.raises(ValueError, match=r"HPDv2's benchmark/anime.json"):
        commands.hps(tmp_path / "out", prompts=tmp_path, draw=drawing)
    with pytest.raises(ValueError, match="--limit needs --images-only"):
        commands.hps(tmp_path / "out", weights=tmp_path, draw=replace(drawing, images_only=False, limit=1))
    with pytest.raises(ValueError, match="--questions"):
        commands.dpg(tmp_path / "out", prompts=tmp_path, draw=replace(drawing, images_only=False))
