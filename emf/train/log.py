"""What a run says of itself: metrics.jsonl, curve.jsonl, the progress display; memory and operations a second."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emf.config import Config
from emf.evaluate.run_log import CURVE, METRICS, RESUMED, read_log
from emf.files import append_rows, mend_rows, write_rows, write_text
from emf.train.costs import forward_flops
from emf.train.hardware import peak_flops


def memory_mib() -> float:
    """Peak memory so far: CUDA's allocator, or the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_words(row: dict[str, Any]) -> str:
    """A row of metrics in a line. The loss is not in it: the adaptive weight divides a sample's loss by its own size,
    so that it is about 1 whatever the network learns."""
    words = [f"error {row['error']:.4f}"]
    if "lm_loss" in row:
        words.append(f"language model {row['lm_loss']:.4f}")
    if row.get("grad_norm") is not None:
        words.append(f"gradient {row['grad_norm']:.3g}")
    words += [f"{row['it_s']:.3g} it/s", f"{row['samples_s']:.3g} samples/s"]
    unit, size = ("TFLOP/s", row["tflops"]) if row["tflops"] >= 1 else ("GFLOP/s", row["tflops"] * 1e3)
    words.append(f"{size:.3g} {unit}")
    if "mfu" in row:
        words.append(f"MFU {row['mfu']:.0%}")
    return "  ".join(words)


class Log:
    """config.json, metrics.jsonl, curve.jsonl and the progress display; rank 0 only. Files are written from `begin`
    on."""

    def __init__(self, out: Path, start: int, total: int) -> None:
        self.out, self.console, self.start, self.total = out, Console(), start, total
        for name in (METRICS, CURVE):  # what cannot be gone on with is said before a step is made
            read_log(out / name, RESUMED)
        self.before = 0.0
        """Seconds that the run has taken in earlier processes, up to the step it resumes from."""
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("train", total=total, completed=start, note="")

    def begin(self, config: str) -> None:
        """Claim the folder with the run's config. Rows past the step that it resumes from are dropped."""
        write_text(self.out / "config.json", config)
        for name in (METRICS, CURVE):
            file = self.out / name
            if file.exists():
                rows = [row for row in mend_rows(file, RESUMED) if row["step"] <= self.start]
                write_rows(file, rows)
                self.before = max([self.before, *(row.get("wall_s") or 0.0 for row in rows)])

    def metrics(self, row: dict[str, Any]) -> None:
        append_rows(self.out / METRICS, [row])
        eta = (self.total - row["step"]) / max(row["it_s"], 1e-9)
        note = in_words(row)
        self.progress.update(self.task, completed=row["step"], note=note)
        if not self.console.is_terminal:
            print(f"step {row['step']}/{self.total}  {note}  ETA {eta / 60:.1f} min", flush=True)

    def curve(self, row: dict[str, Any]) -> None:
        append_rows(self.out / CURVE, [row])
        scores = "  ".join(f"{steps}-step {score:.3f}" for steps, score in row["overall"].items())
        self.progress.console.print(f"step {row['step']}: {scores}")


def speed(config: Config, condition: int, steps: float, ranks: int) -> dict[str, float]:
    """`tflops`: a GPU's (or process's) 1e12 operations a second at `steps` a second; `mfu`: their share of the GPU's
    peak, where that is known.

    Operations are the transformer's alone: forward, backward and the tangents of a mean share of r < t, without what
    checkpointing computes again. condition: M, the states that are attended to.
    """
    tokens = (config.transformer.sample_size // config.transformer.patch_size) ** 2
    share = sum(config.flow.share) / 2 if config.objective == "meanflow" else 0.0
    flops = config.batch_size * forward_flops(config.transformer, tokens, condition) * (3 + share) * steps / ranks
    row = {"tflops": flops / 1e12}
    if torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name())
        if peak:
            row["mfu"] = flops / peak
    return row
