"""Every op at its bench cases, value + tangent, with and without backward, by every way there is: writes
profiles/<device>/ops.json after each case. Needs torch and triton only (PYTHONPATH=kernels:.).

Rounds are interleaved, so that ratios are of one run; the L2 cache is flushed before each call. A provider that is
wrong is not timed. Shares are of the device's own measured ceilings: a copy for bytes, a matrix product for FLOPs.
SANA's cases are timed at micro-batches of 1, 4 and 16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.records import DEVICE, GPU, PROFILES, device_name, revision, write_record
from emf.errors import as_command
from emf_kernels import REGISTRY, Case, Dual, Op, backend

try:
    from jvp_flash_attention.jvp_attention import JVPAttn
except ImportError:
    JVPAttn = None

WRONG = 0.05  # relative error against the lift above which a provider is not timed
Call = Callable[[], list[Tensor]]


def outputs(y: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(values, tangents) of what an op returned."""
    every = [y] if isinstance(y, (Dual, Tensor)) else list(y)
    return [d.primal if isinstance(d, Dual) else d for d in every], [d.tangent for d in every if isinstance(d, Dual)]


def require_grad(op: Op, args: dict[str, Any]) -> list[Tensor]:
    """The differentiable arguments, which now require grad."""
    names = op.differentiable or [k for k, v in args.items() if isinstance(v, Tensor) and v.is_floating_point()]
    return [args[k].requires_grad_() for k in names]


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
    n = 2**28 if GPU else 2**26  # past every cache
    a, m = torch.empty(n, dtype=torch.uint8, device=DEVICE), 8192 if GPU else 2048
    x = torch.randn(m, m, device=DEVICE, dtype=dtype)
    took = milliseconds({"copy": lambda: a.clone(), "product": lambda: x @ x}, 20)
    return dict(
        bytes_s=2 * n / statistics.median(took["copy"]) * 1e3,
        flop_s=2 * m**3 / statistics.median(took["product"]) * 1e3,
    )


def providers(op: Op, case: Case, args: dict[str, Any], dots: dict[str, Tensor]) -> dict[str, Call]:
    """Ways to the values and tangents of the op's outputs, by name; values first."""

    def flat(y: Any) -> list[Tensor]:
        values, tangents = outputs(y)
        return values + tangents

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

            y, y_dot = torch.func.jvp(f, tuple(args[k] for k in live), tuple(dots[k] for k in live))[:2]
            return [*y, *y_dot]

        return call

    ways: dict[str, Call] = {"lift": ours("reference")}
    if op.triton and GPU:
        ways["triton"] = ours("triton")
    if op.triton and GPU and case.shape["B"] in (1, 4):  # each shape is compiled for
        compiled = torch.compile(lambda **kw: op.dual(*op.signature.bind(**kw).args) if live else op.reference(**kw))
        ways["compile"] = lambda: flat(compiled(**duals))
    if live and case.b == case.shape["B"]:
        ways["func.jvp"] = func_jvp(op.reference)
    if op.name == "linear":  # one product of (B + b) N rows; the two halves are put into one buffer first
        x, weight, bias = args["x"], args["weight"], args["bias"]
        buffer = torch.cat([x.detach(), dots["x"]])

        def stacked() -> list[Tensor]:
            y, y_dot = (buffer @ weight.mT).split([len(x), len(dots["x"])])
            return [y.add_(bias), y_dot]

        ways["stacked"] = torch.no_grad()(stacked)
    if op.name == "attention" and live and not case.shape.get("masked") and case.b == case.shape["B"]:
        if JVPAttn is not None and set(live) == set("qkv") and not case.shape.get("causal"):
            theirs = JVPAttn.fwd_dual
            ways["jvp-flash-attention"] = func_jvp(
                lambda q, k, v, **_: theirs(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
            )

        def math(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                sdpa: Any = torch.nn.functional.scaled_dot_product_attention
                return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        ways["sdpa math under jvp"] = func_jvp(math)
    return ways


def measure(op: Op, case: Case, dtype: torch.dtype, ceiling: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    args = op.inputs(case, dtype, DEVICE, generator)
    dots = {k: torch.randn(args[k].shape, generator=generator).to(DEVICE, dtype)[: case.b] for k in case.live}
    leaves = require_grad(op, args)
    ways = providers(op, case, args, dots)
    want = [y.detach().float() for y in ways["lift"]()]
    values = len(want) // 2 if dots else len(want)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    failed: list[dict[str, Any]] = []
    title = dict(op=op.name, case=case.name, shape=dict(case.shape), dtype=str(dtype)[6:])
    for name, way in ways.items():
        try:
            got = [y.detach().float() for y in way()]
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # somebody else's kernel on our shape
            failed.append(title | dict(provider=name, failed=f"{type(error).__name__}: {error}"[:200]))
            continue
        errors[name] = max(
            ((g - w).norm() / w.norm().clamp_min(1e-30)).item() for g, w in zip(got, want, strict=True) if w.numel()
        )
        if errors[name] > WRONG:
            failed.append(title | dict(provider=name, error=errors[name]))
            continue

        def both(way: Call = way) -> None:
            y = [o for o in way()[:values] if o.requires_grad]
            torch.autograd.grad(y, leaves, [torch.ones_like(o) for o in y], allow_unused=True)

        calls[f"{name}|forward"] = torch.no_grad()(way)
        if name != "stacked":
            calls[f"{name}|forward + backward"] = both
    del got, want
    for name, call in calls.items():
        peaks[name] = peak_bytes(call)
    took = milliseconds(calls, rounds)
    cost = op.cost(case, dtype.itemsize)
    rows = []
    for name, ms in took.items():
        provider, mode = name.split("|")
        p20, p50, p80 = (sorted(ms)[int(q * (len(ms) - 1))] for q in (0.2, 0.5, 0.8))
        row = title | dict(provider=provider, mode=mode, ms_20=p20, ms=p50, ms_80=p80, error=errors[provider])
        row |= dict(peak_bytes=peaks[name])
        row["to_lift"] = statistics.median(a / b for a, b in zip(ms, took[f"lift|{mode}"], strict=True))
        if mode == "forward":
            row |= dict(gb_s=cost.bytes / p50 / 1e6, tflop_s=cost.flops / p50 / 1e9)
            row["copy_share"] = cost.bytes / p50 * 1e3 / ceiling["bytes_s"]
            row["product_share"] = cost.flops / p50 * 1e3 / ceiling["flop_s"]
        rows.append(row)
    return rows + failed


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a call holds at most beyond what was there before it; 0 without a GPU."""
    if not GPU:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def bench_cases(names: list[str]) -> Iterator[tuple[Op, Case]]:
    """The micro-batch of 4 of every op first, then the others."""
    found = [
        (op, c) for op in REGISTRY.values() for c in op.cases if "bench" in c.tags and (not names or op.name in names)
    ]
    yield from found
    for op, case in found:
        for batch in {1, 4, 16} - {case.shape["B"]} if case.name.startswith("sana") else ():
            shape = {**case.shape, "B": batch}
            if "b" in shape:
                shape["b"] = case.b * batch // case.shape["B"]
            yield op, replace(case, name=f"{case.name}-b{batch}", shape=shape)


COLUMNS = (
    "op case dtype provider mode 20%_ms median_ms 80%_ms relative_error peak_bytes time/lift "
    "GB/s TFLOP/s share_of_copy share_of_product"
)
"""What the numbers of a printed row are, in their order; the last four are of a forward alone."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="default: every op")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this time")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(REGISTRY):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(REGISTRY)}")
    until = time.monotonic() + options.seconds
    dtype, rounds = (torch.bfloat16, 30) if GPU else (torch.float32, 3)
    print("measuring what the device can do: a copy, a matrix product", file=sys.stderr, flush=True)
    ceiling = ceilings(dtype)
    head = dict(device=device_name(), torch=torch.__version__, triton=triton.__version__, commit=revision()) | ceiling
    print(head, flush=True)
    print(COLUMNS, flush=True)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    out = PROFILES / device_name() / "ops.json"
    cases = list(bench_cases(options.ops))
    for number, (op, case) in enumerate(cases, 1):
        if time.monotonic() > until:
            left_out.append(f"{op.name} {case.name}")
            continue
        print(f"case {number} of {len(cases)}: {op.name} {case.name} ...", file=sys.stderr, flush=True)
        new = measure(op, case, dtype, ceiling, rounds)
        rows += new
        for row in new:
            shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items() if k != "shape")
            print(" ".join(shown), flush=True)
        if GPU and not options.ops:  # absolute times of a CPU are no record
            write_record(out, dict(head=head, rows=rows))
    if left_out:
        print("no time left for", ", ".join(left_out), flush=True)


if __name__ == "__main__":
    with as_command():
        main()
