"""NaN in comes out as NaN, where plain torch has it: a kernel that drops one hides a broken step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from parity import Outcome, draw, eager, floating, gradients, make, ours, require_grad
from places import ROOT
from torch import Tensor

from emf_kernels import REGISTRY, Case, Op, backend, launch

KERNELS = [op for op in REGISTRY.values() if op.triton]
# linear attention without norms: the kernel leaves q's out, so a NaN in q stays in its own head
NAMED = dict(linear_attention="no-norm")


def broken(run: Any, op: Op, case: Case, name: str) -> Outcome:
    """Everything that a run gives with one NaN in an argument or in its tangent, where the argument is largest in its
    first sample: a feature that is positive."""
    args, tangents, generator = make(op, case, torch.float32)
    k = name.removesuffix("'s tangent")
    x: Tensor = (args if name == k else tangents)[k]
    x[0].view(-1)[args[k][0].argmax()] = float("nan")
    names = require_grad(op, args)
    y, y_dot = run(op, case, args, tangents)
    dy = [draw(o, torch.float32, generator) for o in y]
    result = {f"y{i}": o.detach() for i, o in enumerate(y)} | {f"y{i}_dot": o for i, o in enumerate(y_dot)}
    return result | {f"d{k}": g for k, g in gradients(args, names, y, dy).items()}


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU's own parity is elsewhere")
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_nan_comes_out(op: Op) -> None:
    case = next(case for case in op.cases if case.name == NAMED.get(op.name, op.cases[0].name))
    args, tangents, _ = make(op, case, torch.float32)
    names = [k for k, v in args.items() if floating(v)] + [f"{k}'s tangent" for k in tangents]
    for name in names:
        want = broken(eager, op, case, name)
        with backend("triton"):
            got = broken(ours, op, case, name)
        assert any(x.isnan().any() for x in want.values()), name
        lost = [k for k, x in want.items() if (x.isnan() & ~got[k].isnan()).any()]
        assert not lost, f"{op.name}: NaN in {name} does not reach {lost}"


COMPILED = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.static import bench_cases, launches, source
found = {}
for op, case in bench_cases(["linear_attention"]):
    for one in {one.kernel.__name__: one for one in launches(op, case)}.values():
        signature, constants, _ = source(one)
        ir = ASTSource(fn=one.kernel, signature=signature, constexprs=constants)
        ptx = triton.compile(ir, target=GPUTarget("cuda", 90, 32), options=one.options).asm["ptx"]
        found[one.kernel.__name__] = ptx
print(json.dumps(found))
"""


def test_a_relu_keeps_nan_in_the_ptx() -> None:
    """`max.f32` gives the other number. Where a softmax takes it for its running maximum, exp(NaN - m) is NaN again;
    where it is a feature nothing would be left of the NaN."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() >= {"_states", "_apply", "_bwd_q", "_bwd_kv"}
    for name, ptx in found.items():
        assert not re.search(r"\b(max|min)\.(ftz\.)?f32", ptx), name
        assert name in ("_norms", "_bwd") or re.search(r"\bmax\.(ftz\.)?NaN\.f32", ptx), name
