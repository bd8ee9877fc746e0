"""The records of `bench/static.py`, made in parallel and held: `make static`, `make static CHECK=1`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import calibrate, cycles
from bench.records import write_record_rows
from bench.static import ARCHS, STATIC, bench_cases, named, row
from bench.worse import failures
from emf.errors import as_command
from emf_kernels import REGISTRY

KEPT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "emf-static"
"""Finished rows, by source: a kernel that has not changed is not compiled again."""
SHOWN = ("arch", "op", "kernel", "case", "launch", "registers", "spill_bytes", "binding", "simulated_us", "floor_us")
Row = dict[str, Any]


def recorded(arch: str) -> list[Row]:
    return json.loads((STATIC / f"{arch}.json").read_text())


def work(task: tuple[str, str, str]) -> list[Row]:
    arch, op, case = task
    found = named(arch, REGISTRY[op], next(c for c in REGISTRY[op].cases if c.name == case))
    return [row(name, one, KEPT) for name, one in found]


QUICK = """sm_90 adaln sana-1.6b _fwd dual
sm_90 attention self-64 _fwd plain
sm_90 gated_residual sana-1.6b _fwd dual
sm_90 glumbconv sana-1.6b _fwd plain
sm_90 linear_attention sana-1.6b _apply plain
sm_90 rmsnorm sana-1.6b _bwd bwd
sm_80 attention self-64 _fwd plain
sm_86 linear_attention sana-1.6b _states plain
sm_100 attention self-64 _fwd plain
sm_120 adaln sana-1.6b _bwd bwd"""
"""Launches of every kind that compile fast, which the tests hold to the record."""


def quick() -> Iterator[Row]:
    for line in QUICK.splitlines():
        arch, op, case, kernel, phase = line.split()
        for named_row, one in named(arch, REGISTRY[op], next(c for c in REGISTRY[op].cases if c.name == case)):
            if (named_row["kernel"], named_row["launch"]) == (kernel, phase):
                yield row(named_row, one)


def every(archs: Iterable[str], names: list[str]) -> Iterator[Row]:
    """Rows of all launches, compiled by as many processes as there are cores, in a fixed order."""
    tasks = [(arch, op.name, case.name) for arch in archs for op, case in bench_cases(names)]
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        for found in pool.map(work, tasks):
            yield from found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="default: every op with a kernel, and write the records")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a bound is worse than recorded")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="check the few launches that the tests check")
    options = parser.parse_args()
    if unknown := set(options.ops) - {op.name for op, _ in bench_cases([])}:
        parser.error(f"no kernel {', '.join(sorted(unknown))}")
    if cycles.njit is None and not (options.check or options.quick or options.ops):
        parser.error("no numba here, without which no time is simulated: pip install numba")
    archs, found = options.arch or ARCHS, []
    for made in quick() if options.quick else every(archs, options.ops):
        found.append(made)
        print(*(made[k] for k in SHOWN), flush=True)
    if options.check or options.quick:
        lost = failures((r for arch in archs for r in recorded(arch)), found)
        print(*lost or [f"{len(found)} launches: none is worse than recorded"], sep="\n")
        sys.exit(1 if lost else 0)
    if not options.ops:
        for arch in archs:
            write_record_rows(STATIC / f"{arch}.json", (r for r in found if r["arch"] == arch))
        calibrate.main()


if __name__ == "__main__":
    with as_command():
        main()
