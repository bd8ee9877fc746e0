"""The DeepSpeed dict of a run: it is derived from the run's config, and the user's own JSON is merged over it."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from emf.config import Config
from emf.files import read_object
from emf.idle import chosen, leaves, shown

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
    "bfloat16": "--zero.dtype",  # an earlier name of bf16, which DeepSpeed reads where there is no bf16
}
OVERRULED = {  # what a DeepSpeed JSON may say in the place of a setting
    "gradient_clipping": "optim.clip",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "bf16.enabled": "zero.dtype",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload",
}
OPTIMIZER_KEYS = ("type", "params", "legacy_fusion")


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
        where = {"project": "emf"} if name == "wandb" else {"output_path": str(out or "."), "job_name": name}
        derived[MONITORS[name]] |= where
    if config.zero.json is not None:
        own = read_object(config.zero.json, "config: zero.json")
        check_own_json(config.zero.json, own)
        _check_kinds(config.zero.json, derived, own)
        overruled(config)
        derived = _merge(derived, own)
        check_stage(config.zero.json, own, derived["zero_optimization"]["stage"])
    automatic = [name for name, value in _leaves(derived) if value == "auto"]
    if automatic:
        raise ValueError(
            f"config: {', '.join(automatic)} is 'auto', which DeepSpeed itself does not resolve; write the value"
        )
    return derived


def exchanged(settings: dict[str, Any], stage: int, total: int, trained: int) -> int:
    """Elements of the buffers by which DeepSpeed exchanges gradients, and at stage 3 weights, in an engine's config."""
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    bucket = int(zero.reduce_bucket_size) if stage else 0
    return bucket + (min(total, int(zero.max_live_parameters)) if stage == 3 else 0)


@contextmanager
def refusals() -> Iterator[None]:
    """A block in which DeepSpeed reads its config. Raises ValueError where it refuses that."""
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError, ImportError, DeepSpeedConfigError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config: DeepSpeed refuses its config, zero.json included: {reason}") from None


def check_monitors(config: Config) -> None:
    """Raises ValueError where the package of one of the run's monitors is not installed."""
    for name in config.run.monitor:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise ValueError(f"config: run.monitor {name} needs the package {name}: pip install {name}")


def check_own_json(path: Path, own: Any) -> None:
    """Raises ValueError on a DeepSpeed JSON that DeepSpeed, or the training loop, would not follow."""
    if not isinstance(own, dict):
        raise ValueError(f"config: zero.json {path} holds {type(own).__name__}; expected an object")
    if taken := [key for key in OWN_KEYS if _holds(own, key)]:
        raise ValueError(f"config: zero.json {path} sets {taken[0]}; use {OWN_KEYS[taken[0]]} instead")
    if isinstance(own.get("fp16"), dict) and own["fp16"].get("enabled"):
        raise ValueError(f"config: zero.json {path} sets fp16.enabled; use --zero.dtype bfloat16 instead")
    # DeepSpeed takes any key, and ignores what it does not know; within its other sections it does not
    for at, inside, known in (("", own, known_keys()), ("optimizer.", own.get("optimizer"), {*OPTIMIZER_KEYS})):
        for key in sorted(inside.keys() - known) if isinstance(inside, dict) else ():
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            meant = f"; did you mean {at}{close[0]}?" if close else ""
            raise ValueError(f"config: zero.json {path} sets {at}{key}, which DeepSpeed does not know{meant}")


def check_stage(path: Path, own: dict[str, Any], stage: Any) -> None:
    """Raises ValueError where a DeepSpeed JSON asks ZeRO for what it does not do at the stage of the run: without it
    nothing, and before the third nothing with the weights."""
    asked = own.get("zero_optimization", {})
    off = (None, False, {"device": "none"})
    weights = ("offload_param", *(name for name in asked if name.startswith("stage3_")))
    of_stage = ("stage", "memory_efficient_linear")
    idle = [k for k, v in asked.items() if v not in off and k not in of_stage and (stage == 0 or k in weights)]
    if stage in (0, 1, 2) and idle:
        needs = "3" if idle[0] in weights else "1, 2 or 3"
        raise ValueError(
            f"config: zero.json {path} sets zero_optimization.{idle[0]}, which has no effect at stage {stage}: it "
            f"needs stage {needs}; leave it out"
        )


class _Asked(dict[str, Any]):
    """A DeepSpeed config that keeps which of its sections were asked for, whether it has them or not."""

    def __init__(self, **sections: Any) -> None:
        super().__init__(**sections)
        self.names: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # DeepSpeed says `in config.keys()` too


@cache
def known_keys() -> frozenset[str]:
    """The sections that the installed DeepSpeed reads in its JSON."""
    asked = _Asked(train_micro_batch_size_per_gpu=1)
    deepspeed.DeepSpeedConfig(asked)
    return frozenset(asked.names)


def overruled(config: Config) -> list[str]:
    """What the DeepSpeed JSON of a config says in the place of its settings, each in words. Raises ValueError where
    such a setting was chosen too, and is another: one of the two would have no effect."""
    if config.zero.json is None:
        return []
    own, own_settings, found = read_object(config.zero.json, "config: zero.json"), leaves(config), []
    for key, name in OVERRULED.items():
        theirs, ours = _at(own, key), own_settings[name]
        told = {"zero.dtype": ours == "bfloat16", "zero.offload": "cpu" if ours else "none"}.get(name, ours)
        if theirs is None or theirs == "auto" or theirs == (list(told) if isinstance(told, tuple) else told):
            continue
        if name in chosen(config):
            raise ValueError(
                f"config: zero.json {config.zero.json} sets {key} {theirs}, and {name} is {shown(ours)}; say it once"
            )
        found.append(f"{key} {theirs} (not {name} {shown(ours)})")
    return found


def _at(tree: Any, key: str) -> Any:
    """A tree's value at a key, the keys of its levels put together by points; None where it has none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


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
