"""The shape of the repository: which way imports point, what names are taken, how long a file or a function's list of
parameters may be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

FOLDERS = ("emf", "kernels", "bench", "examples", "tests")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
SHIPPED = [p for p in FILES if p.relative_to(ROOT).parts[0] in ("emf", "kernels")]

ROOMS = [
    ["emf_kernels"],
    ["emf.errors", "emf.files", "emf.device", "emf.limits"],
    ["emf.show"],
    ["emf.flow", "emf.flow_config", "emf.matching", "emf.model"],
    ["emf.conditioning"],
    ["emf.data"],
    ["emf.config", "emf.recipes", "emf.arguments", "emf.idle"],
    ["emf.network"],
    ["emf.weights"],
    ["emf.sample", "emf.pipeline"],
    ["emf.evaluate"],
    ["emf.train"],
    ["emf.analyze"],
    ["emf.paper"],
    ["emf.app"],
    ["emf.cli"],
    ["emf"],
    ["bench", "examples"],
    ["tests"],
]
"""From low to high. A file imports from its own room and from lower ones; `emf` itself is the public face and the
entry."""


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_of(file: Path) -> str:
    """A file's name as it is imported: tests lie on the path by themselves."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p): p for p in FILES}
HELPERS = {p.stem: p for p in FILES if p.parent == ROOT / "tests"}


def imports(file: Path) -> Iterator[Path]:
    """The files of the repository that a file imports at any depth of its code, in functions and under TYPE_CHECKING
    too."""
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    for node in ast.walk(tree(file)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else (node.module or "")
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        for name in names:
            found = MODULES.get(name) or (HELPERS.get(name) if file.is_relative_to(ROOT / "tests") else None)
            if found is not None and found != file:
                yield found


GRAPH = {file: set(imports(file)) for file in FILES}


def strangers(file: Path) -> set[str]:
    """The top-level names that a file imports, at any depth of its code; a relative import is its own package's."""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def importers(name: str, files: list[Path]) -> list[str]:
    return [short(p) for p in files if name in strangers(p)]


def room(file: Path) -> int:
    """The height of a file's room, by the longest name in ROOMS that its own begins with."""
    name, best = module_of(file), ("", 0)
    for height, names in enumerate(ROOMS):
        for start in names:
            if (name == start or name.startswith(start + ".")) and len(start) > len(best[0]):
                best = (start, height)
    assert best[0] and (best[0] != "emf" or name in ("emf", "emf.__main__")), f"{short(file)} lies in no room"
    return best[1]


def circles(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """The sets of files that import each other, over any number of steps."""

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        waiting = list(graph[start])
        while waiting:
            file = waiting.pop()
            if file not in seen:
                seen.add(file)
                waiting += graph[file]
        return seen

    reach = {file: reached(file) for file in graph}
    found: list[set[Path]] = []
    for file in graph:
        if file in reach[file] and not any(file in circle for circle in found):
            found.append({other for other in reach[file] if file in reach[other]})
    return found


def positional(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function takes by position, without self and cls."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def in_root(code: str, **environment: str) -> str:
    """What a Python prints that was started in the root, which is therefore first on its sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_is_something_to_look_at() -> None:
    assert {"emf", "kernels"} <= {p.relative_to(ROOT).parts[0] for p in SHIPPED}
    assert MODULES["emf.config"] in GRAPH[MODULES["emf.recipes"]]
    assert HELPERS["places"] in GRAPH[Path(__file__)]


def test_what_the_checks_would_find(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    assert circles({a: {b}, b: {c}, c: set()}) == []
    assert circles({a: {b}, b: {a}, c: {a}}) == [{a, b}]
    function = ast.parse("def f(self, a, b, /, c, *rest, d, **more): ...").body[0]
    assert isinstance(function, ast.FunctionDef) and positional(function) == 3


def test_no_imports_in_a_circle() -> None:
    assert [sorted(map(short, circle)) for circle in circles(GRAPH)] == []


def test_imports_point_downwards() -> None:
    upwards = {f"{short(a)} -> {short(b)}" for a, found in GRAPH.items() for b in found if room(b) > room(a)}
    assert sorted(upwards) == []


def test_nothing_imports_the_commands_but_the_entries() -> None:
    outside = {
        a for a, found in GRAPH.items() if a in SHIPPED and any(room(b) == room(MODULES["emf.cli"]) for b in found)
    }
    entries = {ROOT / "emf" / "__main__.py"}
    others = {short(a) for a in outside if ROOT / "emf" / "cli" not in a.parents and a not in entries}
    assert sorted(others) == []


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "emf_kernels"} | sys.stdlib_module_names
    found = {short(p): strangers(p) - allowed for p in SHIPPED if ROOT / "kernels" in p.parents}
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize("name", ["bench", "tests"])
def test_nothing_shipped_imports(name: str) -> None:
    assert importers(name, SHIPPED) == []


def test_only_zero_imports_deepspeed() -> None:
    assert {str(Path(file).parent) for file in importers("deepspeed", [*FILES, ROOT / "setup.py"])} == {
        "emf/train/zero"
    }


def test_a_bench_ends_as_any_command() -> None:
    """An error in one line, and after SIGTERM nothing that it began."""
    ends = {short(p): p.read_text().partition('if __name__ == "__main__":\n')[2] for p in FILES if "bench" in p.parts}
    assert {file for file, end in ends.items() if end and "with as_command():\n" not in end} == set()


def test_nobody_imports_kernels() -> None:
    assert importers("kernels", [*FILES, ROOT / "setup.py"]) == []


def test_the_linter_refuses_an_import_of_kernels(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache", "-"]
    done = subprocess.run(command, input="import kernels\n\nkernels\n", capture_output=True, text=True, cwd=tmp_path)
    assert "TID251" in done.stdout, done.stdout + done.stderr


def test_no_file_without_a_subject() -> None:
    banned = {"utils", "util", "common", "misc"}
    assert [short(p) for p in FILES if banned & {p.stem, *p.relative_to(ROOT).parts[:-1]}] == []


def test_no_two_files_of_one_name() -> None:
    names = Counter(p.name for p in [*FILES, *ROOT.glob("*.py")])
    several = {name for name, n in names.items() if n > 1} - {"__init__.py", "__main__.py"}
    assert sorted(short(p) for p in FILES if p.name in several) == []


def test_files_are_short() -> None:
    lengths = {short(p): len(p.read_text().splitlines()) for p in FILES}
    assert {file: lines for file, lines in lengths.items() if lines > 400} == {}


MANY_BY_POSITION = {"emf/sample/emf_pipeline.py __call__"}
"""A pipeline of diffusers' is called with its arguments by position, as those of diffusers are."""


def test_functions_take_few_arguments_by_position() -> None:
    """At most six. Kernels are apart, and tests, whose arguments pytest gives them by name."""
    found = []
    for file in FILES:
        if ROOT / "kernels" in file.parents:
            continue
        for node in ast.walk(tree(file)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("test_"):
                continue
            if positional(node) > 6:
                found.append(f"{short(file)} {node.name}")
    assert sorted(found) == sorted(MANY_BY_POSITION)


def test_emf_kernels_imports_from_the_root() -> None:
    printed = in_root("from emf_kernels import Dual, Op; import emf_kernels; print(emf_kernels.__file__)")
    assert Path(printed) == ROOT / "kernels" / "emf_kernels" / "__init__.py"


def test_another_distribution_keeps_the_name_kernels(tmp_path: Path) -> None:
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    assert Path(in_root("import kernels; print(kernels.__file__)", PYTHONPATH=str(tmp_path))) == package
