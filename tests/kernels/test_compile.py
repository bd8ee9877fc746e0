"""torch.compile of the ops with a kernel, and of a whole dual step of a network: one graph, forward and backward, with
the launches that an eager call has."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import ROOT

from emf_kernels import REGISTRY


@pytest.fixture(scope="module")
def findings() -> dict[str, dict[str, list[int]]]:
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests" / "captured.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


NAMES = [*(op.name for op in REGISTRY.values() if op.triton), "bias", "block-mask", "packed", "dynamic sizes", "step"]


@pytest.mark.parametrize("name", NAMES)
def test_a_dual_in_training_is_one_graph(name: str, findings: dict[str, dict[str, list[int]]]) -> None:
    graphs, eager = findings[name]["graphs"], findings[name]["eager"]
    assert len(graphs) == 2 and graphs == eager and eager[0] > 0
