"""Whether training stays finite, and the tangent keeps its size, at length: `python -m bench.stability` writes
profiles/stability.json and stability.png. Others report NaN after tens of thousands of steps of MeanFlow.

A small network (2 blocks of 32 channels, the digits) is trained for flow matching, and from there as EMF trains, at a
constant learning rate, with every scale of times and both ways to start the two time embedders. Each run is one of
emf.train's, which ends where a loss, a gradient or a weight is not finite. Twenty checkpoints of a run are probed:
|u_dot| / |u| of 256 samples at fixed times. Ended early, the same command goes on; what is done is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.records import PROFILES, begun, write_record
from emf.config import Config
from emf.data import digits
from emf.errors import Diverged, as_command
from emf.evaluate.run_log import read_metrics
from emf.flow import times
from emf.flow_config import FlowConfig
from emf.model.text_to_image import TextToImage
from emf.paper.runs import train_whole
from emf.recipes import RECIPES
from emf.weights.checkpoints import checkpoints, step_of
from emf.weights.folders import load_run
from emf_kernels import Dual, path

RECORD = PROFILES / "stability.json"
CASES = (
    ("duplicate", 1.0),  # EMF's
    ("preserve", 10.0),  # the digits'
    ("duplicate", 1000.0),  # as far as the base's own times go
    ("preserve", 1000.0),
    ("duplicate", 10.0),
    ("preserve", 1.0),
)
"""How the embedders start, and what times are multiplied with before the sinusoids."""
PROBES = 256


@dataclass(frozen=True)
class Length:
    base: int = 2000
    steps: int = 20_000
    every: int = 1000
    batch: int = 8


def base_config(length: Length) -> Config:
    config = RECIPES["digits-base"]()
    small = replace(
        config.transformer,
        num_layers=2,
        num_attention_heads=1,
        num_cross_attention_heads=1,
        cross_attention_head_dim=32,
    )
    run = replace(config.run, save_every=length.base, log_every=length.every // 10, keep=1)
    return replace(config, steps=length.base, batch_size=4 * length.batch, transformer=small, run=run)


def run_config(base: Path, scale: float, how: Any, length: Length) -> Config:
    config, start = RECIPES["digits"](), base_config(length).transformer
    return replace(
        config,
        init=base,
        embedder_init=how,
        steps=length.steps,
        batch_size=length.batch,
        transformer=replace(start, dual_time=True, time_scale=scale),
        # raw weights at a constant rate: an average or a rate that falls would hide what drifts
        optim=replace(config.optim, decay="constant", warmup=0.01, ema=0.0),
        run=replace(config.run, save_every=length.every, eval_every=0, log_every=length.every // 10, keep=length.steps),
    )


@torch.no_grad()
def ratios(network: TextToImage) -> Tensor:
    """|u_dot| / |u| [PROBES] along (v, 0, 1), of a sample's RMS each, at times as EMF draws them at training's end."""
    x, captions = digits.make_batch(7, PROBES)
    generator = torch.Generator().manual_seed(7)
    e = torch.randn(x.shape, generator=generator)
    t, r, _ = times(1.0, PROBES, replace(FlowConfig(), share=(1.0, 1.0)), generator)
    z, v = path(x, e, t)
    u = network(Dual(z, v), Dual(t, torch.ones_like(t)), r, network.read(*digits.WORDS.encode(captions)))
    size, speed = (a.flatten(1).square().mean(1).sqrt() for a in (u.primal, u.tangent))
    return speed / size


def probed(run: Path) -> list[dict[str, float]]:
    """A row a checkpoint, with the logged rows between it and the one before."""
    logged, rows, before = read_metrics(run), [], 0
    for checkpoint in checkpoints(run):
        step = step_of(checkpoint) or 0
        ratio = ratios(load_run(checkpoint)[1])
        between = [row for row in logged if before < row["step"] <= step]
        rows.append(
            dict(
                step=step,
                median=ratio.median().item(),
                most=ratio.max().item(),
                error=sum(row["error"] for row in between) / len(between),
                gradient=max(row["grad_norm"] for row in between),
            )
        )
        before = step
    return rows


def measured(out: Path, base: Path, scale: float, how: str, length: Length) -> dict[str, Any]:
    """One run, whole or up to where it was not finite."""
    run, fault = out / f"{how}-{scale:g}", ""
    try:
        train_whole(run_config(base, scale, how, length), run)
    except Diverged as error:
        fault = str(error).replace(str(out), "runs/stability")
    return dict(embedder_init=how, time_scale=scale, fault=fault, rows=probed(run))


def plot(runs: Sequence[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    from emf.show.plot import COLORS, MARKERS, write_plot

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for color, marker, run in zip(COLORS, MARKERS, runs, strict=False):
            steps = [row["step"] for row in run["rows"]]
            label = f"{run['embedder_init']}, scale {run['time_scale']:g}"
            how: dict[str, Any] = dict(color=color, marker=marker, markersize=3, label=label)
            left.plot(steps, [row["median"] for row in run["rows"]], **how)
            right.plot(steps, [row["error"] for row in run["rows"]], **how)
        left.set(yscale="log", xlabel="step", title="median of |u_dot| / |u|")
        right.set(yscale="log", xlabel="step", title="mean squared error of u")
        for axes in (left, right):
            axes.locator_params(axis="x", nbins=5)  # numbers of five digits, which lie over each other else
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    write_plot(file, draw, (8.4, 3.6), 110)


def shown(runs: Sequence[dict[str, Any]]) -> None:
    from emf.show.table import console, terminal

    heads = (
        "embedders",
        "time scale",
        "steps",
        "|u_dot| / |u| first",
        "last",
        "least",
        "most",
        "gradient",
        "error",
        "",
    )
    printed = []
    for run in runs:
        rows = run["rows"]
        medians = [row["median"] for row in rows]
        steps, figures = "0", ["–"] * 6  # of a run that was not finite before its first checkpoint
        if rows:
            figures = [f"{x:.3g}" for x in (medians[0], medians[-1], min(medians), max(medians))]
            figures += [f"{max(row['gradient'] for row in rows):.3g}", f"{rows[-1]['error']:.3g}"]
            steps = str(rows[-1]["step"])
        printed.append([run["embedder_init"], f"{run['time_scale']:g}", steps, *figures, run["fault"]])
    console().print(terminal(heads, printed, words=(0, 9)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stability", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=Length.steps, help="of each of the six runs")
    parser.add_argument("--record", type=Path, default=RECORD, help="what is written; a picture lies beside it")
    asked = parser.parse_args(arguments)
    length = replace(Length(), steps=asked.steps, every=max(10, asked.steps // 20))
    head = dict(steps=length.steps, batch=length.batch)
    runs = begun(asked.record, head, "stability").get("runs", [])
    base = asked.out / "base"
    train_whole(base_config(length), base)
    for how, scale in CASES:
        if any((run["embedder_init"], run["time_scale"]) == (how, scale) for run in runs):
            continue
        print(f"{how}, time scale {scale:g}", flush=True)
        runs.append(measured(asked.out, base, scale, how, length))
        write_record(asked.record, dict(**head, runs=runs))
        plot(runs, asked.record.with_suffix(".png"))
    shown(runs)


if __name__ == "__main__":
    with as_command():
        main()
