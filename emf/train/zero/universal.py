"""A checkpoint taken up by other ranks, or at another ZeRO stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor, nn

from emf.train.zero.group import gather


@contextmanager
def universal(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint's engine state as DeepSpeed's universal one beside it, for the length of the block: every
    weight and moment whole, so that any number of ranks at any stage from 1 on can take its part. Called on every
    rank; the first makes it. Raises RuntimeError on every rank where it cannot be made."""
    from deepspeed.checkpoint.ds_to_universal import main as to_universal

    folder, failed = checkpoint / "universal", ""
    if dist.get_rank() == 0:
        print(f"resume: {checkpoint} is of other ranks or another ZeRO stage; making it universal", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        options = dict(input_folder=str(checkpoint / "engine"), output_folder=str(folder), strict=True)
        options |= dict(num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False)
        try:
            with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
                to_universal(SimpleNamespace(**options, inject_missing_state=True))
        except Exception as error:  # DeepSpeed's script asserts, indexes and unpickles
            failed = f"{type(error).__name__}: {' '.join(str(error).split())}"
        (checkpoint / "latest_universal").unlink(missing_ok=True)
    if failed := gather(failed)[0]:
        raise RuntimeError(f"no universal checkpoint could be made of it: {failed}")
    try:
        yield folder
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def partitions(optimizer: Any, stage: int) -> list[Tensor]:
    """The float32 weights that this rank updates, flattened as DeepSpeed's optimizer of stage 1, 2 or 3 keeps them."""
    flat: list[Tensor] = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    return flat


def load_universal(
    folder: Path, optimizer: Any, trainable: dict[str, nn.Parameter], stage: int, device: torch.device
) -> None:
    """The weights and moments of a universal checkpoint, in which each weight has a folder, into DeepSpeed's optimizer
    of stage 1, 2 or 3 and the trainable weights by name.

    DeepSpeed's own reader takes Adam's step from where only the stage that reads would have written it, and at stage 3
    refuses what the others wrote.
    """

    def read(name: str, key: str) -> Any:
        value = torch.load(folder / name / f"{key}.pt", map_location="cpu", weights_only=False)
        return value["param"] if isinstance(value, dict) else value

    moments: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for key in ("exp_avg", "exp_avg_sq", "fp32"):  # what comes last stays where the weights are
            for name, p in trainable.items():
                shape = p.ds_shape if stage == 3 else p.shape  # type: ignore[attr-defined]
                safe_set_full_fp32_param(p, read(name, key).view(shape).to(device))
            moments[key] = [x.detach().clone() for x in partitions(optimizer, stage)]
        first = next(iter(trainable))
        if (folder / first / "step.pt").is_file():
            step = read(first, "step")
        else:
            whole = torch.load(folder / "optimizer_state.pt", map_location="cpu", weights_only=False)
            step = whole["optimizer_state_dict"]["state"][0]["step"]
        flats = partitions(optimizer, stage)
        for i, flat in enumerate(flats):
            state = dict(exp_avg=moments["exp_avg"][i], exp_avg_sq=moments["exp_avg_sq"][i])
            where = flat.device if optimizer.optimizer.param_groups[0].get("fused") else None
            optimizer.optimizer.state[flat] = {"step": torch.tensor(float(step), device=where), **state}
        spread(optimizer, stage)


def spread(optimizer: Any, stage: int) -> None:
    """What DeepSpeed's optimizer of stage 1, 2 or 3 computes with, from the float32 weights that its ranks update."""
    if stage != 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for i, flat in enumerate(partitions(optimizer, stage)):
        optimizer.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
        optimizer._unflatten_partitioned_parameters(i)
    optimizer.checkpoint_event_epilogue()
