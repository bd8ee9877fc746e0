"""What each kernel takes on a GPU, by the device's own clock: writes profiles/<device>/kernels.json.

Every op at its bench cases, in bfloat16: a plain call, a call with tangents, and the backward of one, by the kernels
and by the lift of the reference (eager PyTorch); attention also by PyTorch's fused attention, which has no tangent.
The profiler reads each launch's own duration, so neither Python nor the launches themselves are in it; the L2 cache is
flushed before each call. Needs torch and triton only (PYTHONPATH=kernels:.).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from bench.ops import ceilings, outputs, require_grad
from bench.records import PROFILES, device_name, revision, write_record
from emf.errors import as_command
from emf_kernels import REGISTRY, Case, Dual, Op, backend

ROUNDS = 20
Call = Callable[[], Any]


def device_us(call: Call, rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """(microseconds of a launch, launches a call) of each kernel that a call launches, medians over the rounds."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    took: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        ours = not event.name.startswith("Mem") and "FillFunctor<unsigned char>" not in event.name  # which is the flush
        if event.device_type == torch.autograd.DeviceType.CUDA and ours:
            took[event.name].append(event.time_range.elapsed_us())
    return {name: (statistics.median(us), len(us) / rounds) for name, us in took.items()}


def parts(op: Op, case: Case) -> dict[str, Call]:
    """What is timed of one case with the backend that is in force: plain, dual, backward."""
    generator = torch.Generator().manual_seed(0)
    args = op.inputs(case, torch.bfloat16, "cuda", generator)
    dots = {k: torch.randn_like(args[k])[: case.b] for k in case.live}
    duals = {k: Dual(v, dots[k]) if k in dots else v for k, v in args.items()}
    found: dict[str, Call] = {"plain": torch.no_grad()(lambda: op(**args))}
    if dots:
        found["dual"] = torch.no_grad()(lambda: op(**duals))
    held = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    leaves = require_grad(op, held)
    values = [v for v in outputs(op(**held))[0] if v.requires_grad]
    dy = [torch.randn_like(v) for v in values]
    found["backward"] = lambda: torch.autograd.grad(values, leaves, dy, retain_graph=True, allow_unused=True)
    return found


def fused(case: Case) -> dict[str, Call]:
    """PyTorch's fused attention of the same shape."""
    op = REGISTRY["attention"]
    args = op.inputs(case, torch.bfloat16, "cuda", torch.Generator().manual_seed(0))
    q, k, v = (args[name].transpose(1, 2).detach().requires_grad_() for name in "qkv")
    run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=bool(case.shape.get("causal")))  # noqa: E731
    y = run()
    dy = torch.randn_like(y)
    backward = lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)  # noqa: E731
    return {"plain": torch.no_grad()(run), "backward": backward}


def measure(op: Op, case: Case) -> list[dict[str, Any]]:
    rows = []
    ways: dict[str, Callable[[], dict[str, Call]]] = {}
    for name in ("triton", "reference") if op.triton else ("reference",):

        def ours(name: Any = name) -> dict[str, Call]:
            with backend(name):
                return {k: partial(_within, name, f) for k, f in parts(op, case).items()}

        ways[name] = ours
    if op.name == "attention" and not case.shape.get("masked"):
        ways["PyTorch's fused attention"] = lambda: fused(case)
    for provider, make in ways.items():
        title: dict[str, Any] = dict(op=op.name, case=case.name, provider=provider)
        try:
            for launch, call in make().items():
                for kernel, (us, count) in device_us(call).items():
                    rows.append(title | dict(launch=launch, kernel=kernel[:80], us=round(us, 2), launches=count))
        except Exception as error:  # one kernel that fails must not take the others' figures with it
            rows.append(title | dict(failed=f"{type(error).__name__}: {error}"[:300]))
    return rows


def _within(name: Any, call: Call) -> Any:
    with backend(name):
        return call()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="default: every op")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after this time")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(REGISTRY):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(REGISTRY)}")
    if not torch.cuda.is_available():
        parser.error("no GPU here; `make static` says what the compiler knows")
    until = time.monotonic() + options.seconds
    head = dict(device=device_name(), torch=torch.__version__, triton=triton.__version__, commit=revision())
    head |= dict(dtype="bfloat16", rounds=ROUNDS) | ceilings(torch.bfloat16)
    print(head, flush=True)
    rows: list[dict[str, Any]] = []
    out = PROFILES / device_name() / "kernels.json"
    for op in REGISTRY.values():
        for case in op.cases:
            if "bench" not in case.tags or (options.ops and op.name not in options.ops):
                continue
            if time.monotonic() > until:
                print(f"no time left for {op.name} {case.name}", flush=True)
                continue
            new = measure(op, case)
            rows += new
            sums: dict[tuple[str, str], float] = defaultdict(float)
            for row in new:
                if "failed" in row:
                    print(op.name, case.name, row["provider"], row["failed"], flush=True)
                else:
                    sums[row["launch"], row["provider"]] += row["us"] * row["launches"]
                    if row["provider"] == "triton":
                        print(" ", op.name, case.name, row["launch"], row["kernel"], row["us"], row["launches"])
            for (launch, provider), us in sums.items():
                print(op.name, case.name, launch, provider, f"{us:.1f} us", flush=True)
            if not options.ops:  # a part would take the place of the whole record
                write_record(out, dict(head=head, rows=rows))


if __name__ == "__main__":
    with as_command():
        main()
