"""One training step after another."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf import config as configs
from emf.config import Config
from emf.data.feed import Feed, check_sources, feed
from emf.errors import Diverged, seen_alone
from emf.evaluate.digits_scorer import Scorer
from emf.idle import check_idle
from emf.model.text_to_image import TextToImage
from emf.network.build import build
from emf.network.flows import with_flows
from emf.sample.sampling_settings import GUIDANCE
from emf.train.agreement import changed_samples, same_feed
from emf.train.batch import Batch, batches, matched_samples
from emf.train.faster import check_quick, quicken
from emf.train.launcher import launcher_left
from emf.train.log import Log, memory_mib, speed
from emf.train.objective import descended, learning_rate, losses
from emf.train.opening import in_steps, opening
from emf.train.paths import fetched, located
from emf.train.ranges import mark_network, span
from emf.train.takeover import own_folder
from emf.train.validation import Validation
from emf.train.zero import (
    Engine,
    check_monitors,
    engine_config,
    overruled,
    own_device,
    process_group,
    shared,
)
from emf.weights.checkpoints import checkpoints, read_made
from emf.weights.folders import load_start
from emf.weights.start import check_base, resumed, started, with_encoder
from emf.weights.tensors import module_stamp


def train(config: Config, out: Path | str, resume: bool = False) -> None:
    """Train in the folder `out`, or go on there. Nothing is written before the first step is made, so that a run which
    could not begin leaves the folder as it was.

    Raises ValueError on a config that does not fit, and where another process trains there; Diverged where the loss,
    the gradient or the weights are not finite. A KeyboardInterrupt says whether there is a checkpoint to go on from."""
    out, config = Path(out), located(with_encoder(fetched(config)))
    config.check_given()
    check_idle(config)
    check_sources(config.batches)
    check_monitors(config)
    with process_group() as (rank, world), own_folder(out, config, resume, rank) as saved, advised(out):
        settings = engine_config(config, world, out)
        check_quick(config, settings)
        if rank == 0 and resume and not saved:
            print(f"{out} holds no checkpoint to continue from; the run starts at step 0", flush=True)
        torch.manual_seed(config.seed)
        network = shared(
            lambda dtype: loaded(config, saved[-1] if saved else None, dtype),
            lambda dtype: with_flows(build(config, dtype, empty=True), config),
            settings,
        )
        if config.run.prompts:  # what cannot be read of them is said before the first step
            network.encoder.tokenize(list(config.run.prompts))
        source = same_feed(lambda: feed(config.batches, network.encoder, own_device()))
        config = in_steps(config, source.samples)
        mark_network(network)
        engine = Engine(network, config, out)
        engine.samples = [stamp for _, stamp in source.stamps]
        quicken(network.transformer, config)
        if config.match.weight:
            matched_samples(config, world * config.zero.accumulation)
        if rank == 0 and saved and (changed := changed_samples(source, saved[-1])):
            print(changed, flush=True)
        if rank == 0 and (said := overruled(config)):
            print(f"{config.zero.json} overrules the config: {', '.join(said)}", flush=True)
        start = engine.load(saved[-1]) if saved else 0
        if start > config.steps:
            raise ValueError(f"resume: {saved[-1]} is at step {start} already, past --steps {config.steps}")
        scorer = Scorer.fit() if rank == 0 and config.run.eval_every and not config.data.sources else None
        validation = Validation(config, engine, out, scorer, getattr(source, "latent", None))
        log = None
        if rank == 0:
            print("\n".join(opening(config, engine, source.samples, out)), flush=True)
            log = Log(out, start, config.steps)
            log.progress.start()
        try:
            with asked_to_stop() as stop, seen_alone():
                last = str(saved[-1]) if start else "none"
                Training(config, engine, out, stop, log=log, validation=validation, last=last).run(source, start)
        finally:
            if log:
                log.progress.stop()
        engine.barrier()


def loaded(config: Config, checkpoint: Path | None, dtype: torch.dtype) -> TextToImage:
    """What a run trains, in a dtype on the CPU, from a checkpoint or from its start. What the fake flow of emf.matching
    has learned is in the engine's part of the checkpoint, which is read later. Raises ValueError where that needs the
    run's start and it is gone, or is another one now."""
    network = resumed(config, checkpoint, dtype) if checkpoint else started(config, dtype)
    if not config.match.weight:
        return network
    check_base(config)
    try:
        base = load_start(config).network.transformer
    except ValueError as error:
        raise ValueError(f"config: match.weight needs the flow matching that the run starts from: {error}") from None
    made, stamp = read_made(checkpoint).base if checkpoint else "", module_stamp(base)
    if made and made != stamp:
        raise ValueError(
            f"resume: init {config.init} holds other weights than when {checkpoint} was made; put its own back"
        )
    matched = with_flows(network, config, base)
    matched.base_stamp = stamp
    return matched


@contextmanager
def advised(out: Path) -> Iterator[None]:
    """Ctrl-C says what can be done with the run in `out`."""
    try:
        yield
    except KeyboardInterrupt:
        left = "--resume continues from the last checkpoint" if checkpoints(out) else "no checkpoint was written"
        raise KeyboardInterrupt(f"interrupted; {left}") from None


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, which then no longer ends the process, or has ended DeepSpeed's launcher: the step is
    finished and saved first."""
    asked: list[int] = []
    left = launcher_left()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked) or left()
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Step:
    """What a step has come to so far: means over its samples on all ranks."""

    number: int
    """From 0."""
    loss: float = 0.0
    error: float = 0.0
    """Mean squared error, without weights."""
    further: dict[str, float] = field(default_factory=dict)
    """Of Losses."""
    share: float = 0.0
    """Of the samples with r < t."""
    fault: str = ""
    """What is not finite, and where; empty where all is well."""


class Training:
    """The steps of a run on this rank, and what is written between them."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        out: Path,
        stop: Callable[[], bool],
        *,
        log: Log | None = None,
        validation: Validation,
        last: str = "none",
    ) -> None:
        self.config, self.engine, self.out, self.stop = config, engine, out, stop
        self.log, self.validation = log, validation  # rank 0 alone has a log
        self.last = last
        """The newest whole checkpoint."""
        self.stopping = False
        """Some rank was asked to stop; every rank knows it after the same step."""
        self.skipped = 0
        """Steps that were not finite."""
        self.begun = time.monotonic()
        self.counted, self.clock = 0, self.begun
        """Steps since this time, for the rate of the next row of metrics."""
        self.condition = 0
        """M, the condition states of a sample."""

    def run(self, feed: Feed, start: int) -> None:
        """The steps from start up to config.steps, or up to the one in which a rank is asked to stop. Raises Diverged
        on more steps that are not finite than config.run.skip, and on weights that are not."""
        config, coming = self.config, batches(self.config, feed, start, self.engine.rank, self.engine.world)
        for number in range(start, config.steps):
            step = self.step(number, coming)
            self.count(step)
            if self.log and number == start:
                self.log.begin(configs.to_json(config))
            done = number + 1
            ends = done == config.steps or self.stopping
            if not step.fault and (done % config.run.log_every == 0 or ends):
                self.write_row(step)
            if done % config.run.save_every == 0 or ends:
                self.save(done)  # before anything that may fail without harm to the weights
            if config.run.eval_every and (done % config.run.eval_every == 0 or done == config.steps):
                self.validate(done)
            if self.stopping:
                if self.log and done < config.steps:
                    print(f"asked to stop: saved {self.last}; --resume continues from it", flush=True)
                return

    def step(self, number: int, coming: Iterator[tuple[tuple[int, int], Batch]]) -> Step:
        """One optimizer step: every micro-batch forward and backward, and at the last the weights. A loss that is not
        finite makes the gradient NaN, with which no weight is moved. So nothing waits for a loss before it goes on:
        the host reads all of them at once, and while the device is at the last backward."""
        step, engine, parts = Step(number), self.engine, self.config.zero.accumulation
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        sums, share = torch.zeros((), dtype=torch.float64, device=engine.device), 0.0
        for micro in range(parts):
            with span("data"):
                _, batch = next(coming)
            batch = batch.on(engine.device, engine.dtype)
            self.condition = getattr(engine.engine.module.encoder, "length", batch.ids.shape[1])
            with span("forward"):
                loss, squared, further = losses(self.config, engine, batch, number / self.config.steps)
            seen.append((batch.t, batch.r, loss.detach()))
            means = torch.stack([x.detach().mean() for x in (loss, squared, *further.values())])
            sums, share = sums + means / parts, share + batch.b / len(batch.t) / parts
            if micro == parts - 1:
                told = engine.mean_later(sums, share, float(self.stop()))
            with span("backward"):  # and what DeepSpeed communicates in it
                engine.backward(descended(loss, squared))
            with span("optimizer"):
                stepped = engine.step(learning_rate(self.config, number), number)
        step.loss, step.error, *values, step.share, asked = told()
        step.further = dict(zip(further, values, strict=True))
        self.stopping = asked > 0  # on every rank alike
        if not (math.isfinite(step.loss) and math.isfinite(step.error)):
            step.fault = f"loss is not finite at step {number} ({self.times_of(seen)})"
        elif not stepped:
            step.fault = f"gradient is not finite at step {number} (of a loss of {step.loss:.4g})"
        return step

    def times_of(self, seen: list[tuple[Tensor, Tensor, Tensor]]) -> str:
        """The times of the samples, of all ranks and micro-batches (t, r, loss), whose loss is not finite."""
        every_t, every_r, loss = map(torch.cat, zip(*seen, strict=True))
        bad = ~torch.isfinite(loss)
        found = self.engine.gather((every_t[bad].tolist(), every_r[bad].tolist()))
        t, r = ([value for part in parts for value in part] for parts in zip(*found, strict=True))
        return f"t {t[:4]}, r {r[:4]}" if t else "its samples are finite"

    def count(self, step: Step) -> None:
        """A step is done, or skipped. Raises Diverged where one too many is."""
        if not step.fault:
            self.counted += 1
            return
        self.skipped += 1
        if self.skipped > self.config.run.skip:
            raise Diverged(f"train: {step.fault}; last good checkpoint: {self.last}")

    def write_row(self, step: Step) -> None:
        """A row of metrics to the log and the monitors."""
        now = time.monotonic()
        rate = self.counted / (now - self.clock)
        lr = learning_rate(self.config, step.number)
        row: dict[str, Any] = dict(
            step=step.number + 1, loss=step.loss, error=step.error, lr=lr, it_s=rate, share=step.share
        )
        row |= dict(grad_norm=self.engine.norm, samples_s=rate * self.config.batch_size)
        row |= step.further
        row |= dict(wall_s=now - self.begun + (self.log.before if self.log else 0.0))
        row |= dict(memory_mib=memory_mib(), skipped=self.skipped)
        row |= speed(self.config, self.condition, rate, self.engine.world)
        if self.log:
            self.log.metrics(row)
        self.engine.monitor(row)
        self.clock, self.counted = now, 0

    def validate(self, done: int) -> None:
        """Samples and scores of the weights after `done` steps; the time it takes is not the steps'."""
        paused = time.monotonic()
        overall = self.validation(done)
        if self.log and overall:
            self.log.curve({"step": done, "guidance": GUIDANCE, "overall": overall})
            self.engine.monitor({"step": done} | {f"{n} steps": score for n, score in overall.items()}, "score")
        self.clock += time.monotonic() - paused

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps. Raises Diverged where the weights are not finite."""
        if not self.engine.finite():
            raise Diverged(
                f"train: the weights are not finite after step {done - 1}; last good checkpoint: {self.last}"
            )
        text = configs.to_json(self.config)
        self.last = str(self.engine.save(self.out, done, text, self.config.run.keep))
