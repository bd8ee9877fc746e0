"""What a training step costs the host: CPU time of Python and PyTorch, kernels left out.

At a micro-batch of one, which is EMF's own setting, a step of the 1.6B model is bound by the host: the GPU waits for
Python. This bench measures that part without a GPU. The model has the depth of the 1.6B (20 blocks) and tiny widths, so
that arithmetic costs nothing, and every Triton launch is replaced by a function that does nothing. What is left is what
the host does in every step: checks, allocations, autograd, dispatch of PyTorch's own operators.

All ways run in one process and in turn (A B C A B C ...), so that their ratios hold on a machine whose speed drifts.
Times are CPU time of one thread. Not in them: Triton's own launch (some ten microseconds each; `launches` says how many
there are), the optimizer, and the data.

    fm              ours, flow matching: forward and backward
    dual 1, 0.5     ours: value and tangent in one pass, for all samples or the share that carries one
    dual 1, compiled    the same with its blocks compiled, as `--compile` has them
    diffusers fm    flow matching on diffusers' SanaTransformer2DModel
    practice        diffusers' model: torch.func.jvp without a graph, then a second forward that has one

Compiled blocks are what the compiler makes for a GPU, Triton code and its calls, for which it is told that a CPU takes
Triton; its kernels are left out as ours are.

Run it with `python -m bench.host`; it writes profiles/cpu/host.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read by triton.jit at import: a launch must be a launch, to be left out

import torch
import torch._inductor.scheduler
import torch.utils._triton
import triton
from torch import Tensor
from torch._dynamo.device_interface import CpuInterface
from torch._inductor.async_compile import AsyncCompile
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.compiled import with_compiled_blocks
from bench.providers import Released, Setting, Size, Step, dual, fm
from bench.records import PROFILES, revision, write_record
from emf.errors import as_command
from emf.model.sizes import TransformerConfig
from emf_kernels import Op

LAYERS = 20  # of SANA-1.5 1.6B
BASE = "diffusers fm"


def tiny(layers: int, batch: int) -> Size:
    """A model as deep as asked for and as narrow as the kernels take."""
    model = TransformerConfig(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        caption_channels=32,
        sample_size=4,
        dual_time=True,
    )
    return Size(model, batch=batch, condition=4)


@contextmanager
def without_launches() -> Iterator[list[str]]:
    """Kernels are not launched; the names of those that would have been are listed."""
    names: list[str] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names.append(self.fn.__name__)

    def as_on_a_gpu(self: Op, x: Tensor) -> str:
        return "reference" if self.triton is None else "triton"

    chosen = mock.patch.object(Op, "backend_for", as_on_a_gpu)
    # which would refuse a compiled kernel off a GPU; no mock, since torch.compile reads it
    refusals = mock.patch("emf_kernels.op.check_kernel_dtype", lambda *_: None)
    with mock.patch.object(JITFunction, "run", run), chosen, refusals:
        yield names


class Unlaunched:
    """A kernel of a compiled block."""

    def __init__(self, name: str, names: list[str]) -> None:
        self.name, self.names = name, names

    def run(self, *args: Any, **kwargs: Any) -> None:
        self.names.append(self.name)


@contextmanager
def compiling_for_triton(names: list[str]) -> Iterator[None]:
    """torch.compile of what is on a CPU makes Triton kernels, which are not compiled further; the names of those that
    would have been launched are listed."""
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    triton.runtime.driver.set_active(driver)

    def made(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Unlaunched:
        return Unlaunched(name, names)

    with ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(cpu_backend="triton", compile_threads=1, fx_graph_cache=False))
        stack.enter_context(mock.patch.object(AsyncCompile, "triton", made))
        for module in (torch.utils._triton, torch._inductor.scheduler):
            stack.enter_context(mock.patch.object(module, "has_triton", lambda: True))
        checked = mock.patch.object(CpuInterface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None))
        stack.enter_context(checked)
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def _loss(step: Step, s: Setting) -> Tensor:
    return step(s)[0]


def ways(s: Setting) -> dict[str, Callable[[], Tensor]]:
    """By name: a step's loss, with its graph."""
    own = lambda s: s.net  # noqa: E731
    ours: dict[str, Any] = {"fm": fm(own), "dual 1": dual(1, own)}
    if s.size.batch > 1:
        ours["dual 0.5"] = dual(0.5, own)
    net = with_compiled_blocks(s.net)
    ours["dual 1, compiled"] = dual(1, lambda _: net)
    made: dict[str, Callable[[], Tensor]] = {name: partial(_loss, step, s) for name, step in ours.items()}
    theirs = Released(s)

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return theirs.velocity(z, r, t, s.c)

    def flow_matching() -> Tensor:
        return (velocity(s.z, s.t, s.r) - s.v).square().flatten(1).mean(1).mean()

    def practice() -> Tensor:
        with torch.no_grad():
            at, along = (s.z, s.t, s.r), (s.v, torch.ones_like(s.t), torch.zeros_like(s.r))
            u_dot = torch.func.jvp(velocity, at, along)[1]
        return (velocity(s.z, s.t, s.r) - s.v + u_dot).square().flatten(1).mean(1).mean()

    return made | {BASE: flow_matching, "practice": practice}


def measure(layers: int = LAYERS, batch: int = 1, rounds: int = 15) -> dict[str, Any]:
    """The record: for each way the CPU milliseconds of a step (median and range), its ratio to diffusers' flow
    matching (median of pairs and range) and its launches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        s = Setting(tiny(layers, batch), torch.float32)
        steps = ways(s)
        times: dict[str, list[float]] = {name: [] for name in steps}
        launches = dict.fromkeys(steps, 0)
        with without_launches() as names, compiling_for_triton(names):
            for i in range(rounds + 2):  # the first two warm up
                for name, step in steps.items():
                    names.clear()
                    start = time.process_time()
                    step().backward()
                    took = time.process_time() - start
                    launches[name] = len(names)
                    if i > 1:
                        times[name].append(took)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name, taken in times.items():
        ratios = sorted(a / b for a, b in zip(taken, times[BASE], strict=True))
        row: dict[str, Any] = dict(way=name, ms=1e3 * statistics.median(taken), ms_low=1e3 * min(taken))
        row |= dict(ms_high=1e3 * max(taken), ratio=statistics.median(ratios), ratio_low=ratios[0])
        rows.append(row | dict(ratio_high=ratios[-1], launches=launches[name]))
    head = dict(layers=layers, batch=batch, rounds=rounds, torch=torch.__version__, commit=revision())
    return dict(head=head, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if min(options.layers, options.batch, options.rounds) < 1:
        parser.error("layers, batch and rounds must each be at least 1")
    record = measure(options.layers, options.batch, options.rounds)
    for row in record["rows"]:
        low, high = row["ratio_low"], row["ratio_high"]
        print(
            f"{row['way']:16} {row['ms']:7.1f} ms   {row['ratio']:.2f} ({low:.2f} to {high:.2f}) x {BASE}"
            f"   {row['launches']} launches"
        )
    file = PROFILES / "cpu" / "host.json"
    write_record(file, record)
    print(f"record: {file}")


if __name__ == "__main__":
    with as_command():
        main()
