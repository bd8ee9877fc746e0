"""Break each kernel one line at a time: parity must notice. A mutation that survives is a case that is missing."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from parity import Outcome, compare, eager, ours, outcome

import emf_kernels
from emf_kernels import REGISTRY, Case, Op, backend

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="each mutation would be compiled: the interpreter is for this"
    ),
]

FOLDER = Path(emf_kernels.__file__).parent
# None may write outside an output: the interpreter would do it, to the memory of this process.
MUTATIONS = {
    "adaln": [
        ("mean = tl.sum(x) / C", "mean = tl.sum(x) / BLOCK"),
        ("centred = tl.where(inside, x - mean, 0)", "centred = x - mean"),
        ("x_dot - tl.sum(x_dot) / C - n", "x_dot - n"),
        ("- n * (tl.sum(n * x_dot) / C))", ")"),
        ("y_dot += n_dot * (1 + scale)", "y_dot += n_dot"),
        ("y_dot += n * tl.load(scale_dot_ptr", "y_dot += tl.load(scale_dot_ptr"),
        ("y_dot += tl.load(shift_dot_ptr", "y_dot -= tl.load(shift_dot_ptr"),
        ("sample * scale_dot_b + c", "c"),
        ("if sample < b:", "if sample < b - 1:"),
        ("dx = rstd * (g - tl.sum(g) / C -", "dx = rstd * (g -"),
        ("dscale += dy * n", "dscale += dy"),
        ("min(chunk * ROWS + ROWS, N)", "min(chunk * ROWS + ROWS, N - 1)"),
        ("dscale.sum(1)", "dscale[:, 0]"),
    ],
    "attention": [
        ("s_dot += tl.dot(q, tl.trans(k_dot), input_precision=PRECISION)", "s_dot += 0"),
        ("s_dot += tl.dot(q_dot, tl.trans(k), input_precision=PRECISION)", "s_dot += 0"),
        ("a_dot += tl.dot(p.to(v.dtype), v_dot, input_precision=PRECISION)", "a_dot += 0"),
        ("a_dot += tl.dot(w.to(v.dtype), v, input_precision=PRECISION)", "a_dot += 0"),
        ("(a_dot - mu[:, None] * o)", "a_dot"),
        ("mu = mu * shrink + tl.sum(w, 1)", "mu = mu + tl.sum(w, 1)"),
        ("a_dot = a_dot * shrink[:, None]", "a_dot = a_dot * 1"),
        ("w = p * (s_dot * scale)", "w = p * s_dot"),
        ("live = live & (tl.load", "live = live | (tl.load"),
        ("s = tl.where(live[None, :], s, float(\"-inf\"))", "s = s"),
        ("reached = tl.where(m_next == float(\"-inf\"), 0.0, m_next)", "reached = m_next"),
        ("range(0, Nk, BLOCK_K)", "range(0, Nk - BLOCK_K + 1, BLOCK_K)"),
        ("head, sample = tl.program_id(1)", "head, sample = 0"),
        ("l = tl.where(dead, 1.0, l)", "l = l"),
        ("(m + tl.log2(l)) / LOG2E", "m + tl.log2(l)"),
        ("(torch.einsum(\"bihd,bjhd->bhij\", do, v_) - do_o[..., None])", "torch.einsum(\"bihd,bjhd->bhij\", do, v_)"),
        ("(b, B - b, [False] * 3)", "(b, B - b - 1, [False] * 3)"),
    ],
}  # fmt: skip


def mutant(name: str, old: str, new: str, folder: Path) -> Op:
    """The op of a changed copy of its file; the registry keeps the original."""
    source = (FOLDER / f"{name}.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}.py"
    file = folder / f"mutant_{name}.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"emf_kernels.mutant_{name}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(REGISTRY), mock.patch.dict(sys.modules, {spec.name: module}):
        spec.loader.exec_module(module)
        return REGISTRY[name]


@cache
def wanted(name: str) -> list[tuple[Case, Outcome, Outcome]]:
    """Each case with what plain torch gives, in float32 and exactly."""
    op = REGISTRY[name]
    cases = [case for case in op.cases if "test" in case.tags]
    run = lambda case, exact: outcome(op, case, torch.float32, eager, exact=exact)  # noqa: E731
    return [(case, run(case, False), run(case, True)) for case in cases]


def parity(op: Op) -> None:
    for case, plain, exact in wanted(op.name):
        with backend("triton"):
            got = outcome(op, case, torch.float32, ours)
        compare(got, plain, exact, torch.float32)


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_unmutated_copy_passes(name: str, tmp_path: Path) -> None:
    parity(mutant(name, "Primal:", "Primal: ", tmp_path))


@pytest.mark.parametrize(("name", "old", "new"), [(n, *m) for n, ms in MUTATIONS.items() for m in ms])
def test_a_mutation_is_noticed(name: str, old: str, new: str, tmp_path: Path) -> None:
    op = mutant(name, old, new, tmp_path)
    with pytest.raises(AssertionError):
        parity(op)
