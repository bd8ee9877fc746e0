"""Break each kernel one line at a time: the parity tests must notice. A mutation that survives is a missing case."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from test_ops import all_of, call, compare, truth

import emf_kernels
from emf_kernels import REGISTRY, Op, backend

FOLDER = Path(emf_kernels.__file__).parent
MUTATIONS = {
    "adaln": [
        ("mean = tl.sum(x) / C", "mean = tl.sum(x) / BLOCK"),
        ("x_dot - tl.sum(x_dot) / C - n", "x_dot - n"),
        ("- n * (tl.sum(n * x_dot) / C))", ")"),
        ("y_dot += n_dot * (1 + scale)", "y_dot += n_dot"),
        ("y_dot += n * tl.load(scale_dot_ptr", "y_dot += tl.load(scale_dot_ptr"),
        ("y_dot += tl.load(shift_dot_ptr", "y_dot -= tl.load(shift_dot_ptr"),
        ("if sample < b:", "if sample < 1:"),
        ("dx = rstd * (g - tl.sum(g) / C -", "dx = rstd * (g -"),
        ("dscale += dy * n", "dscale += dy"),
        ("min(chunk * ROWS + ROWS, N)", "min(chunk * ROWS + ROWS, N - 1)"),
        ("sample * scale_dot_b + c", "c"),
    ],
    "attention": [
        ("s_dot += tl.dot(q, tl.trans(k_dot), input_precision=PRECISION)", "s_dot += 0"),
        ("s_dot += tl.dot(q_dot, tl.trans(k), input_precision=PRECISION)", "s_dot += 0"),
        ("a_dot += tl.dot(p.to(v.dtype), v_dot, input_precision=PRECISION)", "a_dot += 0"),
        ("- (mu / total)[:, None] * o", ""),
        ("mu = mu * shrink + tl.sum(w, 1)", "mu = mu + tl.sum(w, 1)"),
        ("a_dot = a_dot * shrink[:, None]", "a_dot = a_dot * 1"),
        ("alive = alive & (tl.load", "alive = alive | (tl.load"),
        ("s = tl.where(alive[None, :], s, float(\"-inf\"))", "s = s"),
        ("range(0, Nk, BLOCK_K)", "range(0, Nk - BLOCK_K + 1, BLOCK_K)"),
        ("j[:, None] * v_n + d", "j[:, None] * k_h + d"),
        ("w = p * (s_dot * scale)", "w = p * s_dot"),
        ("tl.where(dead, 1.0, l)", "l"),
        ("- (do * o).sum(-1).transpose(1, 2)[..., None]", ""),
        ("first, count, live in ((0, b,", "first, count, live in ((0, B,"),
    ],
}  # fmt: skip


def mutant(name: str, old: str, new: str, folder: Path) -> Op:
    source = (FOLDER / f"{name}.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}.py"
    file = folder / f"mutant_{name}.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"emf_kernels.mutant_{name}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    own = REGISTRY[name]
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        return REGISTRY[name]
    finally:
        REGISTRY[name] = own
        del sys.modules[spec.name]


def parity(op: Op) -> None:
    for case in op.cases:
        if "test" in case.tags:
            with backend("triton"):
                got = all_of(op, case, torch.float32, call)
            with backend("reference"):
                eager = all_of(op, case, torch.float32, call)
            compare(got, eager, all_of(op, case, torch.float32, truth), torch.float32)


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_unmutated_copy_passes(name: str, tmp_path: Path) -> None:
    parity(mutant(name, "Primal:", "Primal: ", tmp_path))


@pytest.mark.parametrize(("name", "old", "new"), [(n, *m) for n, ms in MUTATIONS.items() for m in ms])
def test_a_mutation_is_noticed(name: str, old: str, new: str, tmp_path: Path) -> None:
    op = mutant(name, old, new, tmp_path)
    with pytest.raises(Exception):  # noqa: B017  a wrong number, or a kernel that breaks
        parity(op)
