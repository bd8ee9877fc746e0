"""One training step after another: `deepspeed --module emf.train <recipe or config.json> --out DIR [--field value]`.

Everything random in a step comes from (seed, step), so a resumed run continues as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emf import config as configs
from emf.config import Config
from emf.data.feed import Feed, feed
from emf.errors import Diverged
from emf.evaluate.digits_scorer import Scorer
from emf.flow import flow_matching_loss, meanflow_loss, times
from emf.network.build import build, checkpoints
from emf.sample.sampler import GUIDANCE
from emf.train.log import Log, memory_mib, speed
from emf.train.ranges import mark_network, span
from emf.train.validation import validate
from emf.train.zero import Engine, process_group


class Batch(NamedTuple):
    """One rank's part of a micro-batch; the first b samples have r < t."""

    x: Tensor
    e: Tensor
    t: Tensor
    r: Tensor
    b: int
    ids: Tensor
    mask: Tensor
    drop: Tensor


def make_batch(config: Config, feed: Feed, step: int, part: int, parts: int) -> Batch:
    """Part `part` of `parts` of step's batch. Every part has the same share of r < t (to one sample): the sorted
    batch is dealt out in turn."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    x, ids, mask = feed(step, part, parts)
    n, mine = config.batch_size, slice(part, None, parts)
    t, r, b = times(step / config.steps, n, config.flow, generator)
    e = torch.randn((n, *x.shape[1:]), generator=generator)
    drop = torch.rand(n, generator=generator) < config.drop
    e, t, r, drop = (a[mine].contiguous() for a in (e, t, r, drop))
    return Batch(x, e, t, r, len(range(part, b, parts)), ids, mask, drop)


def batches(config: Config, feed: Feed, start: int, rank: int, world: int) -> Iterator[tuple[tuple[int, int], Batch]]:
    """((step, micro-batch), this rank's samples) from step start on; the next is made while this one is used."""
    accumulation = config.zero.accumulation
    places = [(step, micro) for step in range(start, config.steps) for micro in range(accumulation)]

    def make(step: int, micro: int) -> Batch:
        return make_batch(config, feed, step, rank + world * micro, world * accumulation)

    with ThreadPoolExecutor(1) as ahead:
        coming = deque(ahead.submit(make, *place) for place in places[:1])
        for i, place in enumerate(places):
            coming.extend(ahead.submit(make, *later) for later in places[i + 1 : i + 2])
            yield place, coming.popleft().result()


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.decay == "constant":
        return o.lr
    return o.lr * (1 + math.cos(math.pi * (step - o.warmup) / max(1, config.steps - o.warmup))) / 2


def losses(config: Config, network: Any, batch: Batch, progress: float) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error), both [B], at a training progress in [0, 1]."""
    x, e, t, r, b, ids, mask, drop = batch
    weight, own = config.condition.ar_weight, []

    def velocity(z: Any, t: Any, r: Tensor | None) -> Any:
        if not weight or not torch.is_grad_enabled():
            return network(z, t, r, ids, mask, drop)
        u, loss = network(z, t, r, ids, mask, drop, True)
        own.append(loss)
        return u

    def null(z: Any, t: Any, r: Tensor | None) -> Any:
        return network(z, t, r, ids, mask, torch.ones_like(drop))

    if config.objective == "flow_matching":
        loss, squared = flow_matching_loss(velocity, x, e, t)
    else:
        loss, squared = meanflow_loss(velocity, null, x, e, t, r, b, config.flow, progress)
    return (loss + weight * own[-1] if own else loss), squared


def train(config: Config, out: Path, resume: bool = False) -> None:
    """Train in folder out. Raises ValueError on a config that does not fit, before anything is written; Diverged on a
    NaN loss."""
    with process_group() as (rank, world):
        folder = out / "checkpoints"
        saved = checkpoints(folder)
        if out.exists() and not out.is_dir():
            raise ValueError(f"train: {out} is no folder; choose another --out")
        written = [name for name in ("config.json", "metrics.jsonl", "curve.jsonl") if (out / name).exists()]
        if (written or saved) and not resume:
            raise ValueError(
                f"train: {out} holds a run already; add --resume True to continue it, or choose another --out"
            )
        if resume and saved:
            check_same_run(config, saved[-1])
        torch.manual_seed(config.seed)
        network = build(config, from_scratch=True, weights=saved[-1] / "model.safetensors" if saved else None)
        mark_network(network)
        engine = Engine(network, config, out)
        start = engine.load(saved[-1]) if saved else 0
        if start > config.steps:
            raise ValueError(f"resume: {saved[-1]} is at step {start} already, past --steps {config.steps}")
        source = feed(config.batches, network.encoder, engine.device)
        scorer = Scorer.fit() if rank == 0 and config.run.eval_every and not config.data.sources else None
        log = None
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(configs.to_json(config))
            log = Log(out, start, config.steps)
            log.progress.start()
        try:
            with asked_to_stop() as stop:
                run(config, engine, source, start, out, log, scorer, stop)
        finally:
            if log:
                log.progress.stop()
        engine.barrier()


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, which then no longer ends the process: the step is finished and saved first."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


MAY_CHANGE = ("recipe", "steps", "optim", "zero", "run")  # when a run is resumed


def check_same_run(config: Config, checkpoint: Path) -> None:
    """Raises ValueError where a checkpoint is of another model than the config's, or of other data or randomness."""
    made, now = configs.read(checkpoint / "config.json"), json.loads(configs.to_json(config))
    # a field that the checkpoint does not know was added since, with a default that changes nothing
    differ = [key for key in now if key in made and key not in MAY_CHANGE and not _agree(made[key], now[key])]
    if differ:
        other = "another model" if {"objective", "transformer", "encoder"} & set(differ) else "another run"
        raise ValueError(
            f"resume: {checkpoint} is a checkpoint of {other} ({', '.join(differ)} differ); choose another --out"
        )


def _agree(made: Any, now: Any) -> bool:
    """Whether two values of a config are the same in every field that both have."""
    if isinstance(made, dict) and isinstance(now, dict):
        return all(_agree(made[k], now[k]) for k in made.keys() & now.keys())
    return bool(made == now)


def run(
    config: Config,
    engine: Engine,
    feed: Feed,
    start: int,
    out: Path,
    log: Log | None,
    scorer: Scorer | None,
    stop: Callable[[], bool],
) -> None:
    """The steps start .. config.steps, or up to the one in which a rank is asked to stop."""
    accumulation, skipped, last, clock, count = config.zero.accumulation, 0, "none", time.monotonic(), 0
    folder, text, condition, stopping = out / "checkpoints", configs.to_json(config), 0, False
    coming = batches(config, feed, start, engine.rank, engine.world)
    if start:
        last = str(checkpoints(folder)[-1])
    for step in range(start, config.steps):
        total, error, share, what, times_seen, finite = 0.0, 0.0, 0.0, "loss", "", True
        for micro in range(accumulation):
            with span("data"):
                # a step that ended early has left some of its own
                batch = next(batch for place, batch in coming if place == (step, micro))
            moved: dict[str, Any] = {
                k: x.to(engine.device) for k, x in batch._asdict().items() if isinstance(x, Tensor)
            }
            batch = batch._replace(**moved)
            batch = batch._replace(x=batch.x.to(engine.dtype), e=batch.e.to(engine.dtype))
            condition = getattr(engine.engine.module.encoder, "length", batch.ids.shape[1])
            with span("forward"):
                loss, squared = losses(config, engine, batch, step / config.steps)
            *values, asked = engine.mean(
                loss.mean().item(), squared.mean().item(), batch.b / len(batch.t), float(stop())
            )
            stopping |= asked > 0  # on every rank alike
            if not all(map(math.isfinite, values)):
                finite = False
                engine.drop_gradients()
                bad = ~torch.isfinite(loss)
                found = engine.gather((batch.t[bad].tolist(), batch.r[bad].tolist()))
                t, r = ([value for part in parts for value in part] for parts in zip(*found, strict=True))
                times_seen = f"t {t[:4]}, r {r[:4]}" if t else "its samples are finite"
                break
            total, error, share = (a + v / accumulation for a, v in zip((total, error, share), values, strict=True))
            with span("backward"):  # and what DeepSpeed communicates in it
                engine.backward(loss.mean())
            with span("optimizer"):
                stepped = engine.step(learning_rate(config, step), step)
            if not stepped:
                finite, what, times_seen = False, "gradient", f"of a loss of {total:.4g}"
        done = step + 1
        if not finite:
            skipped += 1
            if skipped > config.run.skip:
                raise Diverged(
                    f"train: {what} is not finite at step {step} ({times_seen}); last good checkpoint: {last}"
                )
        else:
            count += 1
        ends = done == config.steps or stopping
        if finite and (done % config.run.log_every == 0 or ends):
            now = time.monotonic()
            rate = count / (now - clock)
            row = dict(step=done, loss=total, error=error, lr=learning_rate(config, step), it_s=rate, share=share)
            row |= dict(memory_mib=memory_mib(), skipped=skipped) | speed(config, condition, rate, engine.world)
            engine.monitor(row)
            if log:
                log.metrics(row)
            clock, count = now, 0
        if config.run.eval_every and (done % config.run.eval_every == 0 or done == config.steps):
            paused = time.monotonic()
            overall = validate(config, engine, done, out, scorer)
            if log and overall:
                log.curve({"step": done, "guidance": GUIDANCE, "overall": overall})
            clock += time.monotonic() - paused
        if done % config.run.save_every == 0 or ends:
            if not engine.finite():
                raise Diverged(f"train: the weights are not finite after step {step}; last good checkpoint: {last}")
            last = str(engine.save(folder, done, text, config.run.keep))
        if stopping:
            if log and done < config.steps:
                print(f"asked to stop: saved {last}; --resume True continues from it", flush=True)
            return
