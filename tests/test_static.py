"""What the compiler makes of the kernels (bench/static.py): as recorded, and within what a Hopper has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emf_kernels import REGISTRY

ROOT = Path(__file__).parent.parent
KEYS = {"op", "kernel", "case", "arch", "registers", "spill_bytes", "shared_bytes", "hgmma", "hmma", "ldg128", "config"}


def record(arch: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "profiles" / "static" / f"{arch}.json").read_text())


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every kernel, compiled for sm_90 now. A process of its own: kernels are interpreted in this one."""
    command = "import json; from bench.static import rows; print(json.dumps(list(rows('sm_90'))))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["kernel"], row["case"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_records_are_of_the_kernels_that_there_are(arch: str, compiled: list[dict[str, Any]]) -> None:
    """`make static` renews them."""
    rows = record(arch)
    assert all(row.keys() >= KEYS and row["arch"] == arch for row in rows)
    current = [(name(row), row["config"]) for row in compiled]
    assert [(name(row), row["config"]) for row in rows] == current
    assert {row["op"] for row in rows} == {op.name for op in REGISTRY.values() if op.triton}


def test_what_hopper_makes_of_them(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        # the stack of a sinusoid is the range reduction of large arguments, not a spill
        assert row["spill_bytes"] == 0 or row["op"] == "time_embedding", row
        assert row["shared_bytes"] <= 227 * 1024, row  # what a block may have
        if row["op"] == "attention":
            assert row["hgmma"] and not row["hmma"], row
        elif row["op"] not in ("time_embedding", "linear_attention"):
            assert row["ldg128"], row
