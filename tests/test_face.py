"""`import emf`: what is public resolves, nothing heavy is imported before it is used, and the examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import emf

HEAVY = ("torch", "transformers", "diffusers", "deepspeed", "sklearn", "matplotlib", "tyro", "triton")

EXAMPLE = """
from dataclasses import replace

import emf

out = "run"
config = emf.RECIPES["digits"]()
config = replace(config, steps=2, batch_size=4, run=replace(config.run, eval_every=0))
emf.train(config, out)
emf.train(config, "another")  # a process trains as often as it likes
config, network = emf.load(out)
sampler = emf.Sampler.load(out)
(picture,) = sampler.pictures(["a red seven"], steps=2)
emf.export(out, "export")
print(picture.size, config.steps, network.transformer.config.dual_time)
"""


def python(code: str, folder: Path) -> str:
    """What a Python prints that was started in a folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | dict(PYTHONPATH=path)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported(code: str, folder: Path) -> set[str]:
    """The heavy packages that some code imports."""
    print_them = f"\nimport sys\nprint('imported', *[name for name in {HEAVY!r} if name in sys.modules])"
    return set(python(code + print_them, folder).splitlines()[-1].split()[1:])


@pytest.mark.parametrize("name", emf.__all__)
def test_what_is_public_resolves(name: str) -> None:
    for needed in ("deepspeed", "diffusers"):
        pytest.importorskip(needed)
    assert getattr(emf, name) is not None and name in dir(emf)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        emf.trian  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import emf",
        "import emf; emf.Config; emf.recipes; emf.RECIPES['digits'](); emf.RECIPES['sana-1.5-1.6b']()",
        "import emf; assert callable(emf.train)",
        "import emf.train; assert callable(emf.train)",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str, tmp_path: Path) -> None:
    assert imported(code, tmp_path) == set()


@pytest.mark.parametrize(
    "code",
    [
        "import emf.train.takeover, emf; assert emf.train.takeover",
        "import emf; emf.train; import emf.train.takeover; assert emf.train.takeover",
        "from emf import train; import emf; assert train is emf.train",
    ],
)
def test_train_is_a_package_and_can_be_called(code: str, tmp_path: Path) -> None:
    assert python(code + "\nprint(callable(emf.train))", tmp_path).strip() == "True"


def test_ten_lines_train_and_sample(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    said = python(EXAMPLE, tmp_path)
    assert (tmp_path / "export" / "model_index.json").is_file()
    assert said.splitlines()[-1] == "(18, 18) 2 True"


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    """The first block of Python after the words "In Python"."""
    pytest.importorskip("deepspeed")
    text = (ROOT / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", text[text.find("In Python") :], re.DOTALL)
    assert "In Python" in text and found is not None, "the README shows no example"
    python(found[1], tmp_path)
