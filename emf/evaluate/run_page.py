"""A run on one page: report.html, with pictures and style inside, so that it opens anywhere without a network."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from emf.config import read
from emf.data.digits import TAGS
from emf.data.scores_file import CAPTIONS, EULER, SCORES, read_scores
from emf.evaluate.published import FEW_STEP, FLOW_MATCHING, by_steps
from emf.evaluate.recorded import share_of_gap
from emf.evaluate.run_log import read_curve, read_metrics
from emf.evaluate.small_world import closed, percent
from emf.files import write_text
from emf.recipes import from_file
from emf.show import page
from emf.show.page import Html
from emf.show.plot import EMF, FM, GREY, MARKERS, SHADES, label, margin, plot, steps_axis
from emf.weights.checkpoints import checkpoints, step_of

PAPER, PAPER_FM = by_steps("GenEval", FEW_STEP), by_steps("GenEval", FLOW_MATCHING)
GROUND = dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.4)
"""Of a label that stands on the line of the real scenes, which fades behind it."""
TRUST = {"ceiling": 0.95, "noise": 0.05, "shuffled": 0.05}
"""What the scorer must give: at least the first, at most the others."""


def write_report(run: Path) -> Path:
    """report.html in a run's folder, from what lies there; returns its path.

    Needs config.json and a row of metrics.jsonl. Where curve.jsonl, scores.json or samples.png is missing, the page
    says so and names the command that makes it. Raises ValueError on no metrics, no config, or a file of another form.
    """
    if not run.is_dir():
        raise ValueError(f"report: {run} {'is no folder' if run.exists() else 'does not exist'}; give a run's folder")
    metrics = read_metrics(run)
    if not metrics:
        raise ValueError(f"report: {run}/metrics.jsonl holds no row; give the folder of a run that has logged a step")
    config, scores = read(run / "config.json"), read_scores(run / SCORES, "report")
    from_file(run / "config.json")  # by which every value in it is looked at
    curve = read_curve(run)
    name, ended = run.resolve().name, datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime, UTC)
    again = f"emf train {run / 'config.json'} --out DIR"
    out, past = run / "report.html", _past(run, scores, metrics)
    text = page.page(
        f"{name}: EMF-MeanFlow",
        _header(name, config, metrics, scores, past),
        _key_figures(scores, past),
        _samples(run, config, past),
        _score_section(run, scores, config, past),
        _curve_section(run, curve, scores, config),
        _training_section(metrics, config),
        _trust(scores),
        Html("<h2>Settings</h2>"),
        page.folded(
            Html(f"The resolved config; {page.code(again)} runs it again"),
            Html(f"<pre>{escape(json.dumps(config, indent=2))}</pre>"),
        ),
        page.note(
            f"Run ended {ended:%Y-%m-%d %H:%M} UTC (last row of metrics.jsonl). Page made with emf {own_version()}, "
            f"torch {torch.__version__}, Python {platform.python_version()}."
        ),
    )
    write_text(out, text)
    return out


def own_version() -> str:
    """The installed distribution's; "unknown" where emf runs from a folder without being installed."""
    with suppress(PackageNotFoundError):
        return version("emf-meanflow")
    return "unknown"


def _past(run: Path, scores: dict[str, Any] | None, metrics: list[dict[str, Any]]) -> Html:
    """What is to be said above scores and samples that are not of the run's last checkpoint; nothing where they are."""
    if scores is None:
        return Html()
    step, there = scores.get("step"), [step_of(checkpoint) for checkpoint in checkpoints(run)]
    last = there[-1] if there else metrics[-1]["step"]
    if step == last:
        return Html()
    of = f"of step {step}" if step is not None else "of a step that scores.json does not tell"
    said = f"These are {of}; the run is at step {last}. "
    return Html(f'<p class="missing">{said}{page.code(f"emf evaluate digits {run}")} scores it as it is now.</p>')


def _overall(scores: dict[str, Any], model: str) -> dict[int, float]:
    """A model's overall score by number of steps."""
    return {r["steps"]: r["overall"] for r in scores["rows"] if r["model"] == model}


def _percent(x: float) -> str:
    return percent(x).replace("%", " %")


def _header(
    name: str, config: dict[str, Any], metrics: list[dict[str, Any]], scores: dict[str, Any] | None, past: Html
) -> Html:
    """Title, what one sees, the run in three lines."""
    emf = config.get("objective") == "meanflow"
    if emf:
        seen = (
            "Flow matching draws a caption in 30 steps and blurs it in one; this run teaches it to draw in 1, 2 or 4."
        )
    else:
        seen = "A flow-matching model trained from scratch: it draws in 30 steps, blurs in one. EMF starts here."
    if scores:
        fm, few = _overall(scores, "fm"), _overall(scores, "emf")
        at = " When it was scored:" * bool(past)
        if emf and 4 in few:
            seen += f"{at} In 4 steps EMF scores {few[4]:.2f}; flow matching {fm[4]:.2f} in 4 and {fm[30]:.2f} in 30."
        else:
            seen += f"{at} Its score rises from {fm[1]:.2f} in one step to {fm[30]:.2f} in 30."
    last, total = metrics[-1], config.get("steps")
    done = f"{last['step']} of {total}" + ("" if last["step"] == total else " (unfinished)")
    before = [0] + [m["step"] for m in metrics]
    minutes = sum((m["step"] - b) / m["it_s"] for m, b in zip(metrics, before, strict=False) if m["it_s"]) / 60
    objective, speed = "EMF (MeanFlow)" if emf else "flow matching", np.median([m["it_s"] for m in metrics])
    facts = {
        "Recipe": f"{config.get('recipe')}, {objective}, batch {config.get('batch_size')}",
        "Steps": done + (f", {last['skipped']} skipped" if last["skipped"] else ""),
        "Training": f"about {minutes:.1f} minutes, {speed:.2f} steps a second (median)",
    }
    return Html(f'<h1>{page.words(name)}</h1><p class="lead">{page.words(seen)}</p>{page.facts(facts)}')


def _key_figures(scores: dict[str, Any] | None, past: Html) -> Html:
    """Share of the gap closed, beside the paper's; for a base, its scores."""
    if not scores:
        return Html()
    fm, few, share = _overall(scores, "fm"), _overall(scores, "emf"), closed(scores)
    if not few:
        cards = [
            page.card(f"{score:.2f}", Html(f"overall score of {_steps(n)}{page.bar(score)}"), "fm")
            for n, score in fm.items()
        ]
        return Html(f"<h2>How well it draws</h2>{past}{_caution(scores)}{page.cards(cards)}")
    cards = []
    for n, score in PAPER.items():
        if n in few:
            paper = share_of_gap(score, PAPER_FM[1], PAPER_FM[30])
            theirs = page.quiet(f"grey, the paper: {_percent(paper)}, GenEval {score:.2f}")
            bars = page.bar(share[n]) + page.bar(paper, "paper")
            said = Html(f"of the gap closed in {_steps(n)}; score {few[n]:.2f}{bars}{theirs}")
            cards.append(page.card(_percent(share[n]), said))
    told = page.note(
        "The gap runs from flow matching in one step to flow matching in 30: here from "
        f"{fm[1]:.2f} to {fm[30]:.2f}, in the paper (GenEval, another model, other images) from {PAPER_FM[1]:.2f} to "
        f"{PAPER_FM[30]:.2f}. Only the shares compare."
    )
    return Html(f"<h2>How much of the gap few-step EMF closes</h2>{past}{_caution(scores)}{page.cards(cards)}{told}")


def _caution(scores: dict[str, Any]) -> Html:
    """A sentence where the scores are of so few captions that they differ by chance more than models do."""
    n = scores.get("captions", CAPTIONS)
    return page.note(f"{n} caption{'s' * (n != 1)}: too few to compare.") if n < CAPTIONS else Html()


def _steps(n: int) -> str:
    return f"{n} step" + ("s" if n > 1 else "")


def _draws_digits(config: dict[str, Any]) -> bool:
    condition = config.get("condition")
    return not isinstance(condition, dict) or condition.get("kind", "small") == "small"


def _unscored(what: str, run: Path, config: dict[str, Any]) -> Html:
    """What is not there, and the command that scores the run: the digits' own, or a benchmark's on what it draws."""
    if _draws_digits(config):
        return page.missing(what, f"emf evaluate digits {run}")
    how = " --flow-matching" if config.get("objective") == "flow_matching" else ""
    latent = config.get("transformer", {}).get("in_channels", 0) != 3
    if latent and config.get("data", {}).get("vae") is None:  # a run on a cache need not know of it
        how += " --vae SANA"
    command = f"emf evaluate geneval --prompts evaluation_metadata.jsonl --checkpoint {run}{how} --out DIR"
    return Html(f'<p class="missing">This run draws no digits: {page.code(command)} draws and scores it, in DIR.</p>')


def _samples(run: Path, config: dict[str, Any], past: Html) -> Html:
    title = Html("<h2>Samples</h2>")
    if not (run / "samples.png").is_file():
        return Html(title + _unscored("samples.png", run, config))
    alt = "Grid of sampled images: one caption a row, one sampler and number of steps a column"
    said = page.note(
        "One caption a row, one sampler a column (FM: flow matching; then the number of steps); the same noise along a "
        "row."
    )
    return Html(title + past + said + page.wide(page.picture((run / "samples.png").read_bytes(), alt)))


def _score_section(run: Path, scores: dict[str, Any] | None, config: dict[str, Any], past: Html) -> Html:
    """Overall score by number of steps, and the table by task."""
    title = Html("<h2>Scores</h2>")
    if not scores:
        return Html(title + _unscored("scores.json", run, config))
    fm, few = _overall(scores, "fm"), _overall(scores, "emf")
    lines = {"EMF": (few, EMF, "o", "-")} if few else {}
    lines["flow matching"] = (fm, FM, "s", "--")

    def draw(axes: Axes) -> None:
        axes.axhline(scores["ceiling"], color=GREY, linestyle=":", label="real held-out scenes")
        for name, (overall, color, marker, dash) in lines.items():
            other = next((line[0] for key, line in lines.items() if key != name), {})
            axes.plot(list(overall), list(overall.values()), color=color, marker=marker, linestyle=dash, label=name)
            for n, score in overall.items():
                above = apart(n, score, other, name == "EMF")
                at = 6 if above else -14
                label(axes, f"{score:.2f}", (n, score), at, ha="center", color=color, bbox=GROUND)
        steps_axis(axes, (n for overall, *_ in lines.values() for n in overall))
        axes.set(ylim=(-0.08, 1.05), ylabel="overall score")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, columnspacing=1.2, handlelength=1.8)

    said = "; ".join(f"{k}: " + ", ".join(f"{s:.2f} in {n}" for n, s in line[0].items()) for k, line in lines.items())
    drawn = plot("Overall score by number of steps", "", f"Overall score by steps. {said}.", draw)
    share, rows = closed(scores), list[list[str | page.Shaded]]()
    for r in scores["rows"]:
        emf, by_tag = r["model"] == "emf", [r["by_tag"][tag] for tag in TAGS]
        model = ["EMF" if emf else "flow matching", str(r["steps"]), Html(f"<b>{r['overall']:.3f}</b>")]
        tasks = [page.Shaded(f"{x:.2f}", x) for x in by_tag]
        rows.append([*model, *tasks, _percent(share[r["steps"]]) if emf else ""])
    heads = ("model", "steps", "overall", *(tag.replace("_", " ") for tag in TAGS), "gap closed")
    guidance = f" Guidance {scores['guidance']:g}, every sampler." if "guidance" in scores else ""
    counted = f" {scores['captions']} captions were scored." if "captions" in scores else ""
    counted += f" Weights of step {scores['step']}." if scores.get("step") is not None else ""
    told = page.note(
        "Share of images that show what the caption says, by GenEval's rules and tasks; overall is the mean of the "
        f"six.{counted}{guidance}"
    )
    return Html(title + past + told + page.figures([drawn]) + page.table(heads, rows))


def apart(n: int, score: float, other: dict[int, float], by_default: bool) -> bool:
    """Whether the label of a score in n steps stands above its point: it does where the other line of the plot, whose
    axis of steps is logarithmic, runs below. by_default: where that does not reach n, or meets the point."""
    if not min(other, default=n + 1) <= n <= max(other, default=n - 1):
        return by_default
    there = float(np.interp(np.log(n), np.log(sorted(other)), [other[k] for k in sorted(other)]))
    return by_default if there == score else there < score


def _curve_section(
    run: Path, curve: list[dict[str, Any]], scores: dict[str, Any] | None, config: dict[str, Any]
) -> Html:
    """Few-step score during training: the paper's Figure 4 in small."""
    title = Html("<h2>Score during training</h2>")
    if not _draws_digits(config):  # which alone are scored while they are trained
        return Html()
    if not curve:
        command = f"emf train {run / 'config.json'} --out DIR --run.eval-every 100"
        return Html(title + page.missing("curve.jsonl", command))
    counts = sorted(map(int, curve[-1]["overall"]))
    model = "emf" if config.get("objective") == "meanflow" else "fm"
    fm = _overall(scores, "fm") if scores else {}

    def draw(axes: Axes) -> None:
        for n, color, marker in zip(counts, SHADES[model], MARKERS, strict=False):
            seen = [(row["step"], row["overall"][str(n)]) for row in curve if str(n) in row["overall"]]
            axes.plot(*zip(*seen, strict=True), color=color, marker=marker, markersize=4, label=_steps(n))
        if model == "emf":
            beside = {f"flow matching,\n{_steps(n)}": fm[n] for n in (EULER[0], EULER[-1]) if n in fm}
            for score in beside.values():
                axes.axhline(score, color=FM, linestyle="--", linewidth=1.2)
            margin(axes, beside, 0.17, color=FM)
        axes.set(ylim=(-0.03, 1.03), xlabel="training step", ylabel="overall score")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3)

    last = ", ".join(f"{curve[-1]['overall'][str(n)]:.2f} in {_steps(n)}" for n in counts)
    note = f"averaged weights, {config.get('run', {}).get('eval_prompts')} prompts a task: noisier than the table above"
    guidance = curve[-1].get("guidance")
    note += f"; guidance {guidance:g}" if guidance is not None else ""
    if fm and model == "emf":
        note += "; dashed: the base, from that table"
        if guidance is not None and scores and guidance != scores.get("guidance", guidance):
            note += f", at guidance {scores['guidance']:g}"
    heading, alt = f"Score of {', '.join(map(str, counts))} steps", f"Overall score during training; at the end {last}."
    return Html(title + page.figures([plot(heading, note, alt, draw)]))


def _training_section(metrics: list[dict[str, Any]], config: dict[str, Any]) -> Html:
    """Loss, error, learning rate, share, speed and memory by step."""
    steps = np.array([m["step"] for m in metrics])
    width = max(1, len(metrics) // 50)

    def line(key: str, unit: str, title: str, note: str = "", log: bool = False, smooth: bool = False) -> Html:
        y = np.array([m[key] for m in metrics], float)

        def draw(axes: Axes) -> None:
            if smooth and width > 1:
                kernel = np.full(width, 1 / width)
                axes.plot(steps, y, color=EMF, alpha=0.3, linewidth=0.8)
                axes.plot(np.convolve(steps, kernel, "valid"), np.convolve(y, kernel, "valid"), color=EMF)
            else:
                axes.plot(steps, y, color=EMF, marker="o" if len(y) == 1 else "")
            if log:
                axes.set_yscale("log")
            else:
                axes.set_ylim(min(0, y.min()), 1.08 * y.max() or 1)
            axes.set(xlabel="training step", ylabel=unit)

        return plot(title, note, f"{title} by step: from {y[0]:.3g} to {y[-1]:.3g}, largest {y.max():.3g}", draw)

    note = ""
    if config.get("objective") == "meanflow" and config.get("flow", {}).get("weight_p") == 1:
        note = "the adaptive weight of power 1 keeps it near 1: read the error instead"
    plots = [
        line("error", "mean squared error", "Raw mean squared error", "bold: running mean", log=True, smooth=True),
        line("loss", "loss", "Loss", note, smooth=True),
        line("lr", "learning rate", "Learning rate"),
        line("share", "share", "Share of samples with r < t", "these carry a tangent"),
        line("it_s", "steps a second", "Speed"),
        line("memory_mib", "MiB", "Peak memory so far"),
    ]
    return Html("<h2>Training</h2>" + page.figures(plots))


def _trust(scores: dict[str, Any] | None) -> Html:
    """What the scorer gives to images that need no model."""
    if not scores:
        return Html()
    texts = {
        "ceiling": ("real held-out scenes", "from scans that nothing was trained on: the most to expect of a model"),
        "noise": ("pure noise", "what an image without content gets by chance"),
        "shuffled": ("shuffled captions", "real scenes under another's caption: does it read captions?"),
    }
    rows = []
    for key, limit in TRUST.items():
        what, why = texts[key]
        holds = scores[key] >= limit if key == "ceiling" else scores[key] <= limit
        rule = f"{'at least' if key == 'ceiling' else 'at most'} {limit:.2f}: {'✓ holds' if holds else '✗ missed'}"
        rows.append([what, Html(f"<b>{scores[key]:.3f}</b>"), rule, why])
    told = page.note("Held to images that need no model, before any score above is read.")
    made = page.table(("images", "overall", "must be", ""), rows, told=(3,))
    return Html("<h2>Can the scorer be trusted?</h2>" + told + made)
