"""The suite's quick part with other versions of Python, torch and Triton: `make compat`.

Each pair has an environment of its own under .compat/, which stays there; a pair whose tests were run at this commit is
not run again. What came of it is renewed, row by row, in the table of docs/compat.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from emf.errors import as_command
from emf.files import write_json, write_text

ROOT = Path(__file__).parent.parent
PLACE, PAGE = ROOT / ".compat", ROOT / "docs" / "compat.md"
PAIRS = ("3.11:2.11.0", "3.13:2.15.0")
"""Python and torch, the oldest and the newest that are supported; a torch brings the Triton that it was made with."""
QUICK = (
    "tests/kernels/test_kernels.py::test_torch_func_jvp_of_a_kernel",
    "tests/kernels/test_kernels.py::test_forward_mode_inside_torch_compile_raises",
    "tests/kernels/test_attention.py::test_in_the_signature_of_sdpa",
    "tests/kernels/test_hazards.py::test_what_only_the_compiler_does",
    "tests/kernels/test_nan.py",
    "tests/kernels/test_ops.py::test_every_op_compiles_with_duals",
    "tests/kernels/test_transforms.py::test_a_first_derivative_of_duals",
    "tests/kernels/test_transforms.py::test_checkpoints",
    "tests/model/test_model.py",
    "tests/test_flow.py",
    "tests/weights/test_tensors.py",
    "tests/sample/test_sampler.py",
    "tests/train/test_train.py::test_what_a_run_writes",
)
"""What another version can break: kernels in the interpreter and by the compiler, torch's transforms and torch.compile,
the model, the method, weights, the sampler, and training under DeepSpeed."""
OWN = ("torch", "triton", "numpy", "setuptools")
"""What a torch decides: the versions that constraints.txt has of it are of another torch."""
HEADS = ["Python", "torch", "Triton", "numpy", "passed", "failed", "skipped", "date, commit"]


def interpreter(version: str) -> str:
    """A Python of this version, of the PATH or of pyenv. Raises ValueError where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))]
    for path in filter(None, found):
        said = subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True)  # a shim may lead nowhere
        if said.returncode == 0:
            return path
    raise ValueError(f"compat: no python{version} on the PATH or in {pyenv}; install it, or name another pair")


def constraints(text: str, torch: str) -> str:
    """constraints.txt for another torch."""
    kept = [line for line in text.splitlines() if line.split("==")[0] not in OWN]
    # the interpreter of Triton 3.6, which comes with torch 2.11, takes no numpy from 2.4 on
    early = ["numpy<2.4"] if tuple(map(int, torch.split(".")[:2])) < (2, 12) else []
    return "\n".join([*kept, *early, f"torch=={torch}", ""])


def installed(python: str, torch: str) -> Path:
    """The Python of the pair's environment, made where it is not whole. Raises ValueError where pip fails."""
    place = PLACE / f"python{python}-torch{torch}"
    wanted = constraints((ROOT / "constraints.txt").read_text(), torch)
    digest = hashlib.sha256((wanted + (ROOT / "setup.py").read_text()).encode()).hexdigest()
    mark, own = place / "installed", place / "bin" / "python"
    if mark.is_file() and mark.read_text() == digest:
        return own
    mark.unlink(missing_ok=True)
    if not own.exists() and subprocess.run([interpreter(python), "-m", "venv", str(place)]).returncode:
        shutil.rmtree(place, ignore_errors=True)  # a half of one would be taken for whole
        raise ValueError(f"compat: python{python} made no environment in {place}; its message is above")
    (place / "constraints.txt").write_text(wanted)
    print(f"compat: installing into {place.relative_to(ROOT)}; a torch is several GB", flush=True)
    command = [str(own), "-m", "pip", "install", "-c", str(place / "constraints.txt"), "-e", ".[test]"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"compat: pip found no environment of Python {python} and torch {torch}; its message is above")
    mark.write_text(digest)
    return own


def versions(own: Path) -> dict[str, str]:
    """Of Python, torch, Triton and numpy in an environment. Raises ValueError where one of them is missing."""
    code = (
        "import json, platform, importlib.metadata as m;"
        "print(json.dumps(dict(Python=platform.python_version(), **{n: m.version(n) for n in "
        "('torch', 'triton', 'numpy')})))"
    )
    said = subprocess.run([own, "-c", code], capture_output=True, text=True)
    if said.returncode:
        lines = said.stderr.strip().splitlines() or [f"exit status {said.returncode}"]
        raise ValueError(f"compat: {own} does not tell its versions ({lines[-1]}); remove {own.parent.parent}")
    return dict(json.loads(said.stdout))


def counts(file: Path) -> dict[str, int]:
    """Of pytest's XML: how many tests passed, failed (errors too) and were skipped."""
    suites = list(ElementTree.parse(file).iter("testsuite"))
    every, failed, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites for key in keys)
        for keys in (["tests"], ["failures", "errors"], ["skipped"])
    )
    return dict(passed=every - failed - skipped, failed=failed, skipped=skipped)


def commit() -> str:
    """The commit of this tree, with a + where files were changed since, but for the page, which this writes; "" outside
    git."""
    others = ["--", ".", f":(exclude){PAGE.relative_to(ROOT)}"]
    said = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", *others])
    ]
    return said[0] + "+" * bool(said[1])


def tried(pair: str, now: str) -> dict[str, Any]:
    """The pair's row, run where it was not at the commit `now`. Raises ValueError where there is none to be had."""
    python, torch = pair.split(":")
    own = installed(python, torch)
    place = own.parent.parent
    record = place / "result.json"
    if record.is_file() and now and not now.endswith("+"):
        known = dict(json.loads(record.read_text()))
        if known["commit"] == now:
            print(f"compat: {pair} was run at {now}")
            return known
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= dict(OMP_NUM_THREADS="1", PATH=f"{own.parent}{os.pathsep}{os.environ['PATH']}")
    print(f"compat: the quick part with Python {python} and torch {torch}", flush=True)
    report, start = place / "tests.xml", time.monotonic()
    report.unlink(missing_ok=True)
    command = [str(own), "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", f"--junitxml={report}", *QUICK]
    subprocess.run(command, cwd=ROOT, env=environment)
    if not report.is_file():
        raise ValueError(f"compat: pytest did not end with Python {python} and torch {torch}; its message is above")
    row = versions(own) | counts(report) | dict(commit=now, date=datetime.now(UTC).strftime("%Y-%m-%d"))
    write_json(record, row | dict(seconds=round(time.monotonic() - start)))
    return row


def renewed(page: str, row: dict[str, Any]) -> str:
    """The page with this row in its table, in the place of that of the same Python and torch."""
    head, lines, tail = re.split(r"(?<=<!-- compat -->\n)|(?=<!-- /compat -->)", page)
    first = [str(row[key]) for key in ("Python", "torch", "triton", "numpy", "passed", "failed", "skipped")]
    new = "| " + " | ".join([*first, f"{row['date']}, {row['commit']}"]) + " |"
    kept = [line for line in lines.splitlines()[2:] if line.split(" | ")[:2] != new.split(" | ")[:2]]
    top = ["| " + " | ".join(HEADS) + " |", "|" + "--|" * len(HEADS)]
    return head + "\n".join([*top, *sorted([*kept, new])]) + "\n" + tail


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compat", description=__doc__)
    parser.add_argument("pairs", nargs="*", default=PAIRS, help="PYTHON:TORCH, as in 3.12:2.13.0")
    pairs, now, bad = parser.parse_args().pairs, commit(), 0
    for pair in pairs:
        try:
            if not re.fullmatch(r"\d+\.\d+:\d+\.\d+\.\d+", pair):
                raise ValueError(f"compat: {pair!r} is no pair; expected PYTHON:TORCH, as in 3.12:2.13.0")
            row = tried(pair, now)
        except ValueError as error:  # the other pairs are run all the same
            print(f"error: {error}", file=sys.stderr)
            bad = 2
            continue
        write_text(PAGE, renewed(PAGE.read_text(), row))
        bad = bad or int(row["failed"] > 0)
    print(f"compat: the table is in {PAGE.relative_to(ROOT)}")
    sys.exit(bad)


if __name__ == "__main__":
    with as_command():
        main()
