"""Runs of a tiny recipe, as tests of training and distribution start them: processes of their own, forked from one that
has imported emf.train (start-up is most of a short run)."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

PORTS = itertools.count(os.getpid())
FORKED = multiprocessing.get_context("forkserver")
# What a run imports late, where it is used, is imported before the fork too: each of hundreds of tiny runs would do so
# anew, which is more than half of its time. What is not installed is left out.
LATE = ["deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject", "deepspeed.moe.layer", "typeguard"]
LATE += ["torch._decomp.decompositions_for_jvp", "torch.profiler", "tyro._backends", "emf.model.autoencoder"]
LATE += ["transformers.models.qwen3.modeling_qwen3", "transformers.models.siglip.modeling_siglip"]
LATE += ["transformers.models.auto.modeling_auto", "diffusers.models.autoencoders.autoencoder_dc"]
FORKED.set_forkserver_preload(["emf.train.command", "emf.train.loop", "pytest", *LATE])

TINY = [
    "--batch-size",
    "8",
    "--steps",
    "6",
    "--transformer.num-layers",
    "1",
    "--transformer.num-attention-heads",
    "2",
    "--transformer.num-cross-attention-heads",
    "1",
    "--transformer.caption-channels",
    "32",
    "--encoder.hidden-size",
    "32",
    "--encoder.intermediate-size",
    "32",
    "--encoder.num-hidden-layers",
    "1",
    "--encoder.num-attention-heads",
    "2",
    "--encoder.num-key-value-heads",
    "1",
    "--encoder.head-dim",
    "16",
    "--encoder.out-channels",
    "32",
    "--run.log-every",
    "1",
    "--run.save-every",
    "3",
    "--run.eval-every",
    "0",
    "--optim.warmup",
    "0.34",
    "--optim.ema",
    "0.5",
]


def free_port() -> str:
    """A port that no other worker's test will be given, and no outgoing connection (those start at 32768)."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + 500 * (worker % 20) + next(PORTS) % 500
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return str(port)


def _child(arguments: list[str], environment: dict[str, str], output: Path, before: Callable[[], None] | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    from emf.train.command import main

    if before:
        before()
    main(arguments)


class Result(NamedTuple):
    code: int
    text: str


def train(
    folder: Path, *arguments: str, ranks: int = 1, before: Callable[[], None] | None = None, name: str = "out"
) -> Result:
    """`emf train ...` on some ranks; `before` runs in each of them first. The code is the first that is not 0."""
    output, port, processes = folder / f"{name}.txt", free_port(), []
    output.unlink(missing_ok=True)
    for rank in range(ranks):
        shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        environment = shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if ranks > 1 else {}
        process = FORKED.Process(target=_child, args=([*arguments], environment, output, before))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(600)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{arguments} hangs: {output.read_text()}")
    return Result(next((p.exitcode for p in processes if p.exitcode), 0) or 0, output.read_text())


CLOCKED = ("it_s", "samples_s", "wall_s", "memory_mib", "tflops", "mfu")


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock and the machine say."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def averaged(run: Path, step: int = 6) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:07d}" / "model.safetensors")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_training(run: Path, want: Path, base: Path, steps: int = 6) -> None:
    """Errors to 1e-4, averaged weights to 1 % of how far training moved them (Adam turns rounding into steps)."""
    got, expected = metrics(run), metrics(want)
    assert [row["step"] for row in got] == list(range(1, steps + 1))
    for key in ("loss", "error", "lr"):
        assert [row[key] for row in got] == pytest.approx([row[key] for row in expected], rel=1e-4), key
    start, a, b = load_file(base), averaged(run, steps), averaged(want, steps)
    assert a.keys() == b.keys()
    moved = torch.cat([(b[k] - start[k]).flatten() for k in start]).norm()
    apart = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    assert 0 < apart < 0.01 * moved or apart == 0 < moved, (apart, moved)


def kill_in_second_save() -> None:
    """SIGKILL on every rank while step 6 is being written."""
    kill_in_save("0000006")


def kill_in_save(step: str) -> None:
    """SIGKILL on rank 0 when a step's weights are written and its checkpoint is not whole yet."""
    from emf.weights import checkpoints

    write = checkpoints.write_file

    def torn(file: Path, *arguments: Any) -> None:
        write(file, *arguments)
        if step in str(file):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.write_file = torn
