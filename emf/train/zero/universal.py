"""A checkpoint taken up by other ranks, or at another ZeRO stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

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


class Whole(NamedTuple):
    """What an optimizer holds, each weight's whole, however it was sharded when it was saved."""

    read: Callable[[str, str], Tensor]
    """By a weight's name, and `fp32`, `exp_avg` or `exp_avg_sq`: the weight, or a moment of Adam's."""
    step: float
    """Of Adam's."""


def of_universal(folder: Path, first: str) -> Whole:
    """A universal checkpoint, in which each weight, the first among them, has a folder.

    DeepSpeed's own reader takes Adam's step from where only the stage that reads would have written it, and at stage 3
    refuses what the others wrote."""

    def load(file: Path) -> Any:
        return torch.load(file, map_location="cpu", weights_only=False)

    def read(name: str, key: str) -> Any:
        value = load(folder / name / f"{key}.pt")
        return value["param"] if isinstance(value, dict) else value

    if (folder / first / "step.pt").is_file():
        return Whole(read, float(read(first, "step")))
    whole = load(folder / "optimizer_state.pt")
    return Whole(read, float(whole["optimizer_state_dict"]["state"][0]["step"]))


def of_stage_0(checkpoint: Path, names: Sequence[str]) -> Whole:
    """A checkpoint of stage 0, where nothing is sharded; names: of the trained weights, in the order in which they were
    given to the optimizer."""
    file = checkpoint / "engine" / "mp_rank_00_model_states.pt"
    saved = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    optimizer = saved["optimizer"]
    state = optimizer.get("optimizer_state_dict", optimizer)["state"]
    place = {name: i for i, name in enumerate(names)}
    masters = [x for group in optimizer.get("fp32_groups", ()) for x in group]  # of bfloat16's weights
    if len(state) != len(names):
        raise ValueError(f"{file.name} holds {len(state)} trained weights; expected {len(names)}")

    def read(name: str, key: str) -> Tensor:
        if key != "fp32":
            return state[place[name]][key]
        return masters[place[name]] if masters else saved["module"][name]

    return Whole(read, float(state[0]["step"]))


def load_sharded(
    whole: Whole, optimizer: Any, trainable: dict[str, nn.Parameter], stage: int, device: torch.device
) -> None:
    """Into DeepSpeed's optimizer of stage 1, 2 or 3 and the trainable weights by name."""
    moments: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for key in ("exp_avg", "exp_avg_sq", "fp32"):  # what comes last stays where the weights are
            for name, p in trainable.items():
                shape = p.ds_shape if stage == 3 else p.shape  # type: ignore[attr-defined]
                safe_set_full_fp32_param(p, whole.read(name, key).float().view(shape).to(device))
            moments[key] = [x.detach().clone() for x in partitions(optimizer, stage)]
        for i, flat in enumerate(partitions(optimizer, stage)):
            _take_moments(optimizer.optimizer, flat, whole.step, moments["exp_avg"][i], moments["exp_avg_sq"][i])
        spread(optimizer, stage)


def load_unsharded(
    whole: Whole, optimizer: Any, trainable: dict[str, nn.Parameter], masters: dict[int, Tensor]
) -> None:
    """Into the optimizer of stage 0, and into the weights by name, of which some have a float32 master by their id."""
    with torch.no_grad():
        for name, p in trainable.items():
            weight = masters.get(id(p), p)
            weight.copy_(whole.read(name, "fp32").view_as(weight))
            p.copy_(weight)
            moments = (whole.read(name, key).view_as(weight).to(weight.device) for key in ("exp_avg", "exp_avg_sq"))
            _take_moments(getattr(optimizer, "optimizer", optimizer), weight, whole.step, *moments)


def _take_moments(adam: Any, weight: Tensor, step: float, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    where = weight.device if adam.param_groups[0].get("fused") else None
    # copies: what was read may lie in a file
    moments = dict(exp_avg=exp_avg.float().clone(), exp_avg_sq=exp_avg_sq.float().clone())
    adam.state[weight] = {"step": torch.tensor(step, device=where), **moments}


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
