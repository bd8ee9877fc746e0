"""Where a training step's time and memory go: runs/profile/trace.json (Chrome's format, for Perfetto) and figures;
profiles/<device>/profile-<size>.json holds what they show.

One dual step under torch.profiler: data, forward (block by block), backward, optimizer, each a range in the trace and,
on a GPU, in NVTX for nsys. The breakdown sums what operators take themselves (on a GPU: their kernels) by kind and by
phase; the tangent's own row is the forward's beyond that of a step without one. The roofline has every named op of the
forward. The step is eager plain torch on a CPU and the Triton kernels on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from bench import plots
from bench.ops import ceilings
from bench.providers import SIZES, Setting
from bench.records import DEVICE, GPU, PROFILES, device_name, revision
from bench.roofline import roofline
from emf.errors import as_command
from emf.files import make_folder, write_json
from emf.flow import meanflow_loss
from emf.show.plot import write_plot
from emf.train.ranges import mark_network, span

PHASES = ("data", "forward", "backward", "optimizer")
ROUNDS = 3
POINTS = 400  # of the memory curve that are kept
# the first pattern that an operator's or kernel's name holds decides; fused kernels by their file's name
KINDS = {
    "communication": ("nccl", "gloo", "c10d"),
    "GEMM": ("mm", "gemm", "matmul", "nvjet", "cutlass", "_linear"),
    "attention": ("softmax", "attention", "_states", "_apply", "_bwd_q", "_bwd_kv", "flash"),
    "conv": ("conv", "glumb"),
    "norm and modulate": ("norm", "adaln", "addcmul", "mean", "var"),
    "activation": ("silu", "relu", "sigmoid", "threshold", "cos", "sin"),
    "copies": ("copy", "cat", "fill", "zero", "clone", "empty", "index"),
    "elementwise": ("add", "mul", "div", "sub", "neg", "pow", "sum", "where", "masked", "elementwise", "reduce"),
}


def forward(s: Setting, share: float) -> torch.Tensor:
    """The loss."""
    r, b = s.times(share)
    velocity = lambda z, t, r: s.net(z, t, r, s.c)  # noqa: E731
    return meanflow_loss(velocity, velocity, s.x, s.e, (s.t, r, b), s.flow)[0].mean()


def step(s: Setting, optimizer: torch.optim.Optimizer, share: float) -> None:
    """One step of training, its phases marked."""
    with span("data"):
        s.e.normal_()
    with span("forward"):
        loss = forward(s, share)
    with span("backward"):
        loss.backward()
    with span("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def kind(name: str) -> str:
    return next((k for k, words in KINDS.items() if any(word in name.lower() for word in words)), "other")


def breakdown(events: Any) -> dict[str, dict[str, float]]:
    """Microseconds by phase and kind: what each operator takes itself, on the device; what is left of a phase's time
    on a CPU, Python and autograd's own, are the gaps between launches."""
    took: dict[str, dict[str, float]] = {phase: {} for phase in PHASES}
    ranges = [(e.name, e.time_range.start, e.time_range.end) for e in events if e.name in PHASES and not on_gpu(e)]
    for event in events:
        own = event.self_device_time_total if GPU else event.self_cpu_time_total
        if event.name in PHASES or event.name.startswith("block ") or not own or on_gpu(event) != GPU:
            continue
        phase = next((n for n, start, end in ranges if start <= event.time_range.start < end), None)
        if phase:
            what = "optimizer" if phase == "optimizer" else kind(event.name)
            took[phase][what] = took[phase].get(what, 0.0) + own
    for name, start, end in ranges:
        took[name]["launch gaps"] = max(0.0, end - start - sum(took[name].values()))
    return took


def medians(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    kinds = {phase: sorted({k for run in runs for k in run[phase]}) for phase in PHASES}
    return {p: {k: statistics.median(run[p].get(k, 0.0) for run in runs) for k in names} for p, names in kinds.items()}


def on_gpu(event: Any) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CUDA)


def timeline(profiler: Any) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """(share of the step's time, bytes allocated since it began) at the highest of POINTS stretches, and where each
    phase begins."""
    events = profiler.profiler.kineto_results.events()
    starts = {e.name(): e.start_ns() for e in events if e.name() in PHASES}
    begin = min(starts.values())
    end = max(e.start_ns() + e.duration_ns() for e in events if e.name() in PHASES)
    wanted = torch.autograd.DeviceType.CUDA if GPU else torch.autograd.DeviceType.CPU
    found = [e for e in events if e.name() == "[memory]" and e.device_type() == wanted and begin <= e.start_ns() <= end]
    found.sort(key=lambda e: e.start_ns())
    at = np.array([(e.start_ns() - begin) / (end - begin) for e in found])
    live = np.cumsum([e.nbytes() for e in found])
    parts = [part for part in np.array_split(np.arange(len(at)), POINTS) if len(part)]
    highest = [part[live[part].argmax()] for part in parts]
    shares = {name: (starts[name] - begin) / (end - begin) for name in PHASES}
    return [(float(at[i]), float(live[i])) for i in highest], shares


def measure(s: Setting, share: float) -> tuple[dict[str, Any], Any]:
    """(the record without its head, the profiler)."""
    optimizer = torch.optim.AdamW(s.net.parameters(), lr=0.0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]

    def profiled(share: float) -> Any:
        with profile(activities=activities, profile_memory=True) as profiler:
            step(s, optimizer, share)
            if GPU:
                torch.cuda.synchronize()
        return profiler

    step(s, optimizer, share)  # warms up
    pairs = [(profiled(0), profiled(share)) for _ in range(ROUNDS)]
    profiler = pairs[-1][1]
    plain, took = (medians([breakdown(pair[i].events()) for pair in pairs]) for i in (0, 1))
    both = took["forward"]
    tangent = {k: max(0.0, v - plain["forward"].get(k, 0.0)) for k, v in both.items()}
    took["forward"] = {k: v - tangent[k] for k, v in both.items()}
    took = {p: took.get(p, tangent) for p in ("data", "forward", "tangent", "backward", "optimizer")}
    whole = sum(sum(kinds.values()) for kinds in took.values())
    shares = {p: {k: v / whole for k, v in sorted(kinds.items(), key=lambda i: -i[1])} for p, kinds in took.items()}
    line, phases = timeline(profiler)
    ceiling = ceilings(s.dtype)
    rows = roofline(lambda: forward(s, share), ceiling)
    peak = max(value for _, value in line)
    record = dict(shares=shares, roofline=rows, memory=line, phases=phases, peak_bytes=peak)
    return record | dict(ceiling=ceiling), profiler


def rounded(x: Any) -> Any:
    """A record with floats of four figures."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def _alone(draw: Callable[[Axes], None], figure: Figure) -> None:
    draw(figure.subplots())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("size", nargs="?", default="cpu", choices=list(SIZES))
    parser.add_argument("--share", type=float, default=0.5, help="of the samples with a tangent")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        parser.error(f"--share {options.share}; expected 0 to 1")
    s = Setting(SIZES[options.size], torch.bfloat16 if GPU else torch.float32)
    mark_network(s.net)
    print(
        f"{options.size}: {ROUNDS} steps without tangents and {ROUNDS} with, in turn; then each op by itself",
        flush=True,
    )
    record, profiler = measure(s, options.share)
    head = dict(device=device_name(), size=options.size, share=options.share, dtype=str(s.dtype)[6:])
    ceiling = record.pop("ceiling")
    head |= dict(ridge=ceiling["flop_s"] / ceiling["bytes_s"], torch=torch.__version__, commit=revision())
    head |= ceiling if GPU else {}  # absolute rates are a GPU's
    record = dict(head=head) | record
    options.out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(options.out / "trace.json"))
    if options.size != "tiny":
        file = PROFILES / device_name() / f"profile-{options.size}.json"
        make_folder(file.parent)
        write_json(file, rounded(record), indent=None)
    for name, draw in dict(breakdown=plots.shares, roofline=plots.roof, memory=plots.memory).items():
        drawn = partial(draw, record=record)
        write_plot(options.out / f"{name}.png", partial(_alone, drawn), (8, 4), 130)
    for phase, kinds in record["shares"].items():
        print(f"{phase:10} {sum(kinds.values()):5.1%}  " + "  ".join(f"{k} {v:.1%}" for k, v in kinds.items()))
    print(f"at most {record['peak_bytes'] / 2**20:.0f} MiB beyond weights and batch ({DEVICE})")
    print(f"open {options.out}/*.png; {options.out}/trace.json in ui.perfetto.dev or chrome://tracing")


if __name__ == "__main__":
    with as_command():
        main()
