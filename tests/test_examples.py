"""The examples: each program runs to its end with few steps, and does what it says."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from places import ROOT

from emf_kernels import REGISTRY


@pytest.fixture(scope="module")
def own_dit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_dit", ROOT / "examples" / "own_dit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_error_falls(own_dit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    _, errors = own_dit.train(40, batch=16)
    assert sum(errors[-5:]) < 0.5 * sum(errors[:5])
    assert capsys.readouterr().out.count("mean squared error") == 7  # 1, 2, 4, 8, 16, 32 and the last


def test_a_picture_is_its_tokens_in_order(own_dit: ModuleType) -> None:
    torch.manual_seed(0)
    pictures = own_dit.image(own_dit.pictures(64, "cpu"))
    assert pictures.shape == (64, 8, 8) and pictures.min() >= -1 and pictures.max() <= 1
    # one smooth spot: beside the brightest pixel it is bright too
    rows, columns = pictures.flatten(1).argmax(1) // 8, pictures.flatten(1).argmax(1) % 8
    beside = pictures[torch.arange(64), rows, columns - 1]
    assert beside.min() > -0.4


def test_as_a_program(own_dit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    own_dit.main(["--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step    1: mean squared error") and len(lines) == 3 + 8
    with pytest.raises(SystemExit):
        own_dit.main(["--steps", "0"])


def test_it_needs_the_kernels_alone(own_dit: ModuleType) -> None:
    text = (ROOT / "examples" / "own_dit.py").read_text()
    assert "import emf\n" not in text and "from emf " not in text and "from emf." not in text
    assert set(REGISTRY) >= {"adaln", "attention", "meanflow", "path"}
