"""The shape of the repository: which way imports point, what names are taken, how long a file may be."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

FILES = sorted(p for folder in ("emf", "kernels", "bench", "tests") for p in (ROOT / folder).rglob("*.py"))
FILES.append(ROOT / "setup.py")
SHIPPED = [p for p in FILES if p.relative_to(ROOT).parts[0] in ("emf", "kernels")]


def imported(file: Path) -> set[str]:
    """The top-level names that a file imports, at any depth of its code; a relative import is its own package's."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def importers(name: str, files: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in files if name in imported(p)]


def in_root(code: str, **environment: str) -> str:
    """What a Python prints that was started in the root, which is therefore first on its sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_is_something_to_look_at():
    assert {"emf", "kernels"} <= {p.relative_to(ROOT).parts[0] for p in SHIPPED}


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "emf_kernels"} | sys.stdlib_module_names
    strangers = {str(p.relative_to(ROOT)): imported(p) - allowed for p in SHIPPED if ROOT / "kernels" in p.parents}
    assert not {file: names for file, names in strangers.items() if names}


@pytest.mark.parametrize("name", ["bench", "tests"])
def test_nothing_shipped_imports(name):
    assert importers(name, SHIPPED) == []


def test_only_zero_imports_deepspeed():
    assert {str(Path(file).parent) for file in importers("deepspeed", FILES)} == {"emf/train/zero"}


def test_nobody_imports_kernels():
    assert importers("kernels", FILES) == []


def test_no_file_without_a_subject():
    banned = {"utils", "util", "common", "misc"}
    assert [str(p.relative_to(ROOT)) for p in FILES if banned & {p.stem, *p.relative_to(ROOT).parts[:-1]}] == []


def test_files_are_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SHIPPED}
    assert {file: lines for file, lines in lengths.items() if lines > 400} == {}


def test_emf_kernels_imports_from_the_root():
    printed = in_root("from emf_kernels import Dual, Op; import emf_kernels; print(emf_kernels.__file__)")
    assert Path(printed) == ROOT / "kernels" / "emf_kernels" / "__init__.py"


def test_another_distribution_keeps_the_name_kernels(tmp_path):
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    assert Path(in_root("import kernels; print(kernels.__file__)", PYTHONPATH=str(tmp_path))) == package
