"""A run that somebody edited, moved or took for something else: one line that names the file, before a step is made.

Takes about 15 seconds, of which one export is most.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from damaged import VALUES, changed, holds
from digits_run import small_run
from hypothesis import given, settings
from named_pictures import shapes

from emf.cli.main import main
from emf.evaluate.run_log import CURVE, METRICS, RESUMED, read_curve, read_metrics
from emf.evaluate.run_page import write_report
from emf.files import read_rows
from emf.paper import openmoji_record, paper_record
from emf.paper.openmoji_parts import QUICK as QUICK_PICTURES
from emf.paper.parts import QUICK
from emf.paper.record import ENCODER, RESULTS, SCORES, Study
from emf.train.log import Log
from emf.train.zero.engine import Engine

NUMBERS = dict.fromkeys(("loss", "error", "lr", "it_s", "share", "memory_mib"), 1.0)
ROW = {"step": 1, "wall_s": 1.0, "skipped": 0, **NUMBERS}
SCORED = {"step": 1, "overall": {"1": 0.5, "4": 0.25}, "guidance": 1.25}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = small_run(tmp_path / "run")
    (folder / METRICS).write_text(json.dumps(ROW) + "\n")
    (folder / CURVE).write_text(json.dumps(SCORED) + "\n")
    return folder


def said(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    monkeypatch.setattr("sys.argv", ["emf", *shlex.split(words)])
    with pytest.raises(SystemExit) as end:
        main()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert end.value.code == 2
    return line


@settings(max_examples=200)
@given(rows=changed([[ROW, ROW | {"step": 2}]]))
def test_any_metrics(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(METRICS, rows, lambda folder: (read_metrics(folder), read_rows(folder / METRICS, RESUMED)), tmp_path_factory)


@settings(max_examples=200)
@given(rows=changed([[SCORED, SCORED | {"step": 2}]]))
def test_any_curve(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    def drawn(folder: Path) -> None:
        for row in read_curve(folder):
            assert row["step"] > 0 and min(map(int, row["overall"])) > 0
            assert all(0 <= score <= 1 for score in row["overall"].values())

    check(CURVE, rows, drawn, tmp_path_factory)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (METRICS, {"step": 0}, "{}:3 has step 0; expected a whole number (at least 1); repair or remove the line"),
        (METRICS, {"step": 2}, "{}:3 has step 2 below one with step 2; expected a later step; repair or remove"),
        (METRICS, {"skipped": -1}, "{}:3 has skipped -1; expected a whole number (at least 0); repair"),
        (METRICS, {"error": -0.5}, "{}:3 has error -0.5; expected a finite number (at least 0)"),
        (METRICS, {"it_s": 1e39}, "{}:3 has it_s 1e+39; expected a finite number (at least 0)"),
        (METRICS, {"share": 1.5}, "{}:3 has share 1.5; expected a finite number (at least 0 and at most 1)"),
        (METRICS, {"it_s": -1}, "{}:3 has it_s -1; expected a finite number (at least 0)"),
        (METRICS, {"wall_s": -1}, "{}:3 has wall_s -1; expected a finite number (at least 0)"),
        (CURVE, {"step": -1}, "{}:3 has step -1; expected a whole number (at least 1); repair or remove the line"),
        (CURVE, {"step": 1}, "{}:3 has step 1 below one with step 2; expected a later step; repair or remove"),
        (CURVE, {"overall": {"1": 0.5, "4": 7}}, "overall of {}:3 has 4 7; expected a finite number (at least 0 and"),
        (CURVE, {"overall": {"0": 0.5, "4": 0.5}}, "{}:3 has a score of '0' steps; repair or remove the line"),
        (CURVE, {"overall": {"1": 0.5, "04": 0.5}}, "{}:3 has a score of '04' steps; repair or remove the line"),
    ],
)
def test_what_no_log_holds(run: Path, name: str, change: dict[str, Any], said: str) -> None:
    """A run that goes on drops the rows past the step that it goes on from, so that no step is there twice."""
    read, row = (read_metrics, ROW) if name == METRICS else (read_curve, SCORED)
    (run / name).write_text("".join(json.dumps(row | x) + "\n" for x in ({}, {"step": 2}, {"step": 3} | change)))
    with pytest.raises(ValueError) as error:
        read(run)
    assert str(error.value).startswith(said.replace("{}", str(run / name))), error.value
    if "step" in change:
        with pytest.raises(ValueError, match="repair or remove the line"):
            Log(run, 1, 2)  # nor is it gone on with
    huge = {"step": 3, "error": 3e38, "loss": -3e38}  # of a training that goes wrong, whose log is read all the same
    (run / name).write_text("".join(json.dumps(row | x) + "\n" for x in ({}, {"step": 2}, huge)))
    assert [x["step"] for x in read(run)] == [1, 2, 3]


def check(name: str, rows: Any, act: Callable[[Path], Any], places: pytest.TempPathFactory) -> None:
    folder = places.getbasetemp()
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
    holds(lambda: act(folder), name)


STUDIES = (paper_record.study(QUICK), openmoji_record.study(Path(), shapes(), QUICK_PICTURES))


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.who)
@settings(max_examples=100)
@given(tree=VALUES)
def test_any_row_of_a_study(study: Study, tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a part's own folder, and in the row of results.json."""
    folder = tmp_path_factory.getbasetemp() / study.who
    folder.mkdir(exist_ok=True)
    (folder / ENCODER).unlink(missing_ok=True)
    (folder / SCORES).write_text(json.dumps({"1": tree}))
    holds(lambda: study.row(folder), SCORES)
    (folder / SCORES).write_text("{}")
    (folder / ENCODER).write_text(json.dumps(tree))
    holds(lambda: study.row(folder), ENCODER)
    budget = {"budget": asdict(study.budget), **study.fixed}
    for row in ({"scores": {"1": tree}}, {"scores": {}, "curve": tree}, {"scores": {}, "encoder": tree}, tree):
        (folder / RESULTS).write_text(json.dumps(budget | {"parts": {"emf/trained/0": row}}))
        holds(lambda: study.recorded(folder), RESULTS)


@pytest.mark.parametrize("section", ["run", "flow", "condition", "data"])
def test_a_config_without_a_section(run: Path, section: str) -> None:
    tree = json.loads((run / "config.json").read_text()) | {section: None}
    (run / "config.json").write_text(json.dumps(tree))
    holds(lambda: write_report(run), "config.json")
    with pytest.raises(ValueError, match=f"{section} is None; expected a section"):
        write_report(run)


def test_a_log_that_cannot_be_gone_on_with_is_said_before_a_step(run: Path) -> None:
    (run / METRICS).write_text(json.dumps(ROW | {"step": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:1 has step 'x'; expected a whole number"):
        Log(run, 1, 2)


def test_what_is_taken_for_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["emf", "export", str(run), "--out", str(tmp_path / "e")])
    main()
    for words, line in (
        ("release {}/e --out {}/x", "{}/e is no run but an export"),
        ("evaluate digits {}/e", "{}/e is no run but an export"),
        ("generate a --run {}/run/config.json --out {}/x", "config.json holds no checkpoint, for it is a file"),
        ("export {}/run --out {}/run/checkpoints/x", "lies among the checkpoints of the run {}/run"),
        ("release {}/run --out {}/run/checkpoints/x", "lies among the checkpoints of the run {}/run"),
        ("generate a --run {}/run --out {}/x\udcff", "the byte 0xff, which is not UTF-8"),
        ("train digits --out {}/x\udcff", "the byte 0xff, which is not UTF-8"),
    ):
        told = said(words.replace("{}", str(tmp_path)), monkeypatch, capsys)
        assert line.replace("{}", str(tmp_path)) in told, told
    assert not (tmp_path / "x").exists() and not (run / "checkpoints").exists()


@pytest.mark.parametrize(("stage", "world", "files"), [(0, 1, []), (2, 2, ["a_model_states.pt", "a_optim_states.pt"])])
def test_files_of_deepspeed_that_are_gone(tmp_path: Path, stage: int, world: int, files: list[str]) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "checkpoint.json").write_text(json.dumps({"step": 1, "world": world, "stage": stage}))
    for name in files:
        (tmp_path / "engine" / name).touch()
    engine = Engine.__new__(Engine)
    engine.stage = stage
    with pytest.raises(ValueError, match=r"engine lacks files of DeepSpeed's; move .* --init "):
        engine.load(tmp_path)


def test_sigterm_before_the_first_step(tmp_path: Path) -> None:
    code = "import signal, os, time, emf.train.loop as loop\nfrom emf.train.command import main\n"
    code += "loop.train = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))\n"
    code += f"main(['digits', '--out', {str(tmp_path / 'run')!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == f"asked to stop: no step was under way, and {tmp_path / 'run'} holds what it held\n"
