"""What the compiler makes of the kernels (bench/static.py): as recorded, and within what each chip has."""

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

from bench.bounds import UNITS
from bench.chips import CHIPS, TRUST
from emf_kernels import REGISTRY, launch

KEYS = {"op", "kernel", "case", "arch", "launch", "registers", "spill_bytes", "shared_bytes", "hgmma", "hmma"}
KEYS |= {"ldg128", "config", "calls", "bounds_us", "binding", "floor_us", "simulated_us", "occupancy", "waves"}
KEYS |= {"instructions"}


def record(arch: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "profiles" / "static" / f"{arch}.json").read_text())


@pytest.fixture(scope="module")
def launched() -> dict[str, list[dict[str, Any]]]:
    """Every launch of the bench cases by architecture, with its configuration; nothing is compiled."""
    command = (
        "import json; from bench.static import ARCHS, bench_cases, config, named\n"
        "every = lambda arch: [n | {'config': config(one)} for c in bench_cases([]) for n, one in named(arch, *c)]\n"
        "print(json.dumps({arch: every(arch) for arch in ARCHS}))"
    )
    return json.loads(python(command))


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
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def name(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("op", "kernel", "case", "arch", "launch", "calls"))


def spoken(row: dict[str, Any]) -> str:
    return " ".join(map(str, name(row)))


@pytest.mark.parametrize("arch", CHIPS)
def test_records_are_of_the_kernels_that_there_are(arch: str, launched: dict[str, list[dict[str, Any]]]) -> None:
    """`make static` renews them."""
    rows = record(arch)
    assert all(row.keys() >= KEYS for row in rows)
    assert [(name(row), row["config"]) for row in rows] == [(name(row), row["config"]) for row in launched[arch]]
    assert {row["op"] for row in rows} == {op.name for op in REGISTRY.values() if op.triton}


def swept(row: dict[str, Any]) -> bool:
    """Whether a launch's configuration was found by a GPU's clock."""
    rows = json.loads((launch.CONFIGS / f"{row['arch']}.json").read_text())
    mine = [r for r in rows if r["kernel"] == f"{row['op']}.{row['kernel']}" and r["found"] == "sweep"]
    return any(r["config"].items() <= row["config"].items() for r in mine)


@pytest.mark.parametrize("arch", CHIPS)
def test_what_the_compiler_makes_of_them(arch: str) -> None:
    for row in record(arch):
        # the stack of a sinusoid is the range reduction of large arguments, not a spill; and where a GPU's clock found
        # a configuration that spills to be the fastest of its neighbours, the clock is right
        assert row["spill_bytes"] == 0 or row["op"] == "time_embedding" or swept(row), spoken(row)
        assert row["shared_bytes"] <= CHIPS[arch].shared_kib * 1024, spoken(row)  # what a block may have
        if row["op"] == "attention" and arch == "sm_90":
            assert row["hgmma"] and not row["hmma"], spoken(row)
        elif row["op"] == "glumbconv":
            assert not row["shared_bytes"], spoken(row)  # two channels a thread: a warp loads whole lines
        elif row["op"] not in ("time_embedding", "linear_attention"):
            assert row["ldg128"], spoken(row)


@pytest.mark.parametrize("arch", CHIPS)
def test_every_launch_has_its_bounds(arch: str) -> None:
    """The largest of them binds, and nothing is simulated to be faster."""
    units = [unit for unit in UNITS if unit != "L2" or CHIPS[arch].l2]
    for row in record(arch):
        bounds = row["bounds_us"]
        assert list(bounds) == units and bounds[row["binding"]] == max(bounds.values()), spoken(row)
        assert (row["simulated_us"] is not None) == (arch in TRUST), spoken(row)
        assert row["simulated_us"] is None or row["simulated_us"] >= 0.99 * max(bounds.values()), spoken(row)
        assert 0 < row["occupancy"] <= CHIPS[arch].warps and row["waves"] >= 0, spoken(row)
        assert row["floor_us"] == bounds["DRAM"] and sum(row["instructions"].values()) > 0, spoken(row)


def test_configurations_answer_what_the_bench_cases_ask() -> None:
    """`make tune` renews them: a row for each kernel and shape class, with the parameters that the kernel has."""
    want = {(kernel, shape): default.keys() for kernel, shape, default in asked()}
    assert {file.stem for file in launch.CONFIGS.glob("*.json")} >= CHIPS.keys()
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
