"""All of distribution: the DeepSpeed engine, its config, collectives, checkpoints, the moving average. The only file
that imports deepspeed."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emf.config import Config
from emf.network import checkpoints

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# On a CPU DeepSpeed would compile a C++ all-reduce at start-up (a minute, a compiler, ninja); gloo's serves.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
PART, GONE = ".part", ".gone"  # a folder so named is being written, or removed, and never read
OWN_KEYS = {  # fields of the config, from which the micro-batch is derived: no DeepSpeed JSON may say otherwise
    "train_batch_size": "--batch-size",
    "train_micro_batch_size_per_gpu": "--batch-size and --zero.accumulation",
    "gradient_accumulation_steps": "--zero.accumulation",
}


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """(rank, world size) under the deepspeed launcher, torchrun, or alone. Destroys the group at exit."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
        )
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def engine_config(config: Config, world: int) -> dict[str, Any]:
    """The DeepSpeed dict of a run; the user's own JSON is merged over it. Raises ValueError on "auto", which only the
    HF Trainer resolves."""
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
            },
        },
        "bf16": {"enabled": config.zero.dtype == "bfloat16", "check_grad_overflow": True},
        # memory_efficient_linear replaces F.linear, process-wide, by a Function without a forward-mode rule
        "zero_optimization": {"stage": config.zero.stage, "memory_efficient_linear": False},
        "steps_per_print": 10**9,
    }
    if config.zero.json is not None:
        try:
            own = json.loads(config.zero.json.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"config: zero.json {config.zero.json} cannot be read: {error}") from None
        check_own_json(config.zero.json, own)
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
    if taken := [key for key in OWN_KEYS if key in own]:
        raise ValueError(f"config: zero.json {path} sets {taken[0]}; use {OWN_KEYS[taken[0]]} instead")
    known = {value for value in vars(deepspeed.runtime.constants).values() if isinstance(value, str)}
    known |= {"zero_optimization", "activation_checkpointing", "comms_logger", "flops_profiler"}
    for key in own.keys() - known:  # DeepSpeed takes any key, and ignores what it does not know
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise ValueError(f"config: zero.json {path} sets {key}; did you mean {close[0]}?")


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


class Engine:
    """A network under DeepSpeed, with its moving average. Every method is called on every rank."""

    def __init__(self, network: nn.Module, config: Config) -> None:
        self.rank, self.world, self.stage, self.decay = (
            dist.get_rank(),
            dist.get_world_size(),
            config.zero.stage,
            config.optim.ema,
        )
        settings = engine_config(config, self.world)
        self.stage = settings["zero_optimization"]["stage"]
        if self.stage and config.zero.accumulation > 1 and config.run.skip:
            raise ValueError(
                "config: run.skip with zero.accumulation above 1 needs zero.stage 0, the others keep no gradient that "
                "could be dropped"
            )
        self.device = (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
        slow: list[nn.Parameter] = []
        fast: list[nn.Parameter] = []
        for name, p in network.named_parameters():
            if p.requires_grad:
                (slow if name.startswith(("encoder.", "transformer.caption_")) else fast).append(p)
        groups = [{"params": g, "factor": f} for g, f in ((fast, 1.0), (slow, config.optim.condition_lr)) if g]
        try:
            self.engine, *_ = deepspeed.initialize(model=network, model_parameters=groups, config=settings)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"config: DeepSpeed refuses its config, zero.json included: {why}") from None
        if self.stage == 3:
            for module in network.modules():
                for name in getattr(module, "borrows", ()):
                    owner, _, leaf = name.rpartition(".")
                    if module.get_submodule(owner) is not None:
                        deepspeed.zero.register_external_parameter(module, getattr(module.get_submodule(owner), leaf))
        self.parameters = dict(network.named_parameters())
        self.masters: dict[int, Tensor] = {}
        if self.dtype == torch.bfloat16 and not self.stage:  # without ZeRO a wrapped optimizer keeps them, by group
            wrapped = self.engine.optimizer
            for low, high in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                self.masters |= {id(p): master for p, master in zip(low, high, strict=True)}
        self.trainable = {k: p for k, p in self.parameters.items() if p.requires_grad}
        self.ema = {k: self._master(p).clone() for k, p in self.trainable.items()}

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float, step: int) -> bool:
        """Optimizer step at the end of the last micro-batch, then the moving average. step counts from 0. False where
        the gradient is NaN or inf: weights and average are left as they were."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        last = self.engine.is_gradient_accumulation_boundary()
        if last and not self.stage and self.dtype == torch.float32:  # the other optimizers look for themselves
            gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
            if not torch.nn.utils.get_total_norm(gradients).isfinite():
                self.drop_gradients()
                return False
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if last and norm is not None and not math.isfinite(norm):
            return False
        if last:
            decay = min(self.decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, p in self.trainable.items():
                    self.ema[name].lerp_(self._master(p), 1 - decay)
        return True

    def drop_gradients(self) -> None:
        """Forget what this step's micro-batches have accumulated so far."""
        if not self.stage:
            self.engine.zero_grad()
        self.engine.micro_steps -= self.engine.micro_steps % self.engine.gradient_accumulation_steps()

    def finite(self) -> bool:
        """Whether the moving average, which keeps a NaN for ever, holds none."""
        return self.mean(float(all(bool(x.isfinite().all()) for x in self.ema.values()))) == [1.0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def mean(self, *values: float) -> list[float]:
        """Each value's mean over the ranks."""
        x = torch.tensor(values, dtype=torch.float64, device=self.device if self.device.type == "cuda" else "cpu")
        dist.all_reduce(x)
        return (x / self.world).tolist()

    def barrier(self) -> None:
        dist.barrier()

    def _master(self, p: nn.Parameter) -> Tensor:
        """float32 weights: this rank's shard on stage 3, else all."""
        if self.stage == 3:
            return safe_get_local_fp32_param(p)
        if p.dtype == torch.float32:
            return p.detach()
        return self.masters[id(p)].detach() if id(p) in self.masters else safe_get_full_fp32_param(p)

    def weights(self, average: bool = True) -> dict[str, Tensor]:
        """The whole state dict in float32 on CPU, on rank 0 (empty elsewhere): the moving average, or the raw
        weights."""
        state: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            if self.stage == 3 and name in self.trainable and average:
                shards = [torch.empty_like(self.ema[name]) for _ in range(self.world)]
                dist.all_gather(shards, self.ema[name])
                full = torch.cat([s.flatten() for s in shards])[: p.ds_numel].view(p.ds_shape)  # type: ignore[attr-defined]
            elif self.stage == 3:
                with deepspeed.zero.GatheredParameters([p]):
                    full = p.detach().clone()
            else:
                full = (
                    self.ema[name]
                    if average and name in self.trainable
                    else self._master(p)
                    if name in self.trainable
                    else p.detach()
                )
            if self.rank == 0:
                state[name] = full.float().cpu().clone().contiguous()
        return state

    def save(self, folder: Path, step: int, config: str, keep: int) -> Path:
        """checkpoints/step_N: the engine's state, the moving average, model.safetensors (the average, whole) and
        config.json.

        Written under another name and renamed when every rank is done, so a folder of that name is always whole.
        """
        final = folder / f"step_{step:07d}"
        part = final.with_suffix(PART)
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.barrier()
        self.engine.save_checkpoint(str(part), tag="engine", client_state={"step": step}, save_latest=False)
        if self.stage == 3 or self.rank == 0:
            save_file({k: v.contiguous() for k, v in self.ema.items()}, part / f"ema-{self.rank}.safetensors")
        weights = self.weights()
        if self.rank == 0:
            save_file(weights, part / "model.safetensors")
            (part / "config.json").write_text(config)
            (part / "checkpoint.json").write_text(json.dumps({"step": step, "world": self.world, "stage": self.stage}))
        self.barrier()
        if self.rank == 0:
            if final.exists():
                remove(final)
            part.rename(final)
            for old in checkpoints(folder)[:-keep]:
                remove(old)
        self.barrier()
        return final

    def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint of the same run; returns its step. Raises ValueError where it does not fit."""
        try:
            made = json.loads((checkpoint / "checkpoint.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"resume: {checkpoint} is broken ({error}); delete it to resume from one before") from None
        if (made["world"], made["stage"]) != (self.world, self.stage):
            raise ValueError(
                f"resume: {checkpoint} was saved by {made['world']} ranks at ZeRO stage {made['stage']}; "
                f"this run has {self.world} at stage {self.stage}"
            )
        try:
            self.engine.load_checkpoint(str(checkpoint), tag="engine")
            saved = load_file(checkpoint / f"ema-{self.rank if self.stage == 3 else 0}.safetensors")
            for name, value in self.ema.items():
                value.copy_(saved[name])
        except (OSError, RuntimeError, KeyError, AssertionError, EOFError, SafetensorError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"resume: {checkpoint} is broken ({why}); delete it to resume from one before") from None
        return int(made["step"])


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one is never taken for whole."""
    gone = checkpoint.with_suffix(GONE)
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)
