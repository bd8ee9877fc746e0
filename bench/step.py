"""A whole training step, forward + tangent + backward, by every way that people take to the tangent.

One model, one batch, one dtype. Rounds are interleaved (A B C A B C ...), so that ratios to plain flow matching are of
pairs in one run. Beside the time: the bytes held for backward when it begins, and at most before; floating-point
operations; operators called; and the error of du/dt against float64: a fast wrong tangent is no competitor.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.meters import Count, Held, heap_set_aside, kernels_launched, process_peak_bytes
from bench.ops import peak_bytes
from bench.providers import SIZES, Setting, Step, providers
from bench.records import GPU, PROFILES, core, device_name, revision, write_record
from emf.errors import as_command
from emf.train.hardware import peak_flops
from emf_kernels import backend

SWEEP = [(size, batch) for batch in (4, 1, 8, 2) for size in ("1.6b-1024", "1.6b-512")]
CAPABILITIES = ("ZeRO-3", "checkpointing", "compile")
RATIOS = ("saved_bytes", "saved_peak_bytes", "peak_bytes", "flops", "ops")


def truth(s: Setting) -> Tensor:
    """du/dt in float64, a sample at a time."""
    net = copy.deepcopy(s.net).double()
    parts = []
    for i in range(len(s.z)):
        z, v, t, r, c = (a[i : i + 1].double() for a in (s.z, s.v, s.t, s.r, s.c))
        with torch.no_grad(), backend("reference"):
            f = lambda z, t, r=r, c=c: net(z, t, r, c)  # noqa: E731
            parts.append(torch.func.jvp(f, (z, t), (v, torch.ones_like(t)))[1])
    return torch.cat(parts)


def facts(s: Setting, step: Step, module: nn.Module, want: Tensor) -> dict[str, Any]:
    """What does not depend on the clock."""
    held = Held({p.untyped_storage().data_ptr() for p in module.parameters()})
    module.zero_grad()
    with held.watch():
        loss, u_dot = step(s)
    saved, peak = held.live, held.peak
    del loss
    gc.collect()
    count = Count()
    module.zero_grad()
    with backend("reference"), count:
        step(s)[0].backward()
    got = u_dot.detach().double()
    error = ((got - want[: len(got)]).norm() / want[: len(got)].norm()).item() if len(got) else None
    row = dict(saved_bytes=saved, saved_peak_bytes=peak, flops=count.flops, ops=count.ops, u_dot_error=error)
    module.zero_grad()
    whole = lambda: step(s)[0].backward()  # noqa: E731
    row["peak_bytes"] = peak_bytes(whole) if GPU else process_peak_bytes(whole)
    if GPU:
        row["launches"] = kernels_launched(whole)
    return row


def seconds(s: Setting, step: Step, module: nn.Module) -> float:
    """One whole step."""
    module.zero_grad()
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(s)[0].backward()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    name: str, rounds: int, compile: bool = False, say: Callable[[str], None] = print, batch: int = 0
) -> dict[str, Any]:
    """The record of a size, of another micro-batch where batch says so: head, rows by provider, and what could not
    run."""
    size, dtype = SIZES[name], torch.bfloat16 if GPU else torch.float32
    size = replace(size, batch=batch or size.batch)
    s = Setting(size, dtype)
    weights = sum(p.numel() for p in s.net.parameters())
    say(f"{name}: {weights / 1e6:.1f}M parameters, batch {size.batch}, {size.transformer.sample_size**2} tokens")
    ways, without = providers(s, compile)
    want = truth(s)
    rows: dict[str, dict[str, Any]] = {}
    with heap_set_aside():
        for provider, (step, module) in list(ways.items()):
            try:
                rows[provider] = dict(provider=provider) | facts(s, step, module, want)
            except RuntimeError as error:
                without[provider] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
                del ways[provider]
                continue
            wrong = rows[provider]["u_dot_error"]
            say(f"  {provider}: error of du/dt {'none' if wrong is None else format(wrong, '.1e')}")
    times: dict[str, list[float]] = {provider: [] for provider in ways}
    for i in range(rounds + 1):  # the first warms up
        for provider, (step, module) in ways.items():
            took = seconds(s, step, module)
            if i:
                times[provider].append(took)
        say(f"  round {i} of {rounds}")
    for provider, row in rows.items():
        base = "fm, checkpointing" if "checkpointing" in provider else "fm"
        ratios = sorted(a / b for a, b in zip(times[provider], times[base], strict=True))
        row |= dict(time=statistics.median(ratios), time_low=ratios[0], time_high=ratios[-1], base=base)
        row |= {f"{k}_ratio": row[k] / rows[base][k] if rows[base][k] else None for k in RATIOS}
        if GPU:
            took = statistics.median(times[provider])
            peak = peak_flops(torch.cuda.get_device_name())
            row |= dict(ms=1e3 * took, mfu=row["flops"] / took / peak if peak else None)
    head = dict(
        device=device_name(),
        **({} if GPU else {"core": core()}),
        size=name,
        dtype=str(dtype)[6:],
        parameters=weights,
        batch=size.batch,
    )
    head |= dict(tokens=size.transformer.sample_size**2, condition=size.condition, rounds=rounds)
    head |= dict(torch=torch.__version__, threads=torch.get_num_threads(), commit=revision())
    return dict(head=head, rows=list(rows.values()), without=without, times=times)


def save(record: dict[str, Any]) -> None:
    """To profiles/<device>/step-<size>[-b<micro-batch>].json, without the single times; of a CPU one for each kind of
    core, which its name ends with."""
    head = record["head"]
    other = "" if head["batch"] == SIZES[head["size"]].batch else f"-b{head['batch']}"
    kind = f"-{head['core']}" if "core" in head else ""
    out = PROFILES / head["device"] / f"step-{head['size']}{other}{kind}.json"
    write_record(out, {k: v for k, v in record.items() if k != "times"})


def table(record: dict[str, Any], can: dict[str, dict[str, str]]) -> str:
    """The record as Markdown, with what each provider can be combined with (bench.capabilities)."""
    memory = "process at most" if record["head"]["device"] == "cpu" else "allocated at most"
    heads = ["provider", "time", "held for backward", "held at most", memory, "FLOPs", "operators", "error of du/dt"]
    heads += [*CAPABILITIES]
    lines = [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    for row in record["rows"]:
        error = "" if row["u_dot_error"] is None else f"{row['u_dot_error']:.0e}"
        cells = [row["provider"], f"{row['time']:.2f} ({row['time_low']:.2f} to {row['time_high']:.2f})"]
        cells += ["" if row[f"{k}_ratio"] is None else f"{row[f'{k}_ratio']:.2f}" for k in RATIOS]
        found = can.get(row["provider"].split(",")[0], {})
        cells += [error, *(found.get(name, "").partition(":")[0] for name in CAPABILITIES)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep(until: float, say: Callable[[str], None]) -> None:
    """The published sizes by micro-batch, while there is time; a record each."""
    for size, batch in SWEEP:
        if time.monotonic() > until:
            say(f"no time left for {size} at micro-batch {batch}")
            continue
        record = measure(size, 10, compile=(size, batch) == SWEEP[1], say=say, batch=batch)
        save(record)
        say(table(record, {}))
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("size", nargs="?", default="cpu", choices=[*SIZES, "sweep"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=0, help="micro-batch; default: the size's")
    parser.add_argument("--seconds", type=float, default=1e9, help="of a sweep (1.6b by micro-batch; needs a GPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference dual too")
    options = parser.parse_args()
    if min(options.rounds, options.batch + 1) < 1:
        parser.error(f"--rounds {options.rounds} --batch {options.batch}; expected at least one round and one sample")
    say = lambda line: print(line, flush=True)  # noqa: E731
    if options.size == "sweep":
        if not GPU:
            parser.error("a sweep of the published sizes needs a GPU")
        return sweep(time.monotonic() + options.seconds, say)
    record = measure(options.size, options.rounds, options.compile, say, options.batch)
    save(record)
    print(table(record, {}))
    for provider, why in record["without"].items():
        print(f"{provider}: {why}")


if __name__ == "__main__":
    with as_command():
        main()
