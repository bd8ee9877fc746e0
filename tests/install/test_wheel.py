"""The distribution: a wheel, built of the source distribution, is whole where the checkout is not on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("setuptools")

BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
KERNELS = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))  # as where they are not installed
import torch
from emf_kernels import Dual, adaln, launch

x = Dual(torch.randn(2, 3, 8), torch.randn(1, 3, 8))
y = adaln(x, torch.randn(2, 8), torch.randn(2, 8))
print(tuple(y.primal.shape), tuple(y.tangent.shape), launch.__file__)
"""
OTHERS = "emf,transformers,diffusers,safetensors,tyro,rich,PIL,scipy,sklearn,deepspeed,peft,matplotlib,accelerate,nvtx"
COMMANDS = """
import sys
from emf.cli.main import main

for arguments in (
    ["train", "digits", "--out", "run", "--steps", "1", "--batch-size", "4", "--run.eval-every", "0"],
    ["generate", "a red seven", "--run", "run", "--out", "pictures"],
    ["evaluate", "digits", "run", "--per-tag", "1"],
):
    sys.argv = ["emf", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
import emf
print(emf.__file__)
"""


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """What a Python prints that has nothing on its path but its own packages and the folder `path`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (
        {"PYTHONPATH": str(path)} if path else {}
    )
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `python -m build` makes it: of the unpacked source distribution."""
    root = tmp_path_factory.mktemp("wheel")
    ours = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in ("emf", "kernels"):
        shutil.copytree(ROOT / name, root / "source" / name, ignore=ours)
    for file in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "constraints.txt",
    ):
        shutil.copy(ROOT / file, root / "source" / file)
    built = python("-c", BUILD, "build_sdist", str(root), cwd=root / "source").splitlines()[-1]
    with tarfile.open(root / built) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    return root / python("-c", BUILD, "build_wheel", str(root), cwd=unpacked).splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder that the wheel is installed into, alone: its dependencies are those of this Python."""
    target = wheel.parent / "installed"
    how = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check", "--target", str(target)]
    python("-m", "pip", "install", *how, str(wheel), cwd=wheel.parent)
    return target


def test_it_holds_every_module_and_every_file_beside_them(wheel: Path) -> None:
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    own = [p for folder in ("emf", "kernels/emf_kernels") for p in (ROOT / folder).rglob("*")]
    wanted = {p.relative_to(ROOT) for p in own if p.is_file() and "__pycache__" not in p.parts}
    assert there == {str(p).removeprefix("kernels/") for p in wanted}


def test_the_kernels_ask_for_torch_triton_and_numpy_alone(installed: Path, tmp_path: Path) -> None:
    said = python("-c", KERNELS, OTHERS, cwd=tmp_path, path=installed)
    assert said == f"(2, 3, 8) (1, 3, 8) {installed / 'emf_kernels' / 'launch.py'}"


def test_train_generate_and_evaluate(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    said = python("-c", COMMANDS, cwd=tmp_path, path=installed)
    assert said.splitlines()[-1] == str(installed / "emf" / "__init__.py")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert (tmp_path / "run" / "scores.json").is_file() and (tmp_path / "run" / "samples.png").is_file()


def test_the_command_is_there(installed: Path, tmp_path: Path) -> None:
    assert "usage: emf" in python(str(installed / "bin" / "emf"), "--help", cwd=tmp_path, path=installed)
