"""Where a training step's time goes: trace.json (Chrome's format, for Perfetto), breakdown.json and breakdown.png.

One dual step under torch.profiler: data, forward (block by block), backward, optimizer, each a range in the trace and,
on a GPU, in NVTX for nsys. The breakdown sums what operators take themselves (on a GPU: their kernels) by kind and by
phase. The step is eager plain torch on a CPU and the Triton kernels on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nvtx
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.ops import DEVICE, GPU, device_name, revision
from bench.step import SIZES, Setting
from emf.flow import meanflow_loss
from emf_kernels import path

PHASES = ("data", "forward", "backward", "optimizer")
# the first pattern that an operator's or kernel's name holds decides; fused kernels by their file's name
KINDS = {
    "GEMM": ("mm", "gemm", "matmul", "nvjet", "cutlass", "_linear"),
    "attention": ("softmax", "attention", "_states", "_apply", "_bwd_q", "_bwd_kv", "flash"),
    "conv": ("conv", "glumb"),
    "norm and modulate": ("norm", "adaln", "addcmul", "mean", "var"),
    "activation": ("silu", "relu", "sigmoid", "threshold", "cos", "sin"),
    "copies": ("copy", "cat", "fill", "zero", "clone", "empty", "index"),
    "elementwise": ("add", "mul", "div", "sub", "neg", "pow", "sum", "where", "masked", "elementwise", "reduce"),
}

NAMES = (*KINDS, "optimizer", "other")


@contextmanager
def span(name: str) -> Iterator[None]:
    """A range of the trace, and of NVTX."""
    with nvtx.annotate(name), record_function(name):
        yield


@contextmanager
def spans_of(blocks: Any) -> Iterator[None]:
    """A range for each block's forward, while inside."""
    open_: list[ExitStack] = []

    def before(i: int) -> Any:
        def hook(*_: Any) -> None:
            open_.append(ExitStack())
            open_[-1].enter_context(span(f"block {i}"))

        return hook

    hooks = [block.register_forward_pre_hook(before(i)) for i, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(lambda *_: open_.pop().close()) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step(s: Setting, optimizer: torch.optim.Optimizer, share: float) -> None:
    """One step of training, its phases marked."""
    with span("data"):
        b = round(share * len(s.z))
        e = torch.randn_like(s.e)
        r = torch.where(torch.arange(len(s.r), device=s.r.device) < b, s.r, s.t)
        path(s.x, e, s.t)
    with span("forward"), spans_of(s.net.transformer_blocks):
        velocity = lambda z, t, r: s.net(z, t, r, s.c)  # noqa: E731
        loss = meanflow_loss(velocity, velocity, s.x, e, s.t, r, b, s.flow)[0].mean()
    with span("backward"):
        loss.backward()
    with span("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def kind(name: str) -> str:
    return next((k for k, words in KINDS.items() if any(word in name.lower() for word in words)), "other")


def breakdown(events: Any) -> dict[str, dict[str, float]]:
    """Microseconds by phase and kind: what each operator takes itself, on the device."""
    took: dict[str, dict[str, float]] = {phase: {} for phase in (*PHASES, "outside")}
    ranges = [(e.name, e.time_range.start, e.time_range.end) for e in events if e.name in PHASES]
    for event in events:
        own = event.self_device_time_total if GPU else event.self_cpu_time_total
        if event.name in PHASES or event.name.startswith("block ") or not own:
            continue
        phase = next((n for n, start, end in ranges if start <= event.time_range.start < end), "outside")
        if GPU and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        what = "optimizer" if phase == "optimizer" else kind(event.name)
        took[phase][what] = took[phase].get(what, 0.0) + own
    return {phase: kinds for phase, kinds in took.items() if kinds}


def plot(took: dict[str, dict[str, float]], title: str, file: Path) -> None:
    """A bar a phase, stacked by kind, as shares of the step."""
    whole = sum(sum(kinds.values()) for kinds in took.values())
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(took) + 1.6))
    colors = dict(zip(NAMES, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for row, (_, kinds) in enumerate(took.items()):
        left = 0.0
        for name in (k for k in NAMES if k in kinds):
            width = 100 * kinds[name] / whole
            axes.barh(row, width, left=left, color=colors[name], label=name)
            if width > 4:
                axes.text(left + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
            left += width
    axes.set_yticks(range(len(took)), list(took))
    axes.invert_yaxis()
    axes.set_xlabel("% of the step's operators")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = {name: handles[labels.index(name)] for name in NAMES if name in labels}
    axes.legend(
        unique.values(), unique.keys(), fontsize=7, ncols=1, bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False
    )
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("size", nargs="?", default="cpu", choices=list(SIZES))
    parser.add_argument("--share", type=float, default=0.5, help="of the samples with a tangent")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        parser.error(f"--share {options.share}; expected 0 to 1")
    s = Setting(SIZES[options.size], torch.bfloat16 if GPU else torch.float32)
    optimizer = torch.optim.AdamW(s.net.parameters(), lr=0.0)
    print(f"{options.size}: one step to warm up, one under the profiler", flush=True)
    step(s, optimizer, options.share)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        step(s, optimizer, options.share)
        if GPU:
            torch.cuda.synchronize()
    options.out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(options.out / "trace.json"))
    took = breakdown(profiler.events())
    whole = sum(sum(kinds.values()) for kinds in took.values())
    shares = {p: {k: v / whole for k, v in sorted(kinds.items(), key=lambda i: -i[1])} for p, kinds in took.items()}
    head = dict(device=device_name(), size=options.size, share=options.share, dtype=str(s.dtype)[6:])
    head |= dict(torch=torch.__version__, commit=revision())
    (options.out / "breakdown.json").write_text(json.dumps(dict(head=head, shares=shares), indent=1) + "\n")
    title = f"One dual step, {options.share:.0%} of the samples with a tangent ({options.size}, {DEVICE})"
    plot(took, title, options.out / "breakdown.png")
    for phase, kinds in shares.items():
        print(f"{phase:10} {sum(kinds.values()):5.1%}  " + "  ".join(f"{k} {v:.1%}" for k, v in kinds.items()))
    print(f"open {options.out}/breakdown.png; {options.out}/trace.json in ui.perfetto.dev or chrome://tracing")


if __name__ == "__main__":
    main()
