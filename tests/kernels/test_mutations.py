"""Break each kernel one line at a time: parity must notice. A mutation that survives is a case that is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from attention_mutations import ATTENTION
from libraries import check_backward
from parity import Outcome, compare, eager, ours, outcome
from places import ROOT

import emf_kernels
from bench.interpreter import as_on_a_gpu
from emf_kernels import REGISTRY, Case, backend, launch

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="each mutation would be compiled: the interpreter is for this"
    ),
]

FOLDER = Path(emf_kernels.__file__).parent
SHARED = ("tiles", "attention_library")  # what ops import
RECORD = ROOT / "profiles" / "mutations.json"
# None may write outside an output: the interpreter would do it, to the memory of this process.
MUTATIONS = {
    "adaln": [
        ("tl.load(mean_ptr + token + 1, mask=more)", "tl.load(mean_ptr + token, mask=more)"),
        ("mean = tl.sum(x) / C", "mean = tl.sum(x) / (C + 1)"),
        ("centred = tl.where(inside, x - mean, 0)", "centred = x - mean"),
        ("x_dot - tl.sum(x_dot) / C - n", "x_dot - n"),
        ("- n * (tl.sum(n * x_dot) / C))", ")"),
        ("norm_dot(x_dot, n, rstd, C) * (1 + scale)", "norm_dot(x_dot, n, rstd, C)"),
        ("y_dot += n * tl.load(scale_dot_ptr", "y_dot += tl.load(scale_dot_ptr"),
        ("y_dot += tl.load(shift_dot_ptr", "y_dot -= tl.load(shift_dot_ptr"),
        ("sample * scale_dot_b + c", "c"),
        ("if sample < b:", "if sample < b - 1:"),
        ("norm_dot(tl.fma(dy, scale, dy), n, rstd, C)", "norm_dot(dy, n, rstd, C)"),
        ("dscale += dy * n", "dscale += dy"),
        ("min(chunk * ROWS + ROWS, N)", "min(chunk * ROWS + ROWS, N - 1)"),
        ("dscale.sum(1)", "dscale[:, 0]"),
        ("x_dot_ptr + sample * x_dot_b + token * x_dot_n", "x_dot_ptr + sample * x_b + token * x_n"),
        ("shift_dot_ptr + sample * shift_dot_b", "shift_dot_ptr + sample * shift_b"),
        ("dy_ptr += sample * dy_b + c", "dy_ptr += sample * N * dy_n + c"),
        ("(token + 1) * dy_n", "(token + 1) * C"),
        ("(token + 1) * x_n", "(token + 1) * C"),
        ("sample * scale_b + c, mask=inside, other=0).to(tl.float32)\n    dscale",
         "sample * C + c, mask=inside, other=0).to(tl.float32)\n    dscale"),
        ("/ C + tl.cast(eps, tl.float32))", "/ C + 1e-6)"),
    ],
    "attention": ATTENTION,
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
        ("sample * x_dot_b + token * x_dot_n", "sample * x_b + token * x_n"),
        ("sample * h_dot_b + token * h_dot_n", "sample * h_b + token * h_n"),
        ("gate_dot_ptr + sample * gate_dot_b", "gate_dot_ptr + sample * gate_b"),
        ("sample * dy_b + token * dy_n", "(sample * N + token) * C"),
        ("h_ptr + sample * h_b + token * h_n + c[None, :]", "h_ptr + (sample * N + token) * C + c[None, :]"),
    ],
    "gated_residual_adaln": [
        ("tl.load(rstd_ptr + token + 1, mask=more)", "tl.load(rstd_ptr + token, mask=more)"),
        ("(x + gate * h)", "(x + h)"),
        ("y_dot += gate * h_dot", "y_dot += h_dot"),
        (".to(tl.float32) * h\n", ".to(tl.float32)\n"),
        ("norm_dot(y_dot, n, rstd, C) * (1 + scale)", "norm_dot(y_dot, n, rstd, C)"),
        ("n_dot += n * tl.load(scale_dot_ptr", "n_dot += tl.load(scale_dot_ptr"),
        ("n_dot += tl.load(shift_dot_ptr", "n_dot -= tl.load(shift_dot_ptr"),
        ("if sample < b:", "if sample < b - 1:"),
        ("dy += tl.load(dy_ptr", "dy -= tl.load(dy_ptr"),
        ("gate * dx, mask", "dx, mask"),
        ("dgate += dx *", "dgate += dn *"),
        ("dscale += dn * n", "dscale += dn"),
        ("min(chunk * ROWS + ROWS, N)", "min(chunk * ROWS + ROWS, N - 1)"),
        ("if gated else None, dh, dscale", "if gated else None, dx, dscale"),
        ("x_dot_ptr + sample * x_dot_b + token * x_dot_n", "x_dot_ptr + sample * x_b + token * x_n"),
        ("h_dot_ptr + sample * h_dot_b + token * h_dot_n", "h_dot_ptr + sample * h_b + token * h_n"),
        ("gate_dot_ptr + sample * gate_dot_b", "gate_dot_ptr + sample * gate_b"),
        ("scale_dot_ptr + sample * scale_dot_b", "scale_dot_ptr + sample * scale_b"),
        ("dn_ptr += sample * dn_b + c", "dn_ptr += sample * N * dn_n + c"),
        ("(token + 1) * dn_n", "(token + 1) * C"),
        ("sample * dy_b + token * dy_n", "row * C"),
        ("dgate += dx * tl.load(h_ptr + sample * h_b + token * h_n", "dgate += dx * tl.load(h_ptr + row * C"),
        ("/ C + tl.cast(eps, tl.float32))", "/ C + 1e-6)"),
        ("torch.zeros_like(y) if dn is None", "torch.ones_like(y) if dn is None"),
        ("        if Y_USED:\n            dy +=", "        dy = dn\n        if Y_USED:\n            dy ="),
        ("(x + gate * h).to(y_ptr.dtype.element_ty).to(tl.float32)", "x + gate * h"),
    ],
    "glumbconv": [
        ("s_dot = (sigmoid + s * (1 - sigmoid)) * x_dot[q]", "s_dot = sigmoid * x_dot[q]"),
        ("return root * root", "return root"),
        ("taps[6 - 3 * k + q - o] * s", "taps[3 * k + q - o] * s"),
        ("if q - o >= 0 and q - o < 3:", "if q - o >= 1 and q - o < 3:"),
        ("(rows[COLUMNS + k],)", "(rows[k],)"),
        ("(w >= 0) & (w < W)", "(w < W)"),
        ("a_rows_dot[o] * s + a * s_dot", "a_rows_dot[o] * s"),
        ("s_dot = (sigmoid + s * (1 - sigmoid)) * g_rows_dot[o]", "s_dot = sigmoid * g_rows_dot[o]"),
        ("a_rows_dot, g_rows_dot = _down(a_rows_dot, zero, COLUMNS)", "a_rows_dot, g_rows_dot = a_rows_dot"),
        ("(b, B - b, False)", "(b, B - b - 1, False)"),
        ("dy * a * (sigmoid + s * (1 - sigmoid))", "dy * a * sigmoid"),
        ("dg_sum += dg", "dg_sum += da"),
        ("turned = (taps[8], taps[7], taps[6]", "turned = (taps[6], taps[7], taps[8]"),
        ("dweight[tap] + s[q + tap % 3 - 2] * dc", "dweight[tap] + s[q + tap % 3 - 2]"),
        ("_gather(dweight, dc, s_below, 2, q, COLUMNS)", "_gather(dweight, dc, s_here, 2, q, COLUMNS)"),
        ("s_here, slope_here = s_below, slope_below", "s_here, slope_here = s_here, slope_below"),
        ("ds_rows[o] * slope_above[o]", "ds_rows[o] * slope_here[o]"),
        ("c_inside & (h + 2 < bottom)", "c_inside & (h + 2 < H)"),
        ("x_dot_ptr, h + 1, left - 1, x_dot_h, x_dot_w,", "x_dot_ptr, h + 1, left - 1, x_dot_h, x_w,"),
        ("x_dot_ptr + F, h + 1, left - 1, x_dot_h, x_dot_w,", "x_dot_ptr + F, h + 1, left - 1, x_h, x_dot_w,"),
        ("x_dot_ptr += sample * x_dot_b", "x_dot_ptr += sample * x_b"),
        ("dy_ptr, h - 1, left, dy_h, dy_w,", "dy_ptr, h - 1, left, W * F, F,"),
        ("dy_ptr += sample * dy_b", "dy_ptr += sample * H * W * F"),
        ("h + 2, left, x_h, x_w,", "h + 2, left, x_h, C,"),
    ],
    "linear_attention": [
        ("tl.store(mean_dot_ptr + row, rstd * rstd *", "tl.store(mean_dot_ptr + row, rstd *"),
        ("tl.where(x <= 0, 0, x_dot)", "x_dot"),
        ("S_dot = tl.dot(tl.trans(k_dot), v, S_dot, input_precision=PRECISION)", "S_dot = S_dot"),
        ("S_dot = tl.dot(tl.trans(k), v_dot, S_dot, input_precision=PRECISION)", "S_dot = S_dot"),
        ("s_dot += tl.sum(k_dot, 0)", "s_dot += 0"),
        ("a_dot += _dot(q_dot, high, low, PRECISION)", "a_dot += 0"),
        ("a_dot += _dot(q, high_dot, low_dot, PRECISION)", "a_dot += 0"),
        ("z_dot += tl.sum(q_dot * s[None, :], 1)", "z_dot += 0"),
        ("z_dot += tl.sum(q * s_dot[None, :], 1)", "z_dot += 0"),
        ("(a_dot - o * z_dot[:, None])", "a_dot"),
        ("for chunk in range(0, chunks):", "for chunk in range(0, 1):"),
        ("for past in range(0, min(tokens, tl.maximum(N - top, 0)), BLOCK_N):\n        start = top + past\n"
         "        inside = (start + n < N)[:, None] & (d < D)[None, :]\n        k,",
         "for past in range(0, BLOCK_N, BLOCK_N):\n        start = top + past\n"
         "        inside = (start + n < N)[:, None] & (d < D)[None, :]\n        k,"),
        ("(b, B - b, [False] * 3)", "(b, B - b - 1, [False] * 3)"),
        (" + dz[:, None] * s[None, :]", ""),
        ("input_precision=PRECISION), 1) * over", "input_precision=PRECISION), 1)"),
        ("tl.where(q <= 0, 0, dq)", "dq"),
        ("dq * weight[None, :], mask", "dq, mask"),
        ("dweight += tl.sum(dq * x, 0)", "dweight += tl.sum(dq, 0)"),
        ("tl.where(k <= 0, 0, dk)", "dk"),
        ("ds += tl.sum(q * dz[:, None], 0)", "ds += 0"),
        ("x_dot_ptr + sample * x_dot_b + token * x_dot_n", "x_dot_ptr + sample * x_b + token * x_n"),
        ("mean_dot_ptr, k_b, k_n, k_dot_b, k_dot_n", "mean_dot_ptr, k_b, k_n, k_b, k_n"),
        ("q_ptr, q_b, q_n, q_dot_b, q_dot_n", "q_ptr, q_b, q_n, q_b, q_n"),
        ("_tile(v_dot_ptr, v_dot_b, v_dot_n", "_tile(v_dot_ptr, v_b, v_n"),
        ("_tile(v_ptr, v_b, v_n, sample, start, n, c, inside)\n        S",
         "_tile(v_ptr, k_b, k_n, sample, start, n, c, inside)\n        S"),
        ("_tile(v_ptr, v_b, v_n, sample, start, n, c, inside)\n        dk",
         "_tile(v_ptr, k_b, k_n, sample, start, n, c, inside)\n        dk"),
        ("_tile(do_ptr, do_b, do_n", "_tile(do_ptr, q_b, q_n"),
        ("_tile(q_ptr, q_b, q_n", "_tile(q_ptr, N * C, C"),
        ("+ tl.cast(eps, tl.float32))[:, None]", "+ 1e-15)[:, None]"),
        ("1) + tl.cast(eps, tl.float32))\n", "1) + 1e-15)\n"),
        ("NORM_EPS = 1e-5", "NORM_EPS = 2e-5"),
        ("\"tf32x3\" if x.dtype == torch.float32 else \"tf32\"", "\"tf32\""),
    ],
    "meanflow": [
        ("v - gap * u_dot", "v - u_dot"),
        ("mask=inside & (sample < b)", "mask=inside & (sample < b - 1)"),
        ("i // W // H * stride_c + ", ""),
        ("w = 1 / (total + c) ** p", "w = 1 / (total + c)"),
        ("2 * w * dloss", "w * dloss"),
        ("sums.sum(1)", "sums[:, 0]"),
        ("return batch, *(0, 0)[len(middle) :], *middle", "return batch, 0, 0"),
        ("sample * u_dot_b + offset(i, u_dot_c, u_dot_h,", "sample * u_b + offset(i, u_c, u_h,"),
        ("v_ptr + sample * v_b + offset(i, v_c, v_h,", "v_ptr + sample * u_b + offset(i, u_c, u_h,"),
        ("w = 1 / (total + c)", "w = 1 / (total + 1e-3)"),
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
        ("x_at = sample * x_dot_b + offset(i, x_dot_c, x_dot_h", "x_at = sample * x_b + offset(i, x_c, x_h"),
        ("e_at = sample * e_dot_b", "e_at = sample * e_b"),
        ("e_ptr + sample * e_b + offset(i, e_c, e_h,", "e_ptr + sample * x_b + offset(i, x_c, x_h,"),
        ("torch.zeros_like(x) if d is None", "torch.ones_like(x) if d is None"),
    ],
    "rmsnorm": [
        ("tl.load(rstd_ptr + row + 1, mask=more)", "tl.load(rstd_ptr + row, mask=more)"),
        ("tl.sum(x * x) / C + tl.cast", "tl.sum(x * x) / BLOCK + tl.cast"),
        ("(rstd * rstd * tl.sum(x * x_dot) / C)", "(rstd * tl.sum(x * x_dot) / C)"),
        ("tl.sum(x * x_dot) / C)) * weight", "tl.sum(x * x_dot) / C))"),
        ("if sample < b:", "if sample < b - 1:"),
        ("(rstd * rstd * tl.sum(x * g) / C)", "0"),
        ("dweight += dy * x * rstd", "dweight += dy * x"),
        ("min(chunk * ROWS + ROWS, rows)", "min(chunk * ROWS + ROWS, rows - 1)"),
        ("dweight.sum(0)", "dweight[0]"),
        ("sample * x_dot_b + token * x_dot_n", "sample * x_b + token * x_n"),
        ("begin // N * dy_b + begin % N * dy_n", "begin // N * x_b + begin % N * x_n"),
        ("sample * dy_b + token * dy_n", "sample * x_b + token * x_n"),
        ("begin // N * x_b + begin % N * x_n", "begin * x_n"),
        ("sample * x_b + token * x_n + c, mask=inside & more", "(row + 1) * x_n + c, mask=inside & more"),
        ("tl.load(rstd_ptr + begin)", "tl.load(rstd_ptr)"),
        ("dweight_ptr + chunk * C", "dweight_ptr"),
        ("/ C + tl.cast(eps, tl.float32))", "/ C + 1e-5)"),
    ],
    "time_embedding": [
        ("t - r, t_dot - r_dot", "t - r, t_dot"),
        ("-s_dot * f * sin", "s_dot * f * sin"),
        ("s_dot * f * cos", "s_dot * cos"),
        ("tl.cast(scale, tl.float32) * tl.exp(", "tl.exp("),
        ("live = sample < b", "live = sample < b - 1"),
        ("d_sin * cos - d_cos * sin", "d_sin * cos"),
        ("(ds[0] + ds[1], -ds[1])", "(ds[0] + ds[1], ds[1])"),
        ("(ds[0] + ds[1], -ds[1])", "(ds[0], -ds[1])"),
        ("torch.zeros_like(e) if de is None", "torch.ones_like(e) if de is None"),
        ("f = scale * torch.exp(-math.log(1e4) / half", "f = torch.exp(-math.log(1e4) / half"),
    ],
}  # fmt: skip


def own_files(name: str) -> dict[str, Path]:
    """An op's modules and their files, what is imported first: the kernels of some have files of their own."""
    own, kernels = f"emf_kernels.ops.{name}", f"emf_kernels.ops.{name}_"
    others = [module for module in sys.modules if module.startswith(kernels) and module.split(".")[-1] not in REGISTRY]
    return {module: FOLDER / "ops" / f"{module.split('.')[-1]}.py" for module in reversed([own, *others])}


def mutant(name: str, old: str, new: str, folder: Path) -> ModuleType:
    """A changed copy of an op's files, or of a file that it imports; the registry and the other ops keep the
    originals."""
    own, files = own_files(name), {}
    if not any(old in file.read_text() for file in own.values()):
        shared = {f"emf_kernels.{stem}": FOLDER / f"{stem}.py" for stem in SHARED}
        files = {module: file for module, file in shared.items() if old in file.read_text()}
    files |= own
    count = sum(file.read_text().count(old) for file in files.values())
    assert count == 1, f"{old!r} stands {count} times in {', '.join(file.name for file in files.values())}"
    with mock.patch.dict(REGISTRY), mock.patch.dict(sys.modules), ExitStack() as stack, launch.decorating():
        for module_name, file in files.items():
            copied = folder / f"mutant_{file.name}"
            copied.write_text(file.read_text().replace(old, new))
            spec = importlib.util.spec_from_file_location(module_name, copied)
            assert spec and spec.loader
            module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
            if module_name not in own:
                stack.enter_context(mock.patch.object(emf_kernels, file.stem, module))
            spec.loader.exec_module(module)
        return module


@cache
def wanted(name: str, dtype: torch.dtype) -> list[tuple[Case, Outcome, Outcome]]:
    """Each case with what plain torch gives, in this dtype and exactly."""
    op = REGISTRY[name]
    cases = [case for case in op.cases if "test" in case.tags]
    run = lambda case, exact: outcome(op, case, dtype, eager, exact=exact)  # noqa: E731
    return [(case, run(case, False), run(case, True)) for case in cases]


def parity(name: str, file: ModuleType, first: str = "") -> None:
    """Of every case, with strides of each tensor's own; and what attention asks of PyTorch's kernels on a GPU. first:
    the case to begin with, which is known to notice."""
    if name == "attention":
        with named("libraries"):
            check_backward(file)
    for dtype in (torch.float32, torch.bfloat16):
        for case, plain, exact in sorted(wanted(name, dtype), key=lambda one: one[0].name != first):
            with backend("triton"), as_on_a_gpu():
                got = outcome(getattr(file, name), case, dtype, ours, strided=True)
            with named(case.name):
                compare(got, plain, exact, dtype)


@contextmanager
def named(where: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from None


@cache
def noticed() -> dict[tuple[str, str, str], str]:
    """The case that noticed each mutation when the record was made."""
    rows = json.loads(RECORD.read_text())
    return {(row["op"], row["line"], row["broken"]): row["noticed_by"].partition(":")[0] for row in rows}


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_unmutated_copy_passes(name: str, tmp_path: Path) -> None:
    parity(name, mutant(name, "Primal:", "Primal: ", tmp_path))


@pytest.mark.parametrize(("name", "old", "new"), [(n, *m) for n, ms in MUTATIONS.items() for m in ms])
def test_a_mutation_is_noticed(name: str, old: str, new: str, tmp_path: Path) -> None:
    file = mutant(name, old, new, tmp_path)
    with pytest.raises(AssertionError):
        parity(name, file, noticed().get((name, old, new), ""))


def test_the_record_is_of_these_mutations() -> None:
    """`PYTHONPATH=.:kernels:tests .venv/bin/python tests/kernels/test_mutations.py` renews it."""
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
                    parity(name, mutant(name, old, new, Path(folder)))
                except AssertionError as error:
                    case, what, *_ = str(error).split(":")
                    noticed = f"{case}: {what.strip().split()[0].strip(',')}"
            rows.append(dict(op=name, line=old, broken=new, noticed_by=noticed))
            print(*rows[-1].values(), sep=" | ", flush=True)
    RECORD.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    record()
