"""All that only a GPU can tell, in one command and within a time: parity, tuning, timings; `make gpu`. Needs torch,
triton, numpy and pytest, and nothing installed (PYTHONPATH=kernels:.).

Each part writes what it has as it goes: parity to profiles/<device>/parity.json, tune to the chip's file in
kernels/emf_kernels/configs, ops to profiles/<device>/ops.json, step to profiles/<device>/step-*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from bench.ops import OUT, device_name, revision
from emf_kernels import REGISTRY

PARTS = {"parity": 0.3, "tune": 0.5, "ops": 0.7, "step": 1.0}  # each with the share of the time after which it ends
SWEEPS = {"step": ["sweep"]}
TESTS = ["tests/kernels/test_ops.py", "tests/kernels/test_kernels.py"]


def parity(seconds: float) -> bool:
    """The GPU's tests, an op a process and as many at once as half of the cores: compiling takes the time."""
    until = time.monotonic() + seconds
    out = OUT / device_name() / "parity.json"
    head = dict(device=device_name(), torch=torch.__version__, commit=revision())
    rows: list[dict[str, Any]] = []

    def run(name: str) -> dict[str, Any]:
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *TESTS]
        mine = [f"[{op}-" for op in REGISTRY] + [f"[{op}]" for op in REGISTRY]  # an op's name begins its tests' ids
        command += ["-k", f"([{name}- or [{name}]) and not cpu" if name else f"not ({' or '.join(mine)})"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(until - started, 1))
            tail = done.stdout.strip().splitlines()[-1:] or [done.stderr[-500:]]
            failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "E  "))][:6]
        except subprocess.TimeoutExpired:
            tail, failures = ["no time left"], ["no time left"]
        counts = {k: int(n) for n, k in re.findall(r"(\d+) (passed|failed|skipped|error)", tail[0])}
        took = round(time.monotonic() - started)
        return dict(op=name or "the rest", **counts, failures=failures, closing=tail[0], seconds=took)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        for job in as_completed([pool.submit(run, name) for name in [*REGISTRY, ""]]):
            rows.append(job.result())
            print(rows[-1]["op"], rows[-1]["closing"], *rows[-1]["failures"], sep="\n  ", flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(dict(head=head, rows=rows), indent=1) + "\n")
    return not any(row["failures"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument("--seconds", type=float, default=530, help="for all parts together")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("no GPU here; `make test` and `make static` need none")
    started, right = time.monotonic(), True
    chosen = [part for part in PARTS if part in options.parts] or list(PARTS)
    for part in chosen:
        share = PARTS[part] if len(chosen) > 1 else 1.0
        left = share * options.seconds - (time.monotonic() - started)
        print(f"== {part}, {left:.0f} s", flush=True)
        if part == "parity":
            right = parity(left)
        elif subprocess.run(
            [sys.executable, "-m", f"bench.{part}", *SWEEPS.get(part, ()), "--seconds", str(left)]
        ).returncode:
            right = False
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
