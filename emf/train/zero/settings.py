"""The DeepSpeed dict of a run: it is derived from the run's config, and the user's own JSON is merged over it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from emf.config import Config
from emf.files import read_object

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}
OWN_KEYS = {  # what the config alone decides: said in a DeepSpeed JSON it would be overruled, or have no effect
    "train_batch_size": "--batch-size",
    "train_micro_batch_size_per_gpu": "--batch-size and --zero.accumulation",
    "gradient_accumulation_steps": "--zero.accumulation",
    "optimizer.params.lr": "--optim.lr",  # the loop sets it at every step
    "scheduler": "--optim.warmup and --optim.decay",
    "activation_checkpointing": "--transformer.checkpointing",
    "dataloader_drop_last": "--data.sources, of which every batch is full",
    "data_efficiency": "--data.sources and their weights",
    "curriculum_learning": "--data.sources and their weights",
    "zero_optimization.compute_grad_norm": "the default, which finds a step that is not finite,",
    "bf16.check_grad_overflow": "the default, which finds a step that is not finite,",
}


def engine_config(config: Config, world: int, out: Path | None = None) -> dict[str, Any]:
    """The DeepSpeed dict of a run on `world` ranks, whose monitors write in the folder `out`. Raises ValueError on
    batches that do not divide, and on "auto" in the user's JSON, which only the HF Trainer resolves."""
    micro, rest = divmod(config.batch_size, world * config.zero.accumulation)
    if rest or not micro:
        raise ValueError(
            f"config: batch_size {config.batch_size} is no multiple of {world} ranks x "
            f"{config.zero.accumulation} micro-batches (zero.accumulation)"
        )
    optim = config.optim
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.zero.accumulation,
        "gradient_clipping": optim.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "weight_decay": optim.weight_decay,
                "torch_adam": True,
                "fused": torch.cuda.is_available() and not config.zero.offload,  # one kernel for all weights
            },
        },
        "bf16": {"enabled": config.zero.dtype == "bfloat16", "check_grad_overflow": True},
        # memory_efficient_linear replaces F.linear, process-wide, by a Function without a forward-mode rule
        "zero_optimization": {"stage": config.zero.stage, "memory_efficient_linear": False},
        "steps_per_print": 10**9,
    }
    if config.zero.offload:
        if not config.zero.stage:
            raise ValueError("config: zero.offload needs zero.stage 1, 2 or 3; without ZeRO there is nothing to move")
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        derived["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW runs on the CPU too
    for name in config.run.monitor:
        derived[MONITORS[name]] = {"enabled": True}
        if name != "wandb":
            derived[MONITORS[name]] |= {"output_path": str(out or "."), "job_name": name}
    if config.zero.json is not None:
        own = read_object(config.zero.json, "config: zero.json")
        check_own_json(config.zero.json, own)
        _check_kinds(config.zero.json, derived, own)
        derived = _merge(derived, own)
    automatic = [name for name, value in _leaves(derived) if value == "auto"]
    if automatic:
        raise ValueError(
            f"config: {', '.join(automatic)} is 'auto', which DeepSpeed itself does not resolve; write the value"
        )
    return derived


def check_own_json(path: Path, own: Any) -> None:
    """Raises ValueError on a DeepSpeed JSON that DeepSpeed, or the training loop, would not follow."""
    if not isinstance(own, dict):
        raise ValueError(f"config: zero.json {path} holds {type(own).__name__}; expected an object")
    if taken := [key for key in OWN_KEYS if _holds(own, key)]:
        raise ValueError(f"config: zero.json {path} sets {taken[0]}; use {OWN_KEYS[taken[0]]} instead")
    known = {value for value in vars(deepspeed.runtime.constants).values() if isinstance(value, str)}
    known |= {"zero_optimization", "activation_checkpointing", "comms_logger", "flops_profiler"}
    for key in own.keys() - known:  # DeepSpeed takes any key, and ignores what it does not know
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise ValueError(f"config: zero.json {path} sets {key}; did you mean {close[0]}?")


def _check_kinds(path: Path, ours: dict[str, Any], own: dict[str, Any], at: str = "") -> None:
    """Raises ValueError where an object or a number of ours is replaced by something else."""
    for name in ours.keys() & own.keys():
        mine, theirs = ours[name], own[name]
        number = isinstance(mine, (int, float)) and not isinstance(mine, bool)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            _check_kinds(path, mine, theirs, f"{at}{name}.")
        elif isinstance(mine, dict) or (number and theirs != "auto" and type(theirs) not in (int, float)):
            expected = "a number" if number else "an object"
            raise ValueError(f"config: zero.json {path} sets {at}{name} to {theirs!r}; expected {expected}")


def _holds(tree: Any, key: str) -> bool:
    """Whether a tree has a key, the keys of its levels put together by points."""
    first, _, rest = key.partition(".")
    return isinstance(tree, dict) and first in tree and (not rest or _holds(tree[first], rest))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return base | {
        k: _merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
