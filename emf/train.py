"""One training step after another: `deepspeed --module emf.train <recipe or config.json> --out DIR [--field value]`.

Everything random in a step comes from (seed, step), so a resumed run continues as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import nvtx
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from emf import config as configs
from emf.cli import Diverged, parse_train, report_errors
from emf.config import Config
from emf.data import digits
from emf.evaluate.digits import Scorer
from emf.flow import flow_matching_loss, meanflow_loss, times
from emf.generate import GUIDANCE, generate
from emf.network import build, checkpoints, load_weights
from emf.zero import Engine, process_group


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


def make_batch(config: Config, step: int, part: int, parts: int) -> Batch:
    """Part `part` of `parts` of step's batch. Every part has the same share of r < t (to one sample): the sorted
    batch is dealt out in turn."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    x, captions = digits.make_batch(config.seed * 1_000_003 + step, config.batch_size, "train", config.world)
    t, r, b = times(step / config.steps, config.batch_size, config.flow, generator)
    e = torch.randn(x.shape, generator=generator)
    drop = torch.rand(config.batch_size, generator=generator) < config.drop
    mine = slice(part, None, parts)
    ids, mask = digits.encode(captions[mine])
    x, e, t, r, drop = (a[mine].contiguous() for a in (x, e, t, r, drop))
    return Batch(x, e, t, r, len(range(part, b, parts)), ids, mask, drop)


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.decay == "constant":
        return o.lr
    return o.lr * (1 + math.cos(math.pi * (step - o.warmup) / max(1, config.steps - o.warmup))) / 2


def losses(config: Config, network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error), both [B]."""

    x, e, t, r, b, ids, mask, drop = batch

    def velocity(z: Any, t: Any, r: Tensor | None) -> Any:
        return network(z, t, r, ids, mask, drop)

    def null(z: Any, t: Any, r: Tensor | None) -> Any:
        return network(z, t, r, ids, mask, torch.ones_like(drop))

    if config.objective == "flow_matching":
        return flow_matching_loss(velocity, x, e, t)
    return meanflow_loss(velocity, null, x, e, t, r, b, config.flow)


def memory_mib() -> float:
    """Peak memory so far: CUDA's allocator, or the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Log:
    """metrics.jsonl, curve.jsonl and the progress display; rank 0 only. Rows past the step that a run resumes from
    are dropped."""

    def __init__(self, out: Path, start: int, total: int) -> None:
        self.out, self.console = out, Console()
        for name in ("metrics.jsonl", "curve.jsonl"):
            file = out / name
            if file.exists():  # a kill may have torn the last line; what ends in a newline is whole
                try:
                    rows = [
                        row
                        for row in file.read_text().splitlines(keepends=True)
                        if row.endswith("\n") and json.loads(row)["step"] <= start
                    ]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"resume: {file} holds a line that is no row with a step ({error!r})") from None
                file.write_text("".join(rows))
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("train", total=total, completed=start, note="")

    def metrics(self, row: dict[str, Any], total: int) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        eta = (total - row["step"]) / max(row["it_s"], 1e-9)
        note = f"loss {row['loss']:.4f}  error {row['error']:.4f}  {row['it_s']:.2f} it/s"
        self.progress.update(self.task, completed=row["step"], note=note)
        if not self.console.is_terminal:
            print(f"step {row['step']}/{total}  {note}  ETA {eta / 60:.1f} min", flush=True)

    def curve(self, row: dict[str, Any]) -> None:
        with (self.out / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        scores = "  ".join(f"{steps}-step {score:.3f}" for steps, score in row["overall"].items())
        self.progress.console.print(f"step {row['step']}: {scores}")


def validate(config: Config, state: dict[str, Tensor], scorer: Scorer) -> dict[str, float]:
    """Overall score of few-step samples of the averaged weights, by number of steps."""
    network = build(config)
    load_weights(network, state, "the running average")
    specs = digits.prompts(config.run.eval_prompts)
    average = config.objective == "meanflow"
    overall = {}
    for steps in (1, 2, 4) if average else (1, 4, 30):
        images = generate(network, config, [s["prompt"] for s in specs], steps, average=average, guidance=GUIDANCE)
        overall[str(steps)] = scorer.score(images.numpy(), specs)["overall"]
    return overall


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
        network = build(config, from_scratch=not saved)
        engine = Engine(network, config)
        start = engine.load(saved[-1]) if resume and saved else 0
        if start > config.steps:
            raise ValueError(f"resume: {saved[-1]} is at step {start} already, past --steps {config.steps}")
        text = configs.to_json(config)
        log = None
        scorer = Scorer.fit() if rank == 0 and config.run.eval_every else None
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(text)
            log = Log(out, start, config.steps)
            log.progress.start()
        try:
            run(config, engine, start, folder, text, log, scorer)
        finally:
            if log:
                log.progress.stop()
        engine.barrier()


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
    config: Config, engine: Engine, start: int, folder: Path, text: str, log: Log | None, scorer: Scorer | None
) -> None:
    """The steps start .. config.steps."""
    accumulation, skipped, last, clock, count = config.zero.accumulation, 0, "none", time.monotonic(), 0
    if start:
        last = str(checkpoints(folder)[-1])
    for step in range(start, config.steps):
        total, error, share, what, times_seen, finite = 0.0, 0.0, 0.0, "loss", "", True
        for micro in range(accumulation):
            with nvtx.annotate("data"):
                batch = make_batch(config, step, engine.rank + engine.world * micro, engine.world * accumulation)
            moved: dict[str, Any] = {
                k: x.to(engine.device) for k, x in batch._asdict().items() if isinstance(x, Tensor)
            }
            batch = batch._replace(**moved)
            batch = batch._replace(x=batch.x.to(engine.dtype), e=batch.e.to(engine.dtype))
            with nvtx.annotate("forward"):
                loss, squared = losses(config, engine, batch)
            values = engine.mean(loss.mean().item(), squared.mean().item(), batch.b / len(batch.t))
            if not all(map(math.isfinite, values)):
                finite = False
                engine.drop_gradients()
                bad = ~torch.isfinite(loss)
                found = engine.gather((batch.t[bad].tolist(), batch.r[bad].tolist()))
                t, r = ([value for part in parts for value in part] for parts in zip(*found, strict=True))
                times_seen = f"t {t[:4]}, r {r[:4]}" if t else "its samples are finite"
                break
            total, error, share = (a + v / accumulation for a, v in zip((total, error, share), values, strict=True))
            with nvtx.annotate("backward"):  # and communication
                engine.backward(loss.mean())
            with nvtx.annotate("optimizer"):
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
        if log and finite and (done % config.run.log_every == 0 or done == config.steps):
            now = time.monotonic()
            row = dict(step=done, loss=total, error=error, lr=learning_rate(config, step), it_s=count / (now - clock))
            log.metrics(row | dict(share=share, memory_mib=memory_mib(), skipped=skipped), config.steps)
            clock, count = now, 0
        if config.run.eval_every and (done % config.run.eval_every == 0 or done == config.steps):
            weights = engine.weights()
            if log and scorer:
                paused = time.monotonic()
                log.curve({"step": done, "guidance": GUIDANCE, "overall": validate(config, weights, scorer)})
                clock += time.monotonic() - paused
        if done % config.run.save_every == 0 or done == config.steps:
            if not engine.finite():
                raise Diverged(f"train: the weights are not finite after step {step}; last good checkpoint: {last}")
            last = str(engine.save(folder, done, text, config.run.keep))


def main(arguments: list[str] | None = None) -> None:
    """Entry of `emf train` and of the deepspeed launcher."""
    # the launcher hands every process --local_rank=N; the environment says the same
    arguments = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank")]
    with report_errors():
        train(*parse_train(arguments))


if __name__ == "__main__":
    main()
