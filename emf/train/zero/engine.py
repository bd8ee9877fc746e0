"""A network under DeepSpeed: its optimizer's step, the moving average, collectives, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from safetensors import SafetensorError
from torch import Tensor, nn

from emf.config import Config
from emf.files import check_readable, files_in, why, written
from emf.idle import chosen
from emf.model.text_to_image import TextToImage
from emf.train.ranges import span
from emf.train.zero.group import gather, own_device
from emf.train.zero.settings import engine_config, refusals
from emf.train.zero.universal import (
    Whole,
    load_sharded,
    load_unsharded,
    of_stage_0,
    of_universal,
    partitions,
    spread,
    universal,
)
from emf.weights import checkpoints
from emf.weights.checkpoints import Made, saved_names

FAKE = "fake."
"""How the names of the fake flow's weights begin (emf.network.flows)."""


def parameter_groups(network: TextToImage, config: Config) -> list[tuple[list[nn.Parameter], float]]:
    """(weights that are trained, the factor on their learning rate). The condition's path, which is the text encoder
    and the projection of its states, has a factor of its own, and so has the fake flow of emf.matching. Raises
    ValueError where nothing is trained, and where that factor was chosen and none of the path is."""
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    fake: list[nn.Parameter] = []
    for name, p in network.named_parameters():
        if p.requires_grad:
            if name.startswith(FAKE):
                fake.append(p)
                continue
            (slow if name.startswith(("encoder.", "transformer.caption_")) else fast).append(p)
    every = ((fast, 1.0), (slow, config.optim.condition_lr), (fake, config.match.fake_lr))
    groups = [(params, factor) for params, factor in every if params]
    if not groups:
        raise ValueError(f"config: trained {config.trained} leaves no weight to train")
    if not slow and "optim.condition_lr" in chosen(config):
        raise ValueError(
            f"config: optim.condition_lr {config.optim.condition_lr} has no effect: it needs the text encoder or the "
            "caption's projection to be trained; leave it out"
        )
    return groups


def register_borrowed(network: nn.Module) -> None:
    """Tell DeepSpeed of the weights that a module uses though a child of it owns them (its `borrows`): ZeRO-3 gathers
    weights for their owner's forward alone."""
    for module in network.modules():
        for name in getattr(module, "borrows", ()):
            owner, _, leaf = name.rpartition(".")
            if module.get_submodule(owner) is not None:
                deepspeed.zero.register_external_parameter(module, getattr(module.get_submodule(owner), leaf))


class Engine:
    """A network under DeepSpeed, with its moving average. Every method is called on every rank."""

    def __init__(self, network: TextToImage, config: Config, out: Path | None = None) -> None:
        self.rank, self.world, self.decay = dist.get_rank(), dist.get_world_size(), config.optim.ema
        settings = engine_config(config, self.world, out)
        self.stage = settings["zero_optimization"]["stage"]
        self.micro_batch = settings["train_micro_batch_size_per_gpu"]
        self.device = own_device()
        self.dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
        groups = parameter_groups(network, config)
        names = {id(p): name for name, p in network.named_parameters()}
        self.factors = [factor for _, factor in groups]
        resting = config.match.begin * config.steps
        self.firsts = [resting if names[id(params[0])].startswith(FAKE) else 0.0 for params, _ in groups]
        """The step from which each group is trained: the fake flow rests until there are pictures to learn from."""
        self.order = [names[id(p)] for params, _ in groups for p in params]
        """The names of the trained weights, in the order in which the optimizer has them."""
        self.base = getattr(network, "base_stamp", "")  # benchmarks train a bare transformer
        self.samples: list[str] = []
        """What a checkpoint says of the samples that the run is trained on (Made)."""
        self.saved = saved_names(network, config)
        with refusals():
            parameters = [{"params": params} for params, _ in groups]
            self.engine, *_ = deepspeed.initialize(model=network, model_parameters=parameters, config=settings)
        if self.stage == 3:
            register_borrowed(network)
        self.parameters = dict(network.named_parameters())
        if self.saved != self.parameters.keys():  # a frozen head that is tied to its embedding would be in it
            every = self.engine.module_state_dict
            kept = self.saved | {name for name in self.parameters if name.startswith(FAKE)}

            def some(*args: Any, **kwargs: Any) -> dict[str, Any]:
                return {name: x for name, x in every(*args, **kwargs).items() if name in kept}

            self.engine.module_state_dict = some
        self.masters: dict[int, Tensor] = {}
        if self.dtype == torch.bfloat16 and not self.stage:  # without ZeRO a wrapped optimizer keeps them, by group
            wrapped = self.engine.optimizer
            for low, high in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                self.masters |= {id(p): master for p, master in zip(low, high, strict=True)}
        self.norm: float | None = None
        """Of the whole gradient of the last step, before it was clipped."""
        self.trainable = {k: p for k, p in self.parameters.items() if p.requires_grad}
        where = torch.device("cpu") if config.optim.ema_cpu else None
        self.ema = [x.to(where or x.device, copy=True) for x in self.shards()] if self.decay else []

    def shards(self) -> list[Tensor]:
        """The float32 weights that this rank updates, flattened as DeepSpeed keeps them. Without ZeRO these are all
        weights, else the rank's part. The moving average is of these: it is sharded as they are, and costs no
        communication."""
        if self.stage:
            return [x.detach() for x in partitions(self.engine.optimizer, self.stage)]
        return [self.masters.get(id(p), p).detach() for p in self.trainable.values()]

    @contextmanager
    def average_in_place(self) -> Iterator[None]:
        """The moving average where the weights are, and the weights where it was, until the end of the block."""

        def swap() -> None:
            for x, average in zip(self.shards(), self.ema, strict=True):
                kept = x.to(average.device, copy=True)
                x.copy_(average)
                average.copy_(kept)

        swap()
        try:
            yield
        finally:
            swap()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network that is trained computes with the moving average until the end of the block, and afterwards with
        its weights again, bit for bit. Where no average is kept, with its weights all the time."""
        if not self.ema:
            yield
            return
        try:
            with self.average_in_place():
                self._spread()
                yield
        finally:
            self._spread()

    def _spread(self) -> None:
        """What the network computes with, from the float32 weights that are updated."""
        with torch.no_grad():
            if self.stage:
                spread(self.engine.optimizer, self.stage)
            for p in self.trainable.values():
                if id(p) in self.masters:
                    p.copy_(self.masters[id(p)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def read(self, *args: Any, **kwargs: Any) -> Any:
        """TextToImage.read. Neither this nor `matching` is a forward to DeepSpeed, whose timers take one with gradient
        a micro-batch, and whose ZeRO 3 foresees what it fetches by the forward before; the modules below fetch their
        weights themselves."""
        return self.engine.module.read(*args, **kwargs)

    def matching(self, *args: Any, **kwargs: Any) -> Any:
        """Of emf.network.flows."""
        return self.engine.module.matching(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float, step: int) -> bool:
        """The optimizer's step at the end of the last micro-batch, then the moving average's. step counts from 0.
        Returns False where the gradient is NaN or inf; weights and average are then left as they were."""
        for group, factor, first in zip(self.engine.optimizer.param_groups, self.factors, self.firsts, strict=True):
            group["lr"] = lr * factor if step >= first else 0.0
        last = self.engine.is_gradient_accumulation_boundary()
        if last and not self.stage and self.dtype == torch.float32:  # the other optimizers look for themselves
            gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            self.norm = norm
            if not math.isfinite(norm):
                self.engine.zero_grad()
                self.engine.micro_steps -= self.engine.micro_steps % self.engine.gradient_accumulation_steps()
                return False
        self.engine.step()
        told = self.engine.get_global_grad_norm()
        if last and told is not None:
            self.norm = float(told)
        if last and not (self.engine.was_step_applied() and (told is None or math.isfinite(told))):
            return False
        if last and self.ema:
            decay = min(self.decay, (1 + step) / (10 + step))
            shards = [x.to(average.device) for x, average in zip(self.shards(), self.ema, strict=True)]
            torch._foreach_lerp_(self.ema, shards, 1 - decay)
        return True

    def finite(self) -> bool:
        """Whether the weights, and the moving average, which keeps a NaN for ever, hold none."""
        kept = self.ema or self.shards()
        return self.mean(float(all(bool(x.isfinite().all()) for x in kept))) == [1.0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        with span("communication"):
            return gather(value)

    def mean(self, *values: float) -> list[float]:
        """Each value's mean over the ranks."""
        return self.mean_later(torch.empty(0, dtype=torch.float64, device=self.device), *values)()

    def mean_later(self, x: Tensor, *values: float) -> Callable[[], list[float]]:
        """The means over the ranks of x [n], float64 on the device, and of further values, when what is returned is
        called. The host does not wait for x before, and then for no more than x."""
        # values as arguments of kernels: a copy from the host would wait for the device
        x = torch.cat([x, *(torch.full((1,), v, dtype=x.dtype, device=x.device) for v in values)])
        with span("communication"):
            dist.all_reduce(x)
        if not x.is_cuda:
            return lambda: (x / self.world).tolist()
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[float]:
            copied.synchronize()
            return (host / self.world).tolist()

        return read

    def monitor(self, row: dict[str, Any], kind: str = "train") -> None:
        """A row of numbers to the monitors that are on."""
        if self.engine.monitor.enabled:
            step = row["step"]
            events = [(f"{kind}/{k}", v, step) for k, v in row.items() if k != "step" and v is not None]
            self.engine.monitor.write_events(events)

    def show(self, name: str, pictures: np.ndarray, captions: Sequence[str], step: int) -> None:
        """Pictures [n, H, W, 3] uint8 with their captions, on rank 0, to the monitors that take some."""
        board, wandb = self.engine.monitor.tb_monitor, self.engine.monitor.wandb_monitor
        if board is not None and board.summary_writer is not None:
            for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                tag = f"samples/{number} {caption[:60]}/{name}"
                board.summary_writer.add_image(tag, picture, step, dataformats="HWC")
            board.summary_writer.flush()
        if wandb is not None:
            from wandb import Image

            framed = [Image(picture, caption=text) for picture, text in zip(pictures, captions, strict=True)]
            wandb.log({f"samples/{name}": framed}, step=step)

    def barrier(self) -> None:
        dist.barrier()

    def weights(self, average: bool = True) -> dict[str, Tensor]:
        """The state dict of the moving average, or of the raw weights, in float32 on the CPU of rank 0; it is empty on
        the other ranks. Weights that are read again from the condition's folder are not in it."""
        state: dict[str, Tensor] = {}
        with self.average_in_place() if average and self.ema else nullcontext(), torch.no_grad():
            for name, p in self.parameters.items():
                if name not in self.saved:
                    continue
                if name in self.trainable:
                    full = self.masters.get(id(p), p) if not self.stage else safe_get_full_fp32_param(p)
                elif self.stage == 3:
                    with deepspeed.zero.GatheredParameters([p]):
                        full = p.detach().clone()
                else:
                    full = p
                if self.rank == 0:
                    # off the device at once: together they are more than a device may hold
                    state[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        return state

    def save(self, run: Path, step: int, config: str, keep: int) -> Path:
        """A checkpoint in a run's folder: the engine's state, the moving average, whole, and the run's config; see
        emf.weights.checkpoints. The newest `keep` of the run's checkpoints stay.

        Written under another name and renamed when every rank is done, so a folder of that name is always whole.
        """
        part = checkpoints.unfinished(run, step)
        if self.rank == 0:
            checkpoints.begin(run, step)
        self.barrier()
        partial = self.saved != self.parameters.keys()
        with written(part):
            self.engine.save_checkpoint(
                str(part),
                tag="engine",
                client_state={"step": step},
                save_latest=False,
                exclude_frozen_parameters=partial,
            )
        weights = self.weights()
        if self.rank == 0:
            for script in part.glob("*.py"):  # DeepSpeed's, to gather what is whole here already
                script.unlink()
            with written(part):
                made = Made(step, self.world, self.stage, str(self.dtype), self.base, self.samples)
                checkpoints.write_checkpoint(part, weights, config, made)
        self.barrier()
        if self.rank == 0:
            checkpoints.finish(part, keep)
        self.barrier()
        return part.with_suffix("")

    def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint of the same run; returns its step. Other ranks or another ZeRO stage take it up
        weight by weight, from a sharded one through DeepSpeed's universal checkpoint. Raises ValueError where it does
        not fit, and other ones where a file may not be read and where one is broken."""
        try:
            check_readable(checkpoint)
            check_readable(checkpoint / "engine")
        except ValueError as error:
            raise ValueError(f"resume: {error}") from None
        made = checkpoints.read_made(checkpoint)
        there = [len(files_in(checkpoint / "engine", f"*{kind}_states.pt")) for kind in ("model", "optim")]
        if there[0] < (made.world if made.stage == 3 else 1) or (made.stage and there[1] < made.world):
            raise ValueError(
                f"resume: {checkpoint / 'engine'} lacks files of DeepSpeed's; move the checkpoint away to resume from "
                f"one before, or begin another run with its weights: --init {checkpoint}"
            )
        same = made.stage == self.stage and (not self.stage or made.world == self.world)
        same = same and made.dtype in ("", str(self.dtype))
        strict = self.saved == self.parameters.keys()
        try:
            if same:
                self.engine.load_checkpoint(str(checkpoint), tag="engine", load_module_strict=strict)
            elif not made.stage:
                self._take(of_stage_0(checkpoint, self.order))
            else:
                with universal(checkpoint) as folder:
                    self._take(of_universal(folder / "zero", self.order[0]))
            self._load_average(checkpoint)
        except OSError as error:
            raise ValueError(f"resume: {checkpoint} cannot be read: {why(error)}") from None
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, KeyError, AssertionError, EOFError, SafetensorError) as error:
            raise ValueError(f"resume: {checkpoints.broken(checkpoint, why(error))}") from None
        return made.step

    def _take(self, whole: Whole) -> None:
        """Weights and moments that were saved by other ranks, or at another stage."""
        if self.stage:
            load_sharded(whole, self.engine.optimizer, self.trainable, self.stage, self.device)
        else:
            load_unsharded(whole, self.engine.optimizer, self.trainable, self.masters)

    def _load_average(self, checkpoint: Path) -> None:
        """The moving average from a checkpoint's weights, which are whole: any rank takes its part of them."""
        if not self.ema:
            return
        weights = checkpoints.stream(checkpoint)
        with self.average_in_place(), torch.no_grad():
            for name, p in self.trainable.items():
                if name not in self.saved:
                    continue  # nobody reads the fake flow's average: it begins anew at its weights
                value = weights.read(name).to(self.device)
                if self.stage:
                    safe_set_full_fp32_param(p, value)
                else:
                    self.masters.get(id(p), p).detach().copy_(value)
