"""A run of the digits' world: its scores and its pictures, few-step EMF beside the flow matching it began from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emf.config import Config
from emf.data.digits import TAGS, prompts
from emf.data.scores_file import CAPTIONS, EULER, FEW, SCORES, refuse_lesser
from emf.evaluate.digits_scorer import Scorer, calibrate
from emf.evaluate.recorded import about, recorded, share_of_gap, spreads, standard_error
from emf.files import check_writable, write_json
from emf.idle import chosen
from emf.recipes import RECIPES
from emf.sample.cores import on_every_core
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import SMALL_AT_ONCE, Settings
from emf.show.progress import bars
from emf.show.sheet import captioned, write_sheet
from emf.show.table import console, terminal
from emf.weights.checkpoints import at_newest, step_of
from emf.weights.folders import load_run, load_start


def evaluate_run(run: Path, per_tag: int, guidance: float, seed: int) -> dict[str, Any]:
    """Write scores.json and samples.png into the run's folder; every row has the same prompts and noise.

    scores.json says of which step's weights they are. per_tag: prompts of each of the six tasks. guidance: of every
    sampler. seed: of the noise. Returns what scores.json holds. Raises ValueError where the folder is no run that
    can be scored, and where it has scores that are more worth, see emf.data.scores_file.
    """
    if per_tag < 1:
        raise ValueError(f"evaluate: --per-tag {per_tag} must be at least 1")
    Settings(1, guidance, seed)
    if not (run / "metrics.jsonl").exists() and (run / "model.safetensors").exists():
        raise ValueError(f"evaluate: {run} is a checkpoint; give the run's folder, in which the scores are written")
    config, network, step = at_newest(run, lambda place: (*load_run(place), step_of(place)))
    check_writable(run / SCORES, "evaluate: ")
    specs = prompts(per_tag)
    told: dict[str, Any] = {"captions": len(specs), "guidance": guidance, "seed": seed}
    meanflow = config.objective == "meanflow"
    asked = [("fm", n) for n in EULER] + [("emf", n) for n in FEW] * meanflow
    refuse_lesser(run, told, asked)
    base = Sampler(config, load_start(config).network if meanflow else network, source="the base" if meanflow else run)
    few = Sampler(config, network, source=run) if meanflow else base
    rows = [(model, n, few if model == "emf" else base) for model, n in asked]
    how = [Settings(n, guidance, seed, average=model == "emf", batch=SMALL_AT_ONCE) for model, n, _ in rows]
    drawn = draw(
        [(sampler, settings) for (*_, sampler), settings in zip(rows, how, strict=True)], [s["prompt"] for s in specs]
    )
    scorer = Scorer.fit()
    scores: dict[str, Any] = {"step": step, **told, "rows": []}
    pictures: dict[str, Any] = {}
    shown = [i for tag in range(len(TAGS)) for i in range(tag * per_tag, tag * per_tag + min(per_tag, 2))]
    for (model, steps, _), images in zip(rows, drawn, strict=True):
        result = scorer.score(images, specs)
        scores["rows"].append(
            {"model": model, "steps": steps, "overall": result["overall"], "by_tag": result["by_tag"]}
        )
        pictures[f"{model.upper()} {steps}"] = to_uint8(images[shown])
    scores |= calibrate(scorer, world=config.world)
    write_json(run / SCORES, scores)
    cells = captioned([specs[i]["prompt"] for i in shown], pictures)
    write_sheet(run / "samples.png", cells, ["", *pictures], cell=126)
    print_scores(scores, "" if changed(config) else config.recipe)
    return scores


def draw(rows: Sequence[tuple[Sampler, Settings]], captions: Sequence[str]) -> Iterator[np.ndarray]:
    """Images [n, 3, H, W] of the captions by each sampler with its settings, on every core: what
    sampler.images(captions, settings) gives, to rounding."""
    batch = min(settings.batch for _, settings in rows)
    parts = [range(i, min(i + batch, len(captions))) for i in range(0, len(captions), batch)]
    items = [(sampler, settings, part) for sampler, settings in rows for part in parts]

    def work(item: tuple[Sampler, Settings, range]) -> Tensor:
        sampler, settings, part = item
        return sampler.images([captions[i] for i in part], settings, numbers=part)

    done = on_every_core(work, items)
    with bars() as progress:
        total = sum(settings.steps for _, settings in rows) * len(captions)
        task, made = progress.add_task("sampling, steps of images", total=total), list[Tensor]()
        for (_, settings, part), images in zip(items, done, strict=True):
            progress.advance(task, settings.steps * len(part))
            made.append(images)
            if len(made) == len(parts):
                yield torch.cat(made).numpy()
                made.clear()


def changed(config: Config) -> bool:
    """Whether a run has settings other than its recipe's, which another recipe's scores say nothing of."""
    own = ["init", "seed", "run.", "zero."]  # which change nothing, or are told with a score
    if config.warmup == RECIPES[config.recipe]().warmup:
        own.append("optim.warmup")  # runs of earlier versions name steps where a recipe names a share of them
    return any(not name.startswith(tuple(own)) for name in chosen(config))


def closed(scores: dict[str, Any]) -> dict[int, float]:
    """By number of steps: the fraction of the gap from one-step to 30-step flow matching that EMF closes."""
    fm = {r["steps"]: r["overall"] for r in scores["rows"] if r["model"] == "fm"}
    ends = fm[1], fm[EULER[-1]]
    return {r["steps"]: share_of_gap(r["overall"], *ends) for r in scores["rows"] if r["model"] == "emf"}


def percent(share: float) -> str:
    """Of the gap; where flow matching has the same score in one step and 30 there is none."""
    return "no gap" if math.isnan(share) else f"{share:.0%}"


def print_scores(scores: dict[str, Any], recipe: str) -> None:
    """The scores as a table in the terminal; then the overall ones beside those that runs of the recipe had.

    recipe: empty where the run's was changed."""
    share, rows, captions = closed(scores), [], scores.get("captions", CAPTIONS)
    for r in scores["rows"]:
        cells = ["–" if math.isnan(x) else f"{x:.3f}" for x in (r["overall"], standard_error(r, captions))]
        cells += [f"{r['by_tag'][tag]:.2f}" for tag in TAGS]
        rows.append([r["model"], str(r["steps"]), *cells, percent(share[r["steps"]]) if r["model"] == "emf" else ""])
    out = console()
    out.print(terminal(("model", "steps", "overall", "±", *TAGS, "gap closed"), rows, words=(0,)))
    if runs := recorded(recipe, scores):
        beside, gap = {model: spreads(runs, model) for model in ("fm", "emf")}, spreads(runs, "gap")
        rows = []
        for r in scores["rows"]:
            model, n = r["model"], r["steps"]
            cells = [percent(share[n]), f"{gap[n]:.0%}"] if model == "emf" and n in gap else ["", ""]
            if n in beside[model]:
                rows.append([model, str(n), f"{r['overall']:.3f}", f"{beside[model][n]:.3f}", *cells])
        out.print(terminal(("model", "steps", "overall", "recorded", "gap closed", "recorded"), rows, words=(0,)))
        out.print(
            f"recorded: mean and range of {about(runs)} with the recipe {recipe}. Scores differ between machines: "
            "rounding does, and training lets the difference grow."
        )
    out.print(f"±: a score's standard error by the noise and choice of {captions:,} captions; training's is not in it")
    out.print(
        f"scorer: real scenes {scores['ceiling']:.3f}, noise {scores['noise']:.3f}, "
        f"shuffled captions {scores['shuffled']:.3f}"
    )
