"""What a run says: when it starts, at every row of its log, and to the monitors."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import train

pytest.importorskip("deepspeed")

from emf.data.feed import Digits
from emf.recipes import digits, from_file
from emf.train.batch import make_batch
from emf.train.log import in_words
from emf.train.objective import losses
from emf.train.opening import in_short, opening
from emf.weights.start import started


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_row_shows_what_says_something() -> None:
    row = dict(step=3, loss=1.0, error=0.25, it_s=2.5, samples_s=20.0, tflops=0.0123, grad_norm=0.5)
    assert in_words(row) == "error 0.2500  gradient 0.5  2.5 it/s  20 samples/s  12.3 GFLOP/s"
    further = row | dict(tflops=345.6, mfu=0.349, lm_loss=5.5, grad_norm=None)
    want = "error 0.2500  language model 5.5000  2.5 it/s  20 samples/s  346 TFLOP/s  MFU 35%"
    assert in_words(further) == want


def test_a_validation_of_what_is_not_saved_is_told() -> None:
    engine = types.SimpleNamespace(parameters={}, trainable={}, saved=set(), device=torch.device("cpu"), world=1)
    vars(engine).update(dtype=torch.float32, stage=0, micro_batch=1, parameters={"w": torch.zeros(3)})
    for every, told in ((30, True), (100, False), (200, False), (0, False)):
        config = replace(digits(), run=replace(digits().run, save_every=100, eval_every=every))
        lines = [line for line in opening(config, engine, None, Path("run")) if line.startswith("validation: every 30")]
        assert len(lines) == told


def test_numbers_of_parameters() -> None:
    assert [in_short(n) for n in (5120, 107_300_000, 1_604_641_952)] == ["5,120", "107M", "1.6B"]


def test_the_gradients_norm_is_the_whole_gradients(straight: Path) -> None:
    """Of the first step, by autograd alone and before it is clipped."""
    config = from_file(straight / "config.json")
    network = started(config)
    losses(config, network, make_batch(config, Digits(config.batches), 0, 0, 1), 0.0).loss.mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    assert rows(straight)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_a_run_says_what_it_is(stage: int, dtype: str, recipe: list[str], straight: Path, tmp_path: Path) -> None:
    """The size of a checkpoint is what it takes; the norm of the gradient is the same at every stage."""
    run = tmp_path / "run"
    flags = ["--zero.stage", str(stage), "--zero.dtype", dtype, "--zero.accumulation", "2", "--steps", "3"]
    result = train(tmp_path, *recipe, "--out", str(run), *flags, ranks=2 if stage else 1)
    assert result.code == 0, result.text
    ranks = "2 ranks" if stage else "1 rank"
    micro = 2 if stage else 4
    said = result.text
    assert re.search(r"digits: [\d,]+ parameters, [\d,]+ \(\d+%\) of them trained, in", said)
    assert f"of them trained, in {dtype} on {ranks} of CPU, ZeRO {stage}\n" in said
    assert "data: the digits, drawn anew at every step" in said
    assert f"length: 3 steps, 1 of them warm-up, of 8 samples: {ranks} x 2 micro-batches x {micro}" in said
    told = re.search(r"checkpoints: ([\d.]+) ([kM])B each, the last 2 kept, every 3 steps in ", said)
    assert told is not None, said
    taken = sum(p.stat().st_size for p in (run / "checkpoints/step_0000003").rglob("*") if p.is_file())
    assert float(told[1]) * {"k": 1e3, "M": 1e6}[told[2]] == pytest.approx(taken, rel=0.15)
    got, want = rows(run), rows(straight)
    assert got[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=1e-4 if dtype == "float32" else 0.05)
    assert all(row["samples_s"] == pytest.approx(8 * row["it_s"]) and "lm_loss" not in row for row in got)
    assert "loss 1.0" not in said and "0.0 TFLOP/s" not in said


def test_wall_time_goes_on_where_a_run_is_resumed(recipe: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps in ("3", "6"):
        result = train(tmp_path, *recipe, "--out", str(run), "--steps", steps, "--resume", "True")
        assert result.code == 0, result.text
    walls = [row["wall_s"] for row in rows(run)]
    assert walls == sorted(walls) and 0 < walls[0] < walls[2] < walls[3]


def _fake_packages() -> None:
    """tensorboard and wandb that print what they are given."""
    import importlib.util

    from torch import utils

    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: object() if name in ("tensorboard", "wandb") else find(name, *a)  # type: ignore[assignment,return-value]

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            print("board", Path(log_dir).name, flush=True)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            print("board", tag, step, flush=True)

        def add_image(self, tag: str, picture: Any, step: int, dataformats: str) -> None:
            print("board", tag, step, picture.shape, picture.dtype, dataformats, flush=True)

        def flush(self) -> None:
            pass

    board: Any = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    sys.modules["tensorboard"] = types.ModuleType("tensorboard")
    sys.modules["torch.utils.tensorboard"] = utils.tensorboard = board
    wandb: Any = types.ModuleType("wandb")
    wandb.init = lambda **how: print("wandb", how["project"], flush=True)
    wandb.Image = lambda picture, caption: (picture.shape, caption)
    wandb.log = lambda data, step, commit=None: print("wandb", step, data, flush=True)
    sys.modules["wandb"] = wandb


def test_pictures_and_scores_go_to_the_monitors(recipe: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red seven\n\ntwo blue threes\n")
    flags = ["--steps", "2", "--run.eval-every", "2", "--run.eval-prompts", "1"]
    flags += ["--run.monitor", "tensorboard", "wandb"]
    flags += ["--run.prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
    result = train(tmp_path, *recipe, *flags, before=_fake_packages)
    assert result.code == 0, result.text
    lines = result.text.splitlines()
    assert "board tensorboard" in lines and "wandb emf" in lines
    assert "board samples/1 two blue threes/EMA 4 2 (18, 18, 3) uint8 HWC" in lines
    assert "wandb 2 {'samples/raw 1': [((18, 18, 3), 'a red seven'), ((18, 18, 3), 'two blue threes')]}" in lines
    assert "board train/grad_norm 1" in lines and "board score/4 steps 2" in lines
    assert len([line for line in lines if line.startswith("board samples/")]) == 2 * 2 * 3
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["run"]["prompts"] == ["a red seven", "two blue threes"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_monitor_without_its_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from emf.train.zero import check_monitors

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = digits()
    with pytest.raises(ValueError, match=f"config: run.monitor {name} needs the package {name}: pip install {name}"):
        check_monitors(replace(config, run=replace(config.run, monitor=(name,))))  # type: ignore[arg-type]
