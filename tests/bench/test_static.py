"""What the compiler makes of the kernels (bench/static.py): as recorded, and within what a Hopper has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from places import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from emf_kernels import REGISTRY, launch

KEYS = {"op", "kernel", "case", "arch", "registers", "spill_bytes", "shared_bytes", "hgmma", "hmma", "ldg128", "config"}


def record(arch: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "profiles" / "static" / f"{arch}.json").read_text())


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """(architecture, every kernel, compiled for it now)."""
    command = f"import json; from bench.static import rows; print(json.dumps(list(rows('{request.param}'))))"
    return request.param, json.loads(python(command))


def asked() -> list[tuple[str, str, dict[str, int]]]:
    """(kernel, shape class, default) of everything that the bench cases ask launch.py for."""
    command = (
        "import json; from bench.static import bench_cases, configured, launches\n"
        "with configured('none') as asked: [launches(op, case) for op, case in bench_cases([])]\n"
        "print(json.dumps([[*k[1:], c] for k, c in asked.items()]))"
    )
    return json.loads(python(command))


def python(command: str) -> str:
    """What a process prints in which kernels are compiled: they are interpreted in this one."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["kernel"], row["case"]


def test_records_are_of_the_kernels_that_there_are(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    """`make static` renews them."""
    arch, now = compiled
    rows = record(arch)
    assert all(row.keys() >= KEYS and row["arch"] == arch for row in rows)
    assert [(name(row), row["config"]) for row in rows] == [(name(row), row["config"]) for row in now]
    assert {row["op"] for row in rows} == {op.name for op in REGISTRY.values() if op.triton}


def test_what_the_compiler_makes_of_them(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    arch, now = compiled
    for row in now:
        # the stack of a sinusoid is the range reduction of large arguments, not a spill
        assert row["spill_bytes"] == 0 or row["op"] == "time_embedding", row
        assert row["shared_bytes"] <= (163 if arch == "sm_80" else 227) * 1024, row  # what a block may have
        if row["op"] == "attention" and arch == "sm_90":
            assert row["hgmma"] and not row["hmma"], row
        elif row["op"] == "glumbconv":
            assert not row["shared_bytes"], row  # two channels a thread: a warp loads whole lines
        elif row["op"] not in ("time_embedding", "linear_attention"):
            assert row["ldg128"], row


def test_configurations_answer_what_the_bench_cases_ask() -> None:
    """`make tune` renews them: a row for each kernel and shape class, with the parameters that the kernel has."""
    want = {(kernel, shape): default.keys() for kernel, shape, default in asked()}
    assert {file.stem for file in launch.CONFIGS.glob("*.json")} >= {"sm_80", "sm_90", "sm_100"}
    for file in launch.CONFIGS.glob("*.json"):
        rows = json.loads(file.read_text())
        found = {launch.key("", row["kernel"], row["shape"])[1:]: row["config"].keys() for row in rows}
        assert found == want, f"{file.name} is not of these kernels"
        assert {row["found"] for row in rows} <= {"static", "sweep"}


def test_a_launch_is_looked_up_by_chip_then_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    default, rows = dict(num_warps=1), json.loads((launch.CONFIGS / "sm_90.json").read_text())
    recorded = next(row for row in rows if row["kernel"] == "adaln._fwd")
    ask = lambda x: launch.configuration("adaln._fwd", x, default, C=4096)  # noqa: E731
    monkeypatch.setattr(launch, "chips", lambda index: ("a-chip", "sm_90"))
    monkeypatch.setattr(launch, "_found", launch._looked_up.__wrapped__)  # which remembers what it found
    with FakeTensorMode():
        half = torch.empty(1, device="cuda", dtype=torch.bfloat16)
        assert ask(half) == recorded["config"]
        assert ask(half.float()) == default  # another shape class
        assert ask(torch.empty(1)) == default  # the interpreter
        own = {launch.key("a-chip", "adaln._fwd", recorded["shape"]): dict(num_warps=16)}
        monkeypatch.setattr(launch, "CONFIGURATIONS", launch.CONFIGURATIONS | own)
        assert ask(half) == dict(num_warps=16)
