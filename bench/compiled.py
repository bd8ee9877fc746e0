"""A training step with its blocks compiled (`--compile`) against the eager one, by a clock, on a CPU:
profiles/cpu/compiled-<kind of core>.json.

Ours at several shares, flow matching, and the released step, which is compiled whole: forward, and torch.func.jvp. All
rounds are interleaved in one run; a ratio is the median of pairs, of compiled steps to compiled flow matching and of
eager ones to eager flow matching. A way whose du/dt is not that of the eager dual is an error.

Run it with `python -m bench.compiled`; compilation takes most of its minutes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.providers import SIZES, Released, Setting, Step, dual, fm
from bench.records import PROFILES, core, revision, write_record
from bench.step import seconds
from emf.errors import as_command
from emf.model.transformer import Transformer
from emf.train.faster import compiled

SHARES = (1, 0.5, 0.25)
APART = 1e-4


def with_compiled_blocks(net: Transformer) -> Transformer:
    """The same weights."""
    other = copy.deepcopy(net)
    for block in other.transformer_blocks:
        block.forward = compiled(block)
    return other


class Compiled(Released):
    """The released step, its forward and its jvp each one compiled function."""

    def __call__(self, s: Setting) -> Any:
        before, s.wrap = s.wrap, lambda fn: torch.compile(fn, dynamic=False)
        try:
            return super().__call__(s)
        finally:
            s.wrap = before


def ways(s: Setting, released: bool) -> dict[str, tuple[Step, Any]]:
    """By name: the step, and the module whose gradients it leaves; released: the compiled released step too."""
    net, made = with_compiled_blocks(s.net), dict[str, tuple[Step, Any]]()
    for end, module in (("", s.net), (", compiled", net)):
        made[f"fm{end}"] = fm(lambda _, module=module: module), module  # type: ignore[misc]
        for share in SHARES:
            made[f"dual {share:g}{end}"] = dual(share, lambda _, module=module: module), module  # type: ignore[misc]
    for name, kind in (("paper", Released), ("paper, compiled", Compiled))[: 1 + released]:
        try:
            theirs = kind(s)
        except ImportError as error:
            print(f"{name}: diffusers is not installed ({error})", flush=True)
            continue
        made[name] = theirs, theirs.net
    return made


def measure(size: str, layers: int, rounds: int, released: bool) -> Iterator[dict[str, Any]]:
    """The record after each round; layers: instead of the size's, where that is not 0; released: as for ways."""
    chosen = SIZES[size]
    layers = layers or chosen.transformer.num_layers
    s = Setting(replace(chosen, transformer=replace(chosen.transformer, num_layers=layers)), torch.float32)
    made, took = ways(s, released), dict[str, list[float]]()
    want = made["dual 1"][0](s)[1].detach()
    for name, (step, module) in made.items():
        start = time.perf_counter()
        loss, u_dot = step(s)
        loss.backward()
        error = ((u_dot - want[: len(u_dot)]).norm() / want[: len(u_dot)].norm()).item() if len(u_dot) else 0.0
        if error > APART:
            sys.exit(f"compiled: {name} has another du/dt, by {error:.0e}")
        module.zero_grad()
        del loss, u_dot
        print(f"{name}: {time.perf_counter() - start:.0f} s for the first step", flush=True)
        took[name] = []
    head = dict(device="cpu", core=core(), size=size, layers=layers, threads=torch.get_num_threads())
    head |= dict(torch=torch.__version__, commit=revision())
    for i in range(rounds):
        for name, (step, module) in made.items():
            took[name].append(seconds(s, step, module))
        yield dict(head=head | {"rounds": i + 1}, rows=rows_of(took))


def rows_of(took: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Ratios: of eager steps to eager flow matching, of compiled ones to compiled; of the released step to ours too."""
    pairs = [(name, "fm, compiled" if "compiled" in name else "fm") for name in took]
    pairs += [(name, name.replace("paper", "dual 1")) for name in took if name.startswith("paper")]
    rows = []
    for name, base in [*pairs, ("fm, compiled", "fm")]:
        ratios = sorted(a / b for a, b in zip(took[name], took[base], strict=True))
        rows.append(dict(way=name, to=base, time=statistics.median(ratios), low=ratios[0], high=ratios[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("size", nargs="?", default="cpu", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=0, help="of the model; default: the size's")
    parser.add_argument("--ours", action="store_true", help="without the compiled released step")
    options = parser.parse_args()
    if min(options.rounds, options.layers + 1) < 1:
        parser.error(f"--rounds {options.rounds} --layers {options.layers}; expected at least 1 and 0")
    file = PROFILES / "cpu" / f"compiled-{core()}.json"
    for record in measure(options.size, options.layers, options.rounds, not options.ours):
        print(f"round {record['head']['rounds']} of {options.rounds}", flush=True)
        if options.size == "cpu":
            write_record(file, record)
    for row in record["rows"]:
        print(f"{row['way']:20} {row['time']:.2f} ({row['low']:.2f} to {row['high']:.2f}) x {row['to']}")


if __name__ == "__main__":
    with as_command():
        main()
