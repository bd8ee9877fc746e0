"""All that only a GPU can tell, in one command and within a time: parity, tuning, timings; `make gpu`. Needs torch,
triton, numpy and pytest, and nothing installed (PYTHONPATH=kernels:.).

Each part writes what it has as it goes: parity to profiles/<device>/parity.json, tune to the chip's file in
kernels/emf_kernels/configs, kernels and ops to profiles/<device>/kernels.json and ops.json, graphs to
profiles/<device>/graphs.json, step to
profiles/<device>/step-*.json.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from typing import Any

import torch

from bench.records import PROFILES, device_name, revision, write_record
from emf.errors import as_command
from emf.files import write_text

# each with the share of the time after which it ends
PARTS = {"parity": 0.3, "tune": 0.5, "kernels": 0.6, "ops": 0.75, "graphs": 0.82, "step": 1.0}
SWEEPS = {"step": ["sweep"]}
TESTS = [f"tests/kernels/test_{name}.py" for name in ("ops", "kernels", "attention", "hazards", "transforms")]


def parity(seconds: float) -> bool:
    """The GPU's tests, spread over the cores: compiling takes the time. What has not run when the time is over is
    counted as not run."""
    out = PROFILES / device_name() / "parity.json"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *TESTS, "-k", "not cpu"]
    command += ["-n", str(max(1, (os.cpu_count() or 2) - 2)), "--dist", "worksteal"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = threading.Timer(seconds, child.send_signal, [signal.SIGINT])  # pytest then reports what it has
    watch.start()
    started, counts, lines = time.monotonic(), defaultdict[str, Counter[str]](Counter), []
    assert child.stdout is not None
    try:
        for line in child.stdout:
            lines.append(line)
            if ran := re.search(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) \S+::(test_\w+)(?:\[(\w+))?", line):
                counts[ran[3] or ran[2]][ran[1].lower()] += 1
        child.wait()
    finally:
        watch.cancel()
        child.terminate()  # where this command was asked to end; else it has ended
    failures = [line.strip() for line in lines if line.startswith(("FAILED", "ERROR"))]
    head: dict[str, Any] = dict(device=device_name(), torch=torch.__version__, commit=revision())
    head |= dict(closing=lines[-1].strip(), seconds=round(time.monotonic() - started))
    rows: list[dict[str, Any]] = [{"tests": name, **count} for name, count in sorted(counts.items())]
    write_record(out, dict(head=head, rows=rows, failures=failures))
    write_text(out.parent / "parity.log", "".join(lines))  # the tracebacks of what failed
    for row in rows:
        print(row, flush=True)
    print(*failures[:40], head["closing"], sep="\n", flush=True)
    return child.returncode == 0


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
    with as_command():
        main()
