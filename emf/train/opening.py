"""What a run says when it starts: what is trained, on what, how long, and what that will take on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from emf.config import Config


def in_steps(config: Config, samples: int | None) -> Config:
    """The config with its length in steps, where it says epochs of data of so many samples."""
    if config.epochs is None or samples is None:
        return config
    return replace(config, steps=max(1, int(config.epochs * samples / config.batch_size)), epochs=None)


def opening(config: Config, engine: Any, samples: int | None, out: Path) -> list[str]:
    """The lines of a run under an engine (emf.train.zero.Engine), with data of so many samples; None: without end."""
    sizes = {name: size_of(p) for name, p in engine.parameters.items()}
    total, trained = sum(sizes.values()), sum(sizes[name] for name in engine.trainable)
    gpu = engine.device.type == "cuda"
    device = torch.cuda.get_device_name(engine.device) if gpu else "CPU"
    dtype = str(engine.dtype).removeprefix("torch.")
    ranks = f"{engine.world} rank{'s' * (engine.world > 1)}"
    seen = config.steps * config.batch_size
    data = "the digits, drawn anew at every step"
    if samples is not None:
        data = f"{samples:,} samples from {', '.join(config.data.sources)}; seen {seen / samples:.3g} times"
    half, run = engine.dtype == torch.bfloat16, config.run
    unsaved = run.eval_every > 0 and run.eval_every % run.save_every != 0
    disk = checkpoint_bytes(sizes, engine.saved, set(engine.trainable), half=half, stage=engine.stage)
    return [
        f"{config.recipe}: {in_short(total)} parameters, {in_short(trained)} ({trained / total:.0%}) of them trained, "
        f"in {dtype} on {ranks} of {device}, ZeRO {engine.stage}",
        f"data: {data}",
        f"length: {config.steps:,} steps, {config.warmup:,} of them warm-up, of {config.batch_size:,} samples: {ranks} "
        f"x {config.zero.accumulation} micro-batches x {engine.micro_batch}",
        f"checkpoints: {decimal(disk)} each, the last {config.run.keep} kept, every {config.run.save_every:,} steps in "
        f"{out}",
        *[
            f"validation: every {run.eval_every:,} steps, some of which are not saved, for that costs more; what "
            "fails there loses the steps since the last checkpoint"
        ]
        * unsaved,
    ]


def size_of(p: Any) -> int:
    """Elements of a weight, whole where ZeRO 3 has cut it up."""
    return int(getattr(p, "ds_numel", p.numel()))


def checkpoint_bytes(sizes: dict[str, int], saved: set[str], trained: set[str], *, half: bool, stage: int) -> int:
    """About what a checkpoint takes on the disk, of weights of these sizes by name: the averaged weights in float32;
    and for DeepSpeed the weights that it computes with, in bfloat16 where half, which ZeRO 3 leaves out, two moments
    and, but without ZeRO in float32, the weights that are updated."""
    kept = saved if saved == sizes.keys() else trained  # frozen weights are left out where some are read again
    computed = 0 if stage == 3 else (2 if half else 4) * sum(sizes[name] for name in kept)
    updated = (12 if half or stage else 8) * sum(sizes[name] for name in trained)
    return 4 * sum(sizes[name] for name in saved) + computed + updated


def in_short(count: int) -> str:
    """A number of parameters: 1.60B, 107M, 5,120."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"
