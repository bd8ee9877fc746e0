"""Validation by the network that is trained: it leaves training as it was, and its pictures are the same at any ZeRO
stage and number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import assert_same_training, averaged, metrics, train

pytest.importorskip("deepspeed")
import torch

CAPTIONS = ["a red seven", "two blue threes", "a four"]
PROMPTS = ["--run.eval-every", "3", "--run.eval-prompts", "1", "--run.prompts", *CAPTIONS]


def pictures(run: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in sorted((run / "samples").iterdir())])


@pytest.fixture(scope="module")
def validated(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    result = train(folder, *recipe, "--out", str(folder / "run"), *PROMPTS)
    assert result.code == 0, result.text
    return folder / "run"


def test_training_goes_on_bit_for_bit(validated: Path, straight: Path) -> None:
    assert metrics(validated) == metrics(straight)
    got, want = averaged(validated), averaged(straight)
    assert all(torch.equal(value, want[name]) for name, value in got.items())


def test_the_pictures_are_the_averages(validated: Path) -> None:
    """What emf generate draws of the checkpoint is on the sheet."""
    from emf.sample.sampler import Sampler, to_uint8

    sampler = Sampler.load(validated, device="cpu")
    want = to_uint8(sampler.images(CAPTIONS, steps=2))
    sheet = Image.open(validated / "samples" / "step_0000006.png").convert("RGB")
    drawn = np.asarray(sheet).astype(int)
    for picture in want:  # enlarged without smoothing, so that its rows of pixels are on the sheet
        large = np.asarray(Image.fromarray(picture).resize((176, 176), Image.Resampling.NEAREST)).astype(int)
        corners = zip((0, 175), (large[0, 0], large[-1, -1]), strict=True)
        fits = [abs(drawn[k : k - 175 or None, k : k - 175 or None] - pixel).max(2) <= 1 for k, pixel in corners]
        places = np.argwhere(fits[0] & fits[1])
        found = [(y, x) for y, x in places if abs(drawn[y : y + 176, x : x + 176] - large).max() <= 1]
        assert found


@pytest.mark.parametrize(
    ("stage", "dtype", "flags"),
    [
        (2, "float32", ["--zero.offload", "True", "--optim.ema-cpu", "True"]),
        (3, "float32", []),
        (0, "bfloat16", []),
    ],
)
def test_ranks_and_stages_draw_the_same(
    stage: int, dtype: str, flags: list[str], recipe: list[str], validated: Path, base: Path, tmp_path: Path
) -> None:
    """Two ranks share three captions: one of them draws the last again, for under ZeRO 3 they go together. In bfloat16
    training without validation is the run to compare with."""
    common, ranks = [*recipe, *flags, "--zero.stage", str(stage), "--zero.dtype", dtype], 2 if stage else 1
    result = train(tmp_path, *common, "--out", str(tmp_path / "run"), *PROMPTS, ranks=ranks)
    assert result.code == 0, result.text
    got, want = pictures(tmp_path / "run"), pictures(validated)
    assert got.shape == want.shape and abs(got - want).max() <= (3 if dtype == "float32" else 60)
    scores = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in scores] == [3, 6] and scores[0]["overall"].keys() == {"1", "2", "4"}
    if dtype == "float32":
        assert_same_training(tmp_path / "run", validated, base)
    else:
        plain = train(tmp_path, *common, "--out", str(tmp_path / "plain"), ranks=ranks)
        assert plain.code == 0, plain.text
        assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")
