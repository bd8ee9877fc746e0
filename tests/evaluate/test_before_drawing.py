"""What a benchmark needs is there before the first picture is drawn, and is loaded once; a log says how far it is."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from digits_run import small_run

from emf.cli import evaluate as commands
from emf.evaluate import pictures
from emf.evaluate.detector import RecordedDetector
from emf.evaluate.drawing import Drawing
from emf.evaluate.hps import STYLES
from emf.show import progress

PROMPTS = ["a red seven", "two blue threes"]
ITEMS = ["long", "other"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("before") / "run")


@pytest.fixture
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "draw_pictures", lambda *_, **__: pytest.fail("drawn"))


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": p} for p in PROMPTS
    ]
    return write_lines(tmp_path / "metadata.jsonl", rows)


@pytest.fixture
def detections(tmp_path: Path) -> Path:
    names = [f"{i:05d}/samples/{j:04d}.png" for i in range(2) for j in range(4)]
    return write_lines(tmp_path / "detections.jsonl", [{"filename": n, "detections": []} for n in names])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name, prompt in zip(ITEMS, PROMPTS, strict=True):
        (tmp_path / "texts" / f"{name}.txt").write_text(prompt)
    return tmp_path / "texts"


def questions(file: Path, items: list[str], dependency: str = "0") -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["item_id", "proposition_id", "dependency", "tuple", "question_natural_language"])
        for name in items:
            writer.writerow([name, 1, "0", "entity - whole (x)", "is it there?"])
            writer.writerow([name, 2, dependency, "entity - whole (y)", "is it red?"])
    return file


@pytest.mark.usefixtures("nothing_is_drawn")
def test_geneval(run: Path, metadata: Path, detections: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(message: str, out: Path = out, prompts: Path = metadata, checkpoint: Path = run, **how: Any) -> None:
        drawing = Drawing(checkpoint=checkpoint, steps=(1, 2))
        with pytest.raises(ValueError, match=message):
            commands.geneval(out, prompts=prompts, draw=drawing, **{"detections": detections, **how})

    refused("no.jsonl does not exist", detections=tmp_path / "no.jsonl")
    refused(f"{tmp_path / 'none'} cannot be loaded", detections=None, detector=str(tmp_path / "none"))
    few = write_lines(tmp_path / "few.jsonl", [{"filename": "00000/samples/0000.png", "detections": []}])
    refused("has no line for 00000/samples/0001.png", detections=few)
    strange = write_lines(tmp_path / "strange.jsonl", [{"tag": "x", "include": [{"class": "unicorn"}], "prompt": "a"}])
    refused(r"strange.jsonl:1: the class of include\[0\] is none", prompts=strange)
    refused("empty.jsonl holds no prompt", prompts=write_lines(tmp_path / "empty.jsonl", []))
    refused("holds no checkpoint", checkpoint=tmp_path / "absent")
    refused("device: gpu is|device: 'gpu' is none", device="gpu")
    assert not out.exists()
    (tmp_path / "file").touch()
    refused("is no folder", out=tmp_path / "file")
    refused("is no folder", out=tmp_path / "file" / "out")
    out.mkdir()
    (out / "results.json").write_text("{}")
    refused("results.json exists without settings.json")
    (out / "results.json").rename(tmp_path / "mine")
    (out / "2").mkdir()
    (out / "2" / "scored.jsonl").touch()
    refused("scored.jsonl exists without settings.json")
    assert sorted(p.name for p in out.rglob("*")) == ["2", "scored.jsonl"]


def test_a_prompt_that_the_encoder_cannot_read(run: Path, tmp_path: Path) -> None:
    """Be it the last."""
    rows = [{"prompt": p} for p in (*PROMPTS, "a réd zebra")]
    prompts = write_lines(tmp_path / "strange.jsonl", rows)
    with pytest.raises(ValueError, match="zebra|réd"):
        commands.geneval(tmp_path / "out", prompts=prompts, draw=Drawing(checkpoint=run, images_only=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_drawn")
def test_dpg(run: Path, texts: Path, tmp_path: Path) -> None:
    rows = [{"filename": f"{n}.png", "crop": c, "answers": {"1": "yes", "2": "no"}} for n in ITEMS for c in range(4)]
    answers = write_lines(tmp_path / "answers.jsonl", rows)

    def refused(message: str, file: Path, answers: Path = answers, **how: Any) -> None:
        drawing = Drawing(checkpoint=run, steps=(1,), limit=how.pop("limit", None))
        with pytest.raises(ValueError, match=message):
            commands.dpg(tmp_path / "out", prompts=texts, questions=file, answers=answers, draw=drawing, **how)

    refused("does not exist; put DPG-Bench's dpg_bench.csv", tmp_path / "none.csv")
    refused("long.png is of no item in some.csv", questions(tmp_path / "some.csv", ["first", "other"]))
    whole = questions(tmp_path / "whole.csv", ["first", *ITEMS])
    few = write_lines(tmp_path / "few.jsonl", rows[:5])
    refused("few.jsonl has no answer to proposition 1 of other.png, crop 1", whole, answers=few)
    refused("--resolution is of a folder of images", whole, resolution=9)
    skipped = questions(tmp_path / "skipped.csv", ITEMS, dependency="1")
    refused("long.png is all there is, and left out, as officially", skipped, limit=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_drawn")
def test_hps(run: Path, tmp_path: Path) -> None:
    styles = tmp_path / "styles"
    styles.mkdir()
    for style in STYLES:
        (styles / f"{style}.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "torn.pt").write_bytes(b"PK")
    for weights, message in (("none.pt", "none.pt does not exist"), ("torn.pt", "torn.pt cannot be read")):
        with pytest.raises(ValueError, match=message):
            drawing = Drawing(checkpoint=run, steps=(1,))
            commands.hps(tmp_path / "out", prompts=styles, weights=tmp_path / weights, draw=drawing)
    assert not (tmp_path / "out").exists()


def test_it_is_loaded_once_and_says_how_far_it_is(
    run: Path,
    metadata: Path,
    detections: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded: list[Path] = []

    class Counted(RecordedDetector):
        def __init__(self, file: Path) -> None:
            loaded.append(file)
            super().__init__(file)

    monkeypatch.setattr("emf.evaluate.geneval.RecordedDetector", Counted)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    drawing = Drawing(checkpoint=run, steps=(1, 2, 3), batch=8)
    commands.geneval(tmp_path / "out", prompts=metadata, draw=drawing, detections=detections)
    said = capsys.readouterr()
    assert loaded == [detections]
    assert said.out.count("GenEval (recorded detections), steps ") == 3 and "scoring" not in said.out
    lines = said.err.splitlines()
    stages = [line for line in lines if line.startswith("evaluate: ")]
    assert [line.split()[1] for line in stages] == ["loading", "drawing", "scoring", "scoring", "scoring"]
    assert "8 files of images in steps of 1, 2, 3 with" in stages[1]
    counts = {line.partition(" after ")[0] for line in lines}  # how long it took is the machine's
    assert {"drawing: 24 of 24", "scoring: 8 of 8"} <= counts
    # with everything there, nothing is drawn or scored again
    monkeypatch.setattr(Counted, "detect", lambda *_: pytest.fail("scored again"))
    commands.geneval(tmp_path / "out", prompts=metadata, draw=drawing, detections=detections)


def test_other_ranks_need_no_scorer(run: Path, metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawing = Drawing(checkpoint=run, steps=(1,))
    commands.geneval(tmp_path / "out", prompts=metadata, draw=drawing, detections=tmp_path / "none")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4 and not (tmp_path / "out" / "results.json").exists()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="launch: RANK 1 and WORLD_SIZE not set in the environment"):
        commands.geneval(tmp_path / "out", prompts=metadata, draw=drawing, detections=tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(run: Path, metadata: Path, detections: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(0o500)
    with pytest.raises(ValueError, match="may not be written to"):
        drawing = Drawing(checkpoint=run, steps=(1,))
        commands.geneval(tmp_path / "locked" / "out", prompts=metadata, draw=drawing, detections=detections)


@pytest.mark.usefixtures("nothing_is_drawn")
def test_an_engine_is_there(run: Path, tmp_path: Path) -> None:
    """Before what scores the images is loaded, which takes minutes."""
    drawing = Drawing(checkpoint=run, ar_server="http://127.0.0.1:9")
    load = lambda: pytest.fail("loaded")  # noqa: E731
    item = pictures.Item("0.png", PROMPTS[0], 0)
    with pytest.raises(ValueError, match="^image tokens: no server answers at http://127.0.0.1:9"):
        pictures.draw_and_score([item], {}, tmp_path / "out", drawing, device="cpu", load=load, name="x")
