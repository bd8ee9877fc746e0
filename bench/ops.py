"""Every op at its bench cases, value + tangent, with and without backward, by every way there is: `python -m bench.ops`
writes profiles/<device>/ops.json after each op. Needs torch and triton only (PYTHONPATH=kernels:.).

Rounds are interleaved, so that ratios are of one run; the L2 cache is flushed before each call. A provider that is
wrong is not timed. Shares are of the device's own measured ceilings: a copy for bytes, a matrix product for FLOPs.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_kernels import REGISTRY, Case, Dual, Op, backend

OUT = Path(__file__).parent.parent / "profiles"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Call = Callable[[], list[Tensor]]


def device_name() -> str:
    return re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower() if GPU else "cpu"


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in interleaved rounds after one that warms up."""
    flush = torch.empty(2**26 if GPU else 1, dtype=torch.int32, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            flush.zero_()
            if GPU:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                took = start.elapsed_time(end)
            else:
                start_s = time.perf_counter()
                call()
                took = 1e3 * (time.perf_counter() - start_s)
            if i:
                times[name].append(took)
    return times


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """bytes_s of a copy and flop_s of a square matrix product on this device."""
    n = 2**28 if GPU else 2**22
    a, m = torch.empty(n, dtype=torch.uint8, device=DEVICE), 8192 if GPU else 512
    x = torch.randn(m, m, device=DEVICE, dtype=dtype)
    took = milliseconds({"copy": lambda: a.clone(), "product": lambda: x @ x}, 20)
    return dict(
        bytes_s=2 * n / statistics.median(took["copy"]) * 1e3,
        flop_s=2 * m**3 / statistics.median(took["product"]) * 1e3,
    )


def providers(op: Op, case: Case, args: dict[str, Any], dots: dict[str, Tensor]) -> dict[str, Call]:
    """Ways to the values and tangents of the op's outputs, by name; values first."""

    def flat(y: Any) -> list[Tensor]:
        duals = [y] if isinstance(y, (Dual, Tensor)) else list(y)
        values = [d.primal if isinstance(d, Dual) else d for d in duals]
        return values + [d.tangent for d in duals if isinstance(d, Dual)]

    duals = {k: Dual(v, dots[k]) if k in dots else v for k, v in args.items()}
    live = list(dots)

    def ours(name: Any) -> Call:
        def call() -> list[Tensor]:
            with backend(name):
                return flat(op(**duals))

        return call

    def func_jvp(fn: Callable[..., Any]) -> Call:
        def call() -> list[Tensor]:
            def f(*values: Tensor) -> Any:
                y = fn(**(args | dict(zip(live, values, strict=True))))
                return y if isinstance(y, tuple) else (y,)

            y, y_dot = torch.func.jvp(f, tuple(args[k] for k in live), tuple(dots[k] for k in live))
            return [*y, *y_dot]

        return call

    ways: dict[str, Call] = {"lift": ours("reference")}
    if op.triton and GPU:
        ways["triton"] = ours("triton")
        compiled = torch.compile(lambda **kw: op.dual(*op.signature.bind(**kw).args) if live else op.reference(**kw))
        ways["compile"] = lambda: flat(compiled(**duals))
    if live and case.b == case.shape["B"]:
        ways["func.jvp"] = func_jvp(op.reference)
    if op.name == "attention" and live and not case.shape.get("masked") and case.b == case.shape["B"]:

        def math(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                sdpa = torch.nn.functional.scaled_dot_product_attention
                return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        ways["sdpa math under jvp"] = func_jvp(math)
    return ways


def measure(op: Op, case: Case, dtype: torch.dtype, ceiling: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    args = op.inputs(case, dtype, DEVICE, generator)
    dots = {k: torch.randn(args[k].shape, generator=generator).to(DEVICE, dtype)[: case.b] for k in case.live}
    differentiable = op.differentiable or [
        k for k, v in args.items() if isinstance(v, Tensor) and v.is_floating_point()
    ]
    leaves = [args[k].requires_grad_() for k in differentiable]
    ways = providers(op, case, args, dots)
    want = [y.detach().float() for y in ways["lift"]()]
    values = len(want) // 2 if dots else len(want)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name, way in ways.items():
        got = [y.detach().float() for y in way()]
        errors[name] = max(
            ((g - w).norm() / w.norm().clamp_min(1e-30)).item() for g, w in zip(got, want, strict=True) if w.numel()
        )
        if errors[name] > 0.05:
            continue

        def both(way: Call = way) -> None:
            y = [o for o in way()[:values] if o.requires_grad]
            torch.autograd.grad(y, leaves, [torch.ones_like(o) for o in y], allow_unused=True)

        calls[f"{name}|forward"] = torch.no_grad()(way)
        calls[f"{name}|forward + backward"] = both
    took = milliseconds(calls, rounds)
    cost = op.cost(case, dtype.itemsize)
    rows = []
    for name, ms in took.items():
        provider, mode = name.split("|")
        p20, p50, p80 = (sorted(ms)[int(q * (len(ms) - 1))] for q in (0.2, 0.5, 0.8))
        row = dict(
            op=op.name, case=case.name, shape=dict(case.shape), dtype=str(dtype)[6:], provider=provider, mode=mode
        )
        row |= dict(ms_20=p20, ms=p50, ms_80=p80, error=errors[provider])
        row["to_lift"] = statistics.median(a / b for a, b in zip(ms, took[f"lift|{mode}"], strict=True))
        if mode == "forward":
            row["copy_share"] = cost.bytes / p50 * 1e3 / ceiling["bytes_s"]
            row["product_share"] = cost.flops / p50 * 1e3 / ceiling["flop_s"]
        rows.append(row)
    wrong = [dict(op=op.name, case=case.name, provider=k, error=e) for k, e in errors.items() if e > 0.05]
    return rows + wrong


def main(names: list[str]) -> None:
    dtype, rounds = (torch.bfloat16, 30) if GPU else (torch.float32, 3)
    ceiling = ceilings(dtype)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = dict(device=device_name(), torch=torch.__version__, triton=triton.__version__, commit=revision) | ceiling
    print(head, flush=True)
    rows: list[dict[str, Any]] = []
    out = OUT / device_name() / "ops.json"
    for op in REGISTRY.values():
        for case in op.cases:
            if "bench" not in case.tags or (names and op.name not in names):
                continue
            rows += measure(op, case, dtype, ceiling, rounds)
            for row in (r for r in rows if (r["op"], r["case"]) == (op.name, case.name)):
                print(
                    " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items() if k != "shape"),
                    flush=True,
                )
            if GPU and not names:  # absolute times of a CPU are no record
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(dict(head=head, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
