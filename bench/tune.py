"""Launch configurations of the bench cases: writes kernels/emf_kernels/configs/<chip>.json after each kernel.

On a GPU, for that device: from the configuration in use, double or halve one parameter at a time and keep what is
faster. Without one, for each architecture: the default, or the nearest configuration that spills nothing and fits into
shared memory, by the compiler's figures. Needs torch and triton only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # decided when emf_kernels is first imported

import torch

from bench.chips import CHIPS
from bench.kernels import device_us
from bench.ops import outputs, require_grad
from bench.records import DEVICE, GPU, write_record_rows
from bench.static import ARCHS, bench_cases, configured, launches, measure
from emf.errors import as_command
from emf_kernels import Case, Dual, Op, launch

Config = dict[str, int]
Chips = tuple[str, ...]
LEAST = {"BLOCK_Q": 16, "BLOCK_K": 16, "BLOCK_N": 16}  # a matrix product's smallest tile
MOST = {"num_warps": 16, "num_stages": 4, "chunks": 16, "ROWS": 128}
FASTER = 0.98  # a configuration must save 2 % to be worth a change
TRIES = 16


def neighbours(config: Config) -> Iterator[Config]:
    """One parameter halved or doubled; smaller tiles first."""
    for name, value in config.items():
        for other in (value // 2, value * 2) if name != "num_stages" else (value - 1, value + 1):
            if LEAST.get(name, 1) <= other <= MOST.get(name, 1024):
                yield config | {name: other}


def figures(asking: list[tuple[Op, Case]], arch: str, key: launch.Key, config: Config) -> list[dict[str, Any]]:
    """The compiler's, of every launch that takes this configuration."""
    found = []
    for op, case in asking:
        with configured(arch, given={key: config}):
            ours = launches(op, case)
        with configured(arch, given={key: config | {"num_warps": 2 * config["num_warps"]}}):
            others = launches(op, case)
        found += [measure(a, arch) for a, b in zip(ours, others, strict=True) if a.options != b.options]
    return found


def by_figures(asking: list[tuple[Op, Case]], arch: str, key: launch.Key, config: Config) -> Config:
    """The nearest configuration, breadth first, that spills nothing, fits into shared memory, and loads 16 bytes at a
    time where the given one does; the given one where none is found."""
    queue, seen, wide = [config], [config], 0
    while queue and len(seen) <= 4 * TRIES:
        candidate = queue.pop(0)
        rows = figures(asking, arch, key, candidate)
        if candidate is config:
            wide = min(row["ldg128"] for row in rows)
        loads = min(row["ldg128"] for row in rows) > 0 or not wide
        if loads and all(
            not row["spill_bytes"] and row["shared_bytes"] <= 1024 * CHIPS[arch].shared_kib for row in rows
        ):
            return candidate
        new = [c for c in neighbours(candidate) if c not in seen]
        queue, seen = queue + new, seen + new
    return config


def call(op: Op, case: Case, backward: bool) -> Callable[[], Any]:
    """The op's dual call, or the backward of one."""
    generator = torch.Generator().manual_seed(0)
    args = op.inputs(case, torch.bfloat16, DEVICE, generator)
    dots = {k: torch.randn_like(args[k])[: case.b] for k in case.live}
    duals = {k: Dual(v, dots[k]) if k in dots else v for k, v in args.items()}
    if not backward:
        return lambda: op(**duals)
    leaves = require_grad(op, args)
    values = [v for v in outputs(op(**duals))[0] if v.requires_grad]
    dy = [torch.ones_like(v) for v in values]
    return lambda: torch.autograd.grad(values, leaves, dy, retain_graph=True, allow_unused=True)


def by_time(op: Op, case: Case, chips: Chips, key: launch.Key, config: Config, until: float) -> tuple[Config, float]:
    """(the fastest configuration found by changing one parameter at a time, its time over the given one's). Times are
    the kernel's own, by the profiler; one process measures at a time, while the others compile."""
    name = key[1].partition(".")[2]

    def timed(candidate: Config) -> float:
        with configured(*chips, given={key: candidate}):
            run = call(op, case, backward="_bwd" in name)
            run()  # compiles; raises where it does not fit
            with _measuring:
                took = device_us(run, rounds=8)
        return sum(us * count for kernel, (us, count) in took.items() if kernel == name)

    best, seen = config, [config]
    first = least = timed(config)
    better = True
    while better and time.monotonic() < until:
        better = False
        for candidate in neighbours(best):
            if candidate in seen or len(seen) > TRIES or time.monotonic() > until:
                continue
            seen.append(candidate)
            try:
                took = timed(candidate)
            except Exception as error:  # out of shared memory or registers, a tile too small: not a candidate
                print(f"  {key[1]} {candidate}: {type(error).__name__}", flush=True)
                continue
            if took < FASTER * least:
                best, least, better = candidate, took, True
                break
    return best, least / first


_measuring: AbstractContextManager[Any] = nullcontext()


def _share(lock: Any) -> None:
    """In each process of a sweep. Attention's backward is then our own kernels', which is what is tuned."""
    global _measuring
    torch.use_deterministic_algorithms(True, warn_only=True)
    _measuring = lock


def sweep(keys: list[tuple[Op, Case, launch.Key, Config]], chips: Chips, until: float) -> None:
    """Every kernel's configurations by time, as many kernels at once as there are cores."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(keys), (os.cpu_count() or 2) - 2))
    with (
        ProcessPoolExecutor(workers, context, initializer=_share, initargs=(context.Lock(),)) as pool,
        ExitStack() as last,
    ):
        last.callback(pool.shutdown, wait=False, cancel_futures=True)  # where it is asked to end, nothing more begins
        jobs = {
            pool.submit(by_time, op, case, chips, key, config, until): (op, case, key) for op, case, key, config in keys
        }
        for job in as_completed(jobs):
            op, case, key = jobs[job]
            if error := job.exception():
                print(f"{key[1]} {key[2]}: {type(error).__name__}: {error}"[:300], flush=True)
                continue
            config, gain = job.result()
            row = dict(config=config, found="sweep", case=f"{op.name} {case.name}", time_ratio=round(gain, 3))
            record(chips[0], key, dict(kernel=key[1], shape=_shape(key)) | row)
            print(chips[0], key[1], key[2], f"{gain:.3f}", *(f"{k}={v}" for k, v in config.items()), flush=True)


def _shape(key: launch.Key) -> dict[str, int]:
    return {k: int(v) for k, v in (part.split("=") for part in key[2].split())}


def record(chip: str, key: launch.Key, row: dict[str, Any]) -> None:
    """Put one row into the chip's file, in place of an older one of the same kernel and shape class."""
    file = launch.CONFIGS / f"{chip}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows = {launch.key(chip, r["kernel"], r["shape"]): r for r in rows} | {key: row}
    write_record_rows(file, (rows[k] for k in sorted(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="default: every op with a kernel")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop the sweep of a GPU after this time")
    options = parser.parse_args()
    names = sorted({op.name for op, _ in bench_cases([])})
    unknown = sorted(set(options.ops) - set(names))
    if unknown:
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(names)}")
    until = time.monotonic() + options.seconds
    for chips in [launch.chips(torch.cuda.current_device())] if GPU else [(arch,) for arch in ARCHS]:
        chip = chips[0]
        asked: dict[launch.Key, Config] = {}
        asking: dict[launch.Key, list[tuple[Op, Case]]] = {}
        for op, case in bench_cases(options.ops):
            with configured(*chips) as new:
                launches(op, case)
            asked |= new
            for key in new:
                asking.setdefault(key, []).append((op, case))
        keys = [(*asking[key][0], key, config) for key, config in asked.items()]
        if GPU:
            sweep(keys, chips, until)
            continue
        for _, _, key, config in keys:
            config = by_figures(asking[key], chip, key, config)
            record(chip, key, dict(kernel=key[1], shape=_shape(key), config=config, found="static"))
            print(chip, key[1], key[2], *(f"{k}={v}" for k, v in config.items()), flush=True)


if __name__ == "__main__":
    with as_command():
        main()
