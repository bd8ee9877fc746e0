"""Peak memory of the host at the start of a run, by rank: `python -m bench.start_memory`.

Some ranks start on a base of random weights, as emf convert writes one, and take no step. What each holds is read every
few milliseconds: memory of its own, without the pages of files that it has mapped, which ranks share and the system may
drop at any time, and without what its libraries took before the run was started.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from emf.config import Config
from emf.errors import as_command
from emf.model.transformer import Transformer
from emf.recipes import digits
from emf.weights.tensors import Item, write

MIB = 2**20


def wide(layers: int) -> Config:
    """The digits' recipe with the width of SANA-1.5 1.6B, and this many of its 20 layers."""
    config = digits()
    sizes: dict[str, Any] = dict(num_attention_heads=70, attention_head_dim=32, num_cross_attention_heads=20)
    sizes |= dict(cross_attention_head_dim=112, num_layers=layers)
    return replace(config, embedder_init="duplicate", transformer=replace(config.transformer, **sizes))


def write_base(folder: Path, config: Config) -> int:
    """A converted folder of random bfloat16 weights; returns the number of parameters."""
    with torch.device("meta"):
        state = Transformer(config.transformer).state_dict()
    items = [
        Item(k, tuple(v.shape), torch.bfloat16, lambda v=v: 0.02 * torch.randn(v.shape))  # type: ignore[misc]
        for k, v in state.items()
    ]
    write(folder, "transformer", items)
    source = dict(path="random", layout="random", embedder_init="duplicate")
    (folder / "config.json").write_text(json.dumps(dict(transformer=asdict(config.transformer), source=source)))
    return sum(v.numel() for v in state.values())


def start(base: Path, layers: int, stage: Literal[0, 1, 2, 3]) -> None:
    """What a rank does up to its first step; prints by how much its own memory grew, at most, until its network was
    there, and until the first step."""
    from emf.train import loop

    config = replace(wide(layers), init=base, batch_size=2)
    config = replace(config, zero=replace(config.zero, stage=stage, dtype="bfloat16"))
    config = replace(config, optim=replace(config.optim, ema=0.0), run=replace(config.run, eval_every=0))

    before, peak = own_memory(), [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], own_memory())
            time.sleep(0.005)

    engine, built = loop.Engine, [0]

    def counted(*arguments: Any) -> Any:
        built[0] = peak[0]
        return engine(*arguments)

    def told(*_: object) -> None:
        print(f"rank {os.environ['RANK']} {(built[0] - before) / MIB:.0f} {(peak[0] - before) / MIB:.0f}", flush=True)
        os._exit(0)

    loop.Engine = counted  # type: ignore[misc,assignment]
    loop.Training.run = told  # type: ignore[method-assign,assignment]
    threading.Thread(target=watch, daemon=True).start()
    loop.train(config, base.parent / f"run{stage}")


def own_memory() -> int:
    """Bytes of this process that are neither a file's nor shared."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"^RssAnon:\s+(\d+)", text, re.MULTILINE)[0])


def measure(base: Path, layers: int, stage: int, ranks: int) -> list[tuple[str, str, str]]:
    """(rank, MiB at most until its network was there, until the first step), beside what its libraries take."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    command = [sys.executable, "-m", "bench.start_memory", "--base", str(base), "--layers", str(layers)]
    processes = [
        subprocess.Popen(
            [*command, "--stage", str(stage)],
            env=os.environ | shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = "\n".join(process.communicate()[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return sorted(re.findall(r"^rank (\d+) (\d+) (\d+)$", said, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.base is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank waits for others where Python hears no signal
        return start(asked.base, asked.layers, asked.stage)
    with tempfile.TemporaryDirectory() as folder:
        count = write_base(Path(folder) / "base", wide(asked.layers))
        print(f"{count / 1e6:.0f}M parameters: {4 * count / MIB:.0f} MiB in float32, {2 * count / MIB:.0f} in bfloat16")
        for stage in asked.stages:
            peaks = measure(Path(folder) / "base", asked.layers, stage, asked.ranks)
            said = ", ".join(f"rank {rank} {built} and {most} MiB" for rank, built, most in peaks)
            print(f"ZeRO {stage}, until the network is there and until the first step: {said}", flush=True)


if __name__ == "__main__":
    with as_command():
        main()
