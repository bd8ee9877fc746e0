"""What each way to the tangent can be combined with: ZeRO-3, activation checkpointing, torch.compile. Every combination
is run on a tiny model and held to the same step without it: profiles/capabilities.json.

yes: same du/dt, same weights after an optimizer step, and under checkpointing less held for backward. Otherwise no, and
why. torch.compile traces the whole function without a break (backend aot_eager: what is traced, not how fast it is).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.meters import Held
from bench.providers import (
    SIZES,
    Released,
    Setting,
    Step,
    double_backward,
    dual,
    finite_difference,
    fm,
    func_jvp,
    no_grad_and_forward,
)
from bench.records import PROFILES, revision, write_record
from bench.step import CAPABILITIES
from emf.errors import as_command
from emf.recipes import RECIPES
from emf.train.zero import Engine, process_group

FILE = PROFILES / "capabilities.json"
LR = 1e-3
Made = tuple[Setting, Step, Any]


def own(step: Callable[[Callable[[Setting], Any]], Step]) -> Callable[[], Made]:
    """A way on our model, called by way of s.net, which may be wrapped."""

    def make() -> Made:
        s = Setting(SIZES["tiny"], torch.float32)
        return s, step(lambda s: s.net), s.net

    return make


def on_diffusers() -> Made:
    s = Setting(SIZES["tiny"], torch.float32)
    released = Released(s)
    return s, released, released.net


WAYS: dict[str, Callable[[], Made]] = {
    "fm": own(fm),
    **{f"dual {share:g}": own(partial(dual, share)) for share in (1, 0.75, 0.5, 0.25, 0)},
    "paper": on_diffusers,
    "func.jvp": own(lambda _: func_jvp),
    "no_grad jvp + forward": own(lambda _: no_grad_and_forward),
    "double backward": own(lambda _: double_backward),
    "finite difference": own(lambda _: finite_difference),
}


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def stepped(made: Made, stage: Literal[0, 3]) -> tuple[Tensor, Tensor]:
    """(u_dot, the weights) after one optimizer step under DeepSpeed."""
    s, step, module = made
    config = RECIPES["digits"]()
    config = replace(config, batch_size=len(s.t), zero=replace(config.zero, stage=stage))
    engine = Engine(module, config)
    if isinstance(step, Released):
        step.net = engine.engine
    else:
        s.net = engine.engine
    loss, u_dot = step(s)
    engine.backward(loss)
    engine.step(LR, 0)
    return u_dot.detach(), torch.cat([p.flatten() for p in engine.weights(average=False).values()])


def gradients(made: Made) -> tuple[Tensor, Tensor, int]:
    """(u_dot, every gradient, bytes held at most for backward)."""
    s, step, module = made
    held = Held({p.untyped_storage().data_ptr() for p in module.parameters()})
    with held.watch():
        loss, u_dot = step(s)
    loss.backward()
    every = [p.grad for p in module.parameters() if p.grad is not None]
    return u_dot.detach(), torch.cat([g.flatten() for g in every]), held.peak


def with_zero_3(make: Callable[[], Made]) -> str:
    want, got = stepped(make(), 0), stepped(make(), 3)
    if len(want[0]) and difference(got[0], want[0]) > 1e-4:
        return f"no: another du/dt, by {difference(got[0], want[0]):.0e}"
    moved = (got[1] - want[1]).abs().mean().item() / LR
    return "yes" if moved < 1e-2 else f"no: other gradients (the weights' steps differ by {moved:.0e})"


def with_checkpointing(make: Callable[[], Made]) -> str:
    want, made = gradients(make()), make()
    s, step, module = made
    if step.__qualname__.startswith(("fm", "dual")) if hasattr(step, "__qualname__") else False:
        s.net = module = s.lean()
    else:
        for block in module.transformer_blocks:  # PyTorch's own; the one to use under forward mode
            run = block.forward
            block.forward = lambda *a, run=run, **kw: checkpoint(run, *a, use_reentrant=False, **kw)
    got = gradients((s, step, module))
    return compared(got, want) or ("yes" if got[2] < 0.8 * want[2] else f"no: holds {got[2] / want[2]:.0%} as much")


def with_compile(make: Callable[[], Made]) -> str:
    want, made = gradients(make()), make()
    torch._dynamo.reset()
    made[0].wrap = lambda fn: torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=False)
    return compared(gradients(made), want) or "yes"


def compared(got: tuple[Tensor, Tensor, int], want: tuple[Tensor, Tensor, int]) -> str:
    """What is wrong with a step; empty where nothing is."""
    if len(want[0]) and difference(got[0], want[0]) > 1e-4:
        return f"no: another du/dt, by {difference(got[0], want[0]):.0e}"
    return "" if difference(got[1], want[1]) < 1e-4 else f"no: other gradients, by {difference(got[1], want[1]):.0e}"


TRIES = dict(zip(CAPABILITIES, (with_zero_3, with_checkpointing, with_compile), strict=True))


def attempt(way: str, capability: str) -> str:
    """yes, or no and why. Inside process_group()."""
    try:
        return TRIES[capability](WAYS[way])
    except Exception as error:  # whatever a foreign combination raises is the finding
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"no: {type(error).__name__}: {lines[0].strip() if lines else ''}"[:160]


def read(file: Path = FILE) -> dict[str, dict[str, str]]:
    """By way and capability."""
    rows: dict[str, dict[str, str]] = json.loads(file.read_text())["rows"]
    return rows


def main() -> None:
    rows: dict[str, dict[str, str]] = {}
    with process_group():
        for way in WAYS:
            rows[way] = {}
            for capability in CAPABILITIES:
                rows[way][capability] = attempt(way, capability)
                print(way, capability, rows[way][capability], sep=" | ", flush=True)
    head = dict(torch=torch.__version__, size="tiny", commit=revision())
    write_record(FILE, dict(head=head, rows=rows))


if __name__ == "__main__":
    with as_command():
        main()
