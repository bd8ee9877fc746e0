"""A plan as tables on the terminal."""

from __future__ import annotations

import shutil
from pathlib import Path

from emf.network.outline import PROMPT
from emf.show.progress import minutes
from emf.show.table import console, terminal
from emf.train.plan import GIB, STATE, Plan
from emf.train.zero import overruled


def show(p: Plan, out: Path | None = None) -> None:
    """The plan as tables on the terminal. out: the run's folder, whose disk is looked at."""
    c, screen, recipe = p.config, console(), p.config.recipe
    rows = [[part.name, f"{part.parameters:,}", f"{part.trained:,}"] for part in p.parts]
    rows.append(["together", f"{p.total:,}", f"{p.trained:,}"])
    screen.print(terminal(("what the run holds", "parameters", "trained"), rows, words=[0]))
    rows = []
    for row in p.rows:
        own = row["stage"] == p.stage
        cells = [f"{'>' if own else ''}{row['stage']}", *(f"{row[k]:.1f}" for k in STATE)]
        for kind in ("kept", "recomputed"):
            needs = p.needs(row["stage"], kind)
            cells += [f"{row[kind]:.1f}", f"{needs:.1f}" + (f" > {p.hardware.memory:g}" * (needs > p.hardware.memory))]
        rows.append(cells)
    heads = ("ZeRO", "weights", "grads", "optim", "EMA", "buffers", "others", "activations", "sum", "recomputed", "sum")
    where = f"{p.hardware.gpus} GPU{'s' * (p.hardware.gpus > 1)}"
    screen.print(terminal(heads, rows, f"{recipe}: GiB a GPU, {where}, micro-batch {p.micro_batch}"))
    needs, host = p.needs(p.stage, p.kind), p.rows[p.stage]["host"]
    fits = "fits" if needs <= p.hardware.memory else "does not fit"
    screen.print(
        f"this run: ZeRO {p.stage}, activations {p.kind}: {needs:.1f} GiB of {p.hardware.memory:g}, {fits}"
        + (f"; {host:.1f} GiB a rank in the host's memory" if host else "")
    )
    if c.data.buckets:
        screen.print("sizes by ratio have at most the square's pixels, and at least 90 % of them: all is of the square")
    if said := overruled(c):
        screen.print(f"{c.zero.json} overrules the config: {', '.join(said)}")
    shares = ", ".join(f"{k} {v / p.step_flops:.0%}" for k, v in p.flops.items() if v)
    screen.print(
        f"a step of {c.batch_size} samples: {amount(p.step_flops)}FLOP ({shares}); {p.step_seconds:.2g} s expected; "
        f"{c.steps:,} steps: " + (f"{p.days:.1f} days" if p.days > 2 else minutes(86400 * p.days))
    )
    disk = (c.run.keep + 1) * p.checkpoint
    line = (
        f"a checkpoint: {p.checkpoint / GIB:.2f} GiB; {c.run.keep} are kept, {disk / GIB:.2f} GiB while one is written"
    )
    if out is not None:
        free = shutil.disk_usage(next(f for f in (out, *out.absolute().parents) if f.exists())).free
        line += f"; {free / GIB:.1f} GiB free at {out}" + (", which is too little" * (free < disk))
    screen.print(line)
    if p.cached:
        screen.print(
            f"a cache: {p.cached / 1024:.1f} KiB a sample, {p.samples:,} of them {p.cached * p.samples / GIB:.1f} GiB"
        )
    if p.assumed:
        screen.print(f"{p.samples:,} samples are assumed, as many as EMF's: {p.assumed}")
    if c.condition.kind == "blip3o":
        screen.print(f"prompts are taken to have {PROMPT} tokens")


def amount(number: float) -> str:
    """A number with a prefix: 1.2 P for 1.2e15."""
    for sign, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= size:
            return f"{number / size:.3g} {sign}"
    return f"{number:.3g} "
