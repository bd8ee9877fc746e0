"""Flow-matching backbones at few steps: scored, drawn once, gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analyzed import WORDS, write_models, write_run
from PIL import Image
from same_pictures import assert_same_pictures

from emf.analyze.choices import Sampling
from emf.analyze.names import parse_runs
from emf.analyze.steps import psnr, run_steps
from emf.config import ConditionConfig
from emf.evaluate.digits_scorer import Scorer
from emf.files import alone
from emf.sample.sampler import Sampler


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def digit_runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    return [f"{n}={write_run(root / n, i)}" for i, n in enumerate(("one", "two"))]


def test_steps_on_the_digits(digit_runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.fit()
    monkeypatch.setattr(Scorer, "fit", lambda: scorer)  # once is enough
    sampling = Sampling((1, 2, 3), per_tag=1, batch=16)
    panels = run_steps(parse_runs(digit_runs), tmp_path / "out", sampling)
    assert list(panels) == ["score", "PSNR, dB"] and list(panels["score"]) == ["one", "two"]
    assert all(0 <= x.low <= x.mean <= x.high <= 1 for line in panels["score"].values() for x in line.values())
    close = panels["PSNR, dB"]["one"]
    assert list(close) == [1, 2] and close[1].mean < close[2].mean < 100  # nearer with every step
    table = (tmp_path / "out" / "results.md").read_text()
    assert "PSNR, dB, to its own 3 steps" in table and "| GenEval | 0.46 | 0.86 | 0.91 |" in table
    with Image.open(tmp_path / "out" / "samples.png") as image:
        assert image.width > 300
    assert (tmp_path / "out" / "steps.png").is_file()
    with pytest.raises(ValueError, match="other settings"):
        run_steps(parse_runs(digit_runs), tmp_path / "out", Sampling((1, 2), per_tag=1))
    # all images are there, and are not drawn again, wherever the command is called from
    monkeypatch.setattr(Sampler, "images", None)
    folder = Path(digit_runs[0].partition("=")[2]).parent
    monkeypatch.chdir(folder)
    with alone(tmp_path / "out"), pytest.raises(ValueError, match="another process is at work in .*out; wait for it"):
        run_steps(parse_runs(digit_runs), tmp_path / "out", sampling)
    assert run_steps(parse_runs(["one=one", f"two=../{folder.name}/two"]), tmp_path / "out", sampling) == panels
    assert run_steps(parse_runs(digit_runs), tmp_path / "out", sampling) == panels


def test_steps_elsewhere_go_on_where_they_were_stopped(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition = ConditionConfig("clip", models / "clip")
    runs = {n: write_run(tmp_path / n, i, condition=condition, width=16, size=8) for i, n in enumerate("ab")}
    prompts, out, sampling = tmp_path / "p.txt", tmp_path / "out", Sampling((1, 3), batch=2)
    prompts.write_text("\n".join(WORDS[:3]))
    calls, real = [], Sampler.images

    def some(*arguments: Any, **settings: Any) -> Any:
        calls.append(len(arguments[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(Sampler, "images", some)
    with pytest.raises(KeyboardInterrupt):
        run_steps(runs, out, sampling, prompts=prompts)
    kept = {p: p.read_bytes() for p in out.rglob("images/**/*.png")}
    assert len(kept) == 5  # of three calls, two of them with two images
    before = {p: np.asarray(Image.open(p)) for p in kept}
    again = next(iter(kept))
    again.unlink()
    panels = run_steps(runs, out, sampling, prompts=prompts)
    assert sum(calls[4:]) == 12 - 4  # those that were there are not drawn again
    assert all(path.read_bytes() == data for path, data in kept.items() if path != again)
    assert_same_pictures([Image.open(again)], [before[again]])  # in a batch of its own this time
    with pytest.raises(ValueError, match=r"other settings \(text\)"):  # another text encoder gives other images
        run_steps(runs, out, sampling, prompts=prompts, text=models / "clip")
    assert list(panels) == ["PSNR, dB"]
    calls[:] = [0] * 9
    named = run_steps(runs, tmp_path / "other", sampling, prompts=prompts, dino=str(models / "dinov3"))
    psnrs = [[x.mean for line in made["PSNR, dB"].values() for x in line.values()] for made in (named, panels)]
    assert psnrs[0] == pytest.approx(psnrs[1], abs=0.1) and set(named["cosine of DINO features"]) == {"a", "b"}
    assert all(-1 <= x.mean <= 1 for x in named["cosine of DINO features"]["a"].values())


def test_psnr_by_hand() -> None:
    a, b = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert psnr(a, b) == pytest.approx(20 * np.log10(5)) and psnr(a, a) == 100
