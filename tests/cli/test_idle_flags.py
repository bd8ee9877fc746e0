"""Flags of the commands beside training that cannot act: one line each, before anything is read or written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from digits_run import small_run

from emf.analyze.choices import Sampling
from emf.analyze.pairs import read_pairs
from emf.analyze.steps import run_steps
from emf.cli import analyze, data, evaluate
from emf.cli.generate import generate
from emf.config import ZeroConfig
from emf.evaluate.drawing import Drawing
from emf.recipes import digits_base
from emf.train.zero import engine_config
from emf.train.zero.settings import check_stage


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("idle") / "run")


def test_generate(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    idle = [
        ("text", tmp_path, "has the digits' own text encoder"),
        ("vae", tmp_path, "draws pixels, without an autoencoder"),
        ("scale", 2, "is not conditioned on BLIP3o-NEXT's image tokens"),
    ]
    for name, value, why in idle:
        given: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"^generate: --{name} has no effect: .*run {why}; leave it out$"):
            generate(("a red seven",), run, out, **given)
    assert not out.exists()


def test_evaluate(run: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    drawing = Drawing(checkpoint=run, images_only=True)
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        (r"--detector has no effect: --detections", evaluate.geneval, dict(detector="x", detections=file)),
        (r"--clip has no effect: --detections", evaluate.geneval, dict(clip="x", detections=file)),
        (r"--detections, --clip have no effect: .*leave them", evaluate.geneval, dict(clip="x", detections=file)),
        (r"--vqa has no effect: --answers", evaluate.dpg, dict(vqa="x", answers=file, questions=file)),
        (r"--skip-first-row has no effect: --images-only", evaluate.dpg, dict(skip_first_row=False)),
        (r"--weights, --half have no effect: --images-only", evaluate.hps, dict(weights=file, half=True)),
    ]
    for message, command, given in calls:
        only = "images-only" in message or "detections, " in message
        images: dict[str, Any] = dict(draw=drawing) if only else dict(images=tmp_path)
        with pytest.raises(ValueError, match=message) as error:
            command(out, **images, **given)
        assert "\n" not in str(error.value) and not out.exists()


def test_cache_and_analyze(tmp_path: Path) -> None:
    for command in (analyze.compare, analyze.discriminability):
        with pytest.raises(ValueError, match="^analyze: --dino has no effect: the digits' scenes are compared by "):
            command(("digits:random",), tmp_path / "out", dino="x")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="^cache: --scale has no effect: it pools image tokens, which need --ta-tok"):
        data.cache((str(tmp_path),), tmp_path / "vae", tmp_path / "out", scale=2)
    with pytest.raises(ValueError, match="^analyze: --split has no effect: it is of COCO"):
        read_pairs(tmp_path, "val2017")


def test_analyze_steps(tmp_path: Path) -> None:
    from analyzed import write_run

    runs = {name: write_run(tmp_path / name, seed) for seed, name in enumerate("ab")}
    with pytest.raises(ValueError, match="^analyze: --vae, --text, --dtype have no effect: the digits are drawn by"):
        run_steps(runs, tmp_path / "out", Sampling(), vae=tmp_path, text=tmp_path, dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_stage_of_zero_that_does_less(tmp_path: Path) -> None:
    """What a DeepSpeed JSON asks of ZeRO without it, and of the weights before its third stage; what is switched off
    asks for nothing."""
    file = tmp_path / "own.json"

    def planned(at: int, **own: Any) -> None:
        file.write_text(json.dumps({"zero_optimization": own}))
        engine_config(replace(digits_base(), zero=ZeroConfig(stage=at, json=file)), 1)

    offloaded = {"device": "cpu"}
    for name, value in (("overlap_comm", True), ("offload_optimizer", offloaded), ("reduce_bucket_size", 1000)):
        with pytest.raises(
            ValueError, match=rf"own.json sets zero_optimization.{name}, .* at stage 0: it needs stage 1, 2"
        ):
            planned(0, **{name: value})
        planned(2, **{name: value})
    for name, value in (("offload_param", offloaded), ("stage3_max_live_parameters", 1000)):
        with pytest.raises(ValueError, match=rf"zero_optimization.{name}, .* at stage 2: it needs stage 3"):
            planned(2, **{name: value})
        check_stage(file, {"zero_optimization": {name: value}}, 3)
    planned(0, overlap_comm=False, offload_optimizer={"device": "none"}, offload_param=None)
    planned(0, stage=1, overlap_comm=True)  # the file's own stage counts
