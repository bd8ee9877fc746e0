"""Break each kernel one line at a time: parity must notice. A mutation that survives is a case that is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from parity import Outcome, compare, eager, ours, outcome
from places import ROOT

import emf_kernels
from emf_kernels import REGISTRY, Case, Op, backend, launch

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="each mutation would be compiled: the interpreter is for this"
    ),
]

FOLDER = Path(emf_kernels.__file__).parent
RECORD = ROOT / "profiles" / "mutations.json"
# None may write outside an output: the interpreter would do it, to the memory of this process.
MUTATIONS = {
    "adaln": [
        ("mean = tl.sum(x) / C", "mean = tl.sum(x) / (C + 1)"),
        ("centred = tl.where(inside, x - mean, 0)", "centred = x - mean"),
        ("x_dot - tl.sum(x_dot) / C - n", "x_dot - n"),
        ("- n * (tl.sum(n * x_dot) / C))", ")"),
        ("norm_dot(x_dot, n, rstd, C) * (1 + scale)", "norm_dot(x_dot, n, rstd, C)"),
        ("y_dot += n * tl.load(scale_dot_ptr", "y_dot += tl.load(scale_dot_ptr"),
        ("y_dot += tl.load(shift_dot_ptr", "y_dot -= tl.load(shift_dot_ptr"),
        ("sample * scale_dot_b + c", "c"),
        ("if sample < b:", "if sample < b - 1:"),
        ("norm_dot(dy * (1 + scale), n, rstd, C)", "norm_dot(dy, n, rstd, C)"),
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
        ("range(0, end, BLOCK_K)", "range(0, end - BLOCK_K + 1, BLOCK_K)"),
        ("head, sample = tl.program_id(1)", "head, sample = 0"),
        ("l = tl.where(dead, 1.0, l)", "l = l"),
        ("(m + tl.log2(l)) / LOG2E", "m + tl.log2(l)"),
        ("j[None, :] <= i[:, None]", "j[None, :] < i[:, None] + 2"),
        ("tl.program_id(0) * BLOCK_Q + BLOCK_Q)", "tl.program_id(0) * BLOCK_Q + 1)"),
        ("(torch.einsum(\"bihd,bjhd->bhij\", do, v_) - do_o[..., None])", "torch.einsum(\"bihd,bjhd->bhij\", do, v_)"),
        ("(b, B - b, [False] * 3)", "(b, B - b - 1, [False] * 3)"),
    ],
    "gated_residual": [
        ("x + gate * h, mask", "x + h, mask"),
        ("y_dot += gate * h_dot", "y_dot += h_dot"),
        (".to(tl.float32) * h\n", ".to(tl.float32)\n"),
        ("if sample < b:", "if sample < b - 1:"),
        ("h_ptr + sample * h_b + token * h_n + c, mask", "h_ptr + sample * h_b + c, mask"),
        ("tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]", "tl.arange(0, BLOCK)[None, :]"),
        ("tl.store(dx_ptr + at, dy, mask", "tl.store(dx_ptr + at, dy * gate[None, :], mask"),
        ("gate[None, :] * dy", "dy"),
        ("dgate = tl.sum(dy * h, 0)", "dgate = tl.sum(dy, 0)"),
        ("dgate.sum(1)", "dgate[:, 0]"),
        ("x.stride(1) if x.ndim == 3 else 0", "0"),
        ("return dy.clone(), None, dy.clone()", "return dy.clone(), None, -dy"),
    ],
    "gated_residual_adaln": [
        ("y = x + gate * h", "y = x + h"),
        ("y_dot += gate * h_dot", "y_dot += h_dot"),
        (".to(tl.float32) * h\n", ".to(tl.float32)\n"),
        ("norm_dot(y_dot, n, rstd, C) * (1 + scale)", "norm_dot(y_dot, n, rstd, C)"),
        ("n_dot += n * tl.load(scale_dot_ptr", "n_dot += tl.load(scale_dot_ptr"),
        ("n_dot += tl.load(shift_dot_ptr", "n_dot -= tl.load(shift_dot_ptr"),
        ("if sample < b:", "if sample < b - 1:"),
        ("dx += tl.load(dy_ptr", "dx -= tl.load(dy_ptr"),
        ("gate * dx, mask", "dx, mask"),
        ("dgate += dx *", "dgate += dn *"),
        ("dscale += dn * n", "dscale += dn"),
        ("min(chunk * ROWS + ROWS, N)", "min(chunk * ROWS + ROWS, N - 1)"),
        ("if gated else None, dh, dscale", "if gated else None, dx, dscale"),
    ],
    "glumbconv": [
        ("s_dot = (sigmoid + s * (1 - sigmoid))", "s_dot = sigmoid"),
        ("above_dot += w2 * s_dot", "above_dot += 0"),
        ("here += w1 * s\n", "here += w0 * s\n"),
        ("at = w + j - 1", "at = w + j"),
        (" + a * slope * g_dot", ""),
        ("slope = sigmoid + g * sigmoid * (1 - sigmoid)", "slope = sigmoid"),
        ("below, above_dot, here_dot, below_dot", "below, here_dot, here_dot, below_dot"),
        ("(b, B - b, False)", "(b, B - b - 1, False)"),
        ("dy * a * (sigmoid + g * sigmoid * (1 - sigmoid))", "dy * a * sigmoid"),
        ("dg_sum += tl.sum(dg, 0)", "dg_sum += tl.sum(da, 0)"),
        ("at = w - j + 1", "at = w - j"),
        ("tl.sum(s_below * dc, 0)", "tl.sum(s_here * dc, 0)"),
        ("s_above, s_here = s_here, s_below", "s_above, s_here = s_here, s_here"),
        ("ds_above, ds_here = ds_here + ds1, ds2", "ds_above, ds_here = ds_here, ds2"),
        ("columns & (h + 1 >= top) & (h + 1 < bottom)", "columns & (h + 1 >= 0) & (h + 1 < H)"),
    ],
    "linear_attention": [
        ("tl.store(mean_dot_ptr + row, rstd * rstd *", "tl.store(mean_dot_ptr + row, rstd *"),
        ("tl.where(x > 0, x_dot, 0)", "x_dot"),
        ("S_dot += tl.dot(tl.trans(k_dot), v, input_precision=PRECISION)", "S_dot += 0"),
        ("S_dot += tl.dot(tl.trans(k), v_dot, input_precision=PRECISION)", "S_dot += 0"),
        ("s_dot += tl.sum(k_dot, 0)", "s_dot += 0"),
        ("a_dot += tl.dot(q_dot, S, input_precision=PRECISION)", "a_dot += 0"),
        ("z_dot += tl.sum(q_dot * s[None, :], 1)", "z_dot += 0"),
        ("z_dot += tl.sum(q * s_dot[None, :], 1)", "z_dot += 0"),
        ("(a_dot - o * z_dot[:, None])", "a_dot"),
        ("for chunk in range(0, chunks):", "for chunk in range(0, 1):"),
        ("(b, B - b, [False] * 3)", "(b, B - b - 1, [False] * 3)"),
        (" + dz[:, None] * s[None, :]", ""),
        ("dz = -tl.sum(do * o, 1) / z", "dz = -tl.sum(do * o, 1)"),
        ("tl.where(q > 0, dq, 0)", "dq"),
        ("tl.where(k > 0, dk, 0)", "dk"),
        ("ds += tl.sum(q * dz[:, None], 0)", "ds += 0"),
    ],
    "meanflow": [
        ("v - gap * u_dot", "v - u_dot"),
        ("mask=inside & (sample < b)", "mask=inside & (sample < b - 1)"),
        ("i // W // H * stride_c + ", ""),
        ("w = 1 / (total + c) ** p", "w = 1 / (total + c)"),
        ("2 * w * dloss", "w * dloss"),
        ("sums.sum(1)", "sums[:, 0]"),
        ("return batch, *(0, 0)[len(middle) :], *middle", "return batch, 0, 0"),
    ],
    "path": [
        ("(1 - t) * x + t * e", "x + t * e"),
        ("z_dot += (1 - t) * x_dot", "z_dot += x_dot"),
        ("v_dot -= x_dot", "v_dot += x_dot"),
        ("z_dot += t * e_dot", "z_dot += e_dot"),
        ("z_dot += (e - x) * tl.load", "z_dot += tl.load"),
        ("if sample < b:", "if sample < b - 1:"),
        ("offset(i, e_dot_c, e_dot_h, H, W)", "offset(i, 0, e_dot_h, H, W)"),
        ("tl.program_id(0) * BLOCK + tl.arange", "tl.arange"),
        ("(1 - s) * wide - dv", "(1 - s) * wide"),
        ("((e.double() - x.double()) * dz)", "dz"),
    ],
    "rmsnorm": [
        ("1 / tl.sqrt(tl.sum(x * x) / C + eps)", "1 / tl.sqrt(tl.sum(x * x) / BLOCK + eps)"),
        ("(rstd * rstd * tl.sum(x * x_dot) / C)", "(rstd * tl.sum(x * x_dot) / C)"),
        ("tl.sum(x * x_dot) / C)) * weight", "tl.sum(x * x_dot) / C))"),
        ("if sample < b:", "if sample < b - 1:"),
        ("(rstd * rstd * tl.sum(x * g) / C)", "0"),
        ("dweight += dy * x * rstd", "dweight += dy * x"),
        ("min(chunk * ROWS + ROWS, rows)", "min(chunk * ROWS + ROWS, rows - 1)"),
        ("dweight.sum(0)", "dweight[0]"),
    ],
    "time_embedding": [
        ("t - r, t_dot - r_dot", "t - r, t_dot"),
        ("-s_dot * f * sin", "s_dot * f * sin"),
        ("s_dot * f * cos", "s_dot * cos"),
        ("f = scale * tl.exp(step * i)", "f = tl.exp(step * i)"),
        ("live = sample < b", "live = sample < b - 1"),
        ("d_sin * cos - d_cos * sin", "d_sin * cos"),
        ("(ds[0] + ds[1], -ds[1])", "(ds[0] + ds[1], ds[1])"),
        ("(ds[0] + ds[1], -ds[1])", "(ds[0], -ds[1])"),
    ],
}  # fmt: skip


def mutant(name: str, old: str, new: str, folder: Path) -> Op:
    """The op of a changed copy of its file, or of tiles.py; the registry and the other ops keep the originals."""
    files = {f"emf_kernels.ops.mutant_{name}": FOLDER / "ops" / f"{name}.py"}
    if old not in files[f"emf_kernels.ops.mutant_{name}"].read_text():
        files = {"emf_kernels.tiles": FOLDER / "tiles.py"} | files
    count = sum(file.read_text().count(old) for file in files.values())
    assert count == 1, f"{old!r} stands {count} times in {name}.py and tiles.py"
    with mock.patch.dict(REGISTRY), mock.patch.dict(sys.modules), launch.decorating():
        for module_name, file in files.items():
            copied = folder / f"mutant_{file.name}"
            copied.write_text(file.read_text().replace(old, new))
            spec = importlib.util.spec_from_file_location(module_name, copied)
            assert spec and spec.loader
            module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
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
        try:
            compare(got, plain, exact, torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from None


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_unmutated_copy_passes(name: str, tmp_path: Path) -> None:
    parity(mutant(name, "Primal:", "Primal: ", tmp_path))


@pytest.mark.parametrize(("name", "old", "new"), [(n, *m) for n, ms in MUTATIONS.items() for m in ms])
def test_a_mutation_is_noticed(name: str, old: str, new: str, tmp_path: Path) -> None:
    op = mutant(name, old, new, tmp_path)
    with pytest.raises(AssertionError):
        parity(op)


def test_the_record_is_of_these_mutations() -> None:
    """`PYTHONPATH=kernels .venv/bin/python tests/test_mutations.py` renews it."""
    rows = json.loads(RECORD.read_text())
    assert [(row["op"], row["line"], row["broken"]) for row in rows] == [
        (n, *m) for n, ms in MUTATIONS.items() for m in ms
    ]
    assert all(row["noticed_by"] for row in rows)
    assert {row["op"] for row in rows} == {op.name for op in REGISTRY.values() if op.triton}
    assert all(len(ms) >= 4 for ms in MUTATIONS.values())


def record() -> None:
    """Write what noticed each mutation first: the case, and the value, tangent or gradient that was wrong."""
    rows = []
    for name, mutations in MUTATIONS.items():
        for old, new in mutations:
            noticed = ""
            with tempfile.TemporaryDirectory() as folder:
                try:
                    parity(mutant(name, old, new, Path(folder)))
                except AssertionError as error:
                    case, what, *_ = str(error).split(":")
                    noticed = f"{case}: {what.strip().split()[0]}"
            rows.append(dict(op=name, line=old, broken=new, noticed_by=noticed))
            print(*rows[-1].values(), sep=" | ", flush=True)
    RECORD.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    record()
