"""A run on one page: report.html, with pictures and style inside, so that it opens anywhere without a network."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emf import __version__
from emf import config as configs
from emf.data.digits import TAGS
from emf.evaluate.small_world import EULER, closed

PAPER = {1: 0.74, 2: 0.85, 4: 0.90}
"""EMF's GenEval overall by steps (arXiv 2604.18168); flow matching, before it, at 1 and at 30 steps: PAPER_FM."""
PAPER_FM = {1: 0.46, 30: 0.91}
TRUST = {"ceiling": 0.95, "noise": 0.05, "shuffled": 0.05}
"""What the scorer must give: at least the first, at most the others."""

# Okabe and Ito's colours: told apart with any colour vision; marker and dash say the same again in grey print
FM, EMF, GREY, INK = "#d55e00", "#0072b2", "#8a8f98", "#1d2430"
SHADES = {"fm": ("#f0a873", "#d55e00", "#7d3700"), "emf": ("#7fbfe6", "#0072b2", "#003a5c")}
MARKERS = ("o", "s", "D")
STYLE: Any = {
    "figure.figsize": (4.6, 2.8),
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "emf",
}
CSS = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem; color: #1d2430; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem }
p { max-width: 46rem; margin: .4rem 0 } .lead { font-size: 1.1rem } .quiet { color: #59616e; font-size: .9rem }
code { font-size: .9em; background: #f2f4f7; padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere }
.cards, .plots { display: grid; gap: 1rem; margin: 1rem 0 }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)) }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.card { border: 1px solid #dde1e7; border-radius: 10px; padding: .9rem 1rem; break-inside: avoid }
.card b { display: block; font-size: 2.2rem; line-height: 1.15; color: #0072b2 } .fm b { color: #b04d00 }
.bar { height: .5rem; margin: .35rem 0 .1rem; background: #e9ecf0; border-radius: 4px; overflow: hidden }
.bar i { display: block; height: 100%; background: #0072b2 } .bar i.paper { background: #8a8f98 }
figure { margin: 0; min-width: 0; break-inside: avoid } figure img { width: 100%; max-width: 32rem; display: block }
figcaption { font-weight: 600; margin-bottom: .2rem } figcaption span { display: block; font-weight: 400 }
.wide { overflow-x: auto } .wide img { width: 100%; min-width: 42rem; display: block }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide table { min-width: 100% }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.text { text-align: left; white-space: normal }
.missing { border-left: 4px solid #e69f00; padding: .5rem .8rem; background: #fff8ea }
pre { overflow-x: auto; background: #f2f4f7; padding: 1rem; border-radius: 8px; font-size: .8rem; line-height: 1.35 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .8rem 0 }
dt { color: #59616e } dd { margin: 0 }
@media print { body { max-width: none; padding: 0; font-size: 11px } .wide { overflow: visible }
  .wide img { min-width: 0 } .plots { grid-template-columns: 1fr 1fr } .cards { grid-template-columns: repeat(3, 1fr) }
  h2 { break-after: avoid } * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""


def write_report(run: Path) -> Path:
    """report.html in a run's folder, from what lies there; returns its path.

    Needs config.json and a row of metrics.jsonl. Where curve.jsonl, scores.json or samples.png is missing, the page
    says so and names the command that makes it. Raises ValueError on no metrics, no config, or a file of another form.
    """
    metrics = _rows(run / "metrics.jsonl", ("step", "loss", "error", "lr", "it_s", "share", "memory_mib", "skipped"))
    if not metrics:
        raise ValueError(f"report: {run}/metrics.jsonl holds no row; give the folder of a run that has logged a step")
    config, scores = configs.read(run / "config.json"), _scores(run / "scores.json")
    curve = _rows(run / "curve.jsonl", ("step", "overall"))
    name, ended = run.resolve().name, datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime, UTC)
    with matplotlib.rc_context(STYLE):
        sections = [
            _header(name, config, metrics, scores),
            _key_figures(scores),
            _samples(run),
            _score_section(run, scores),
            _curve_section(run, curve, scores, config),
            _training_section(metrics, config),
            _trust(scores),
        ]
    body = f"""{"".join(sections)}
<h2>Settings</h2>
<details><summary>The resolved config; <code>emf train {escape(str(run / "config.json"))} --out DIR</code> runs it
again</summary>
<pre>{escape(json.dumps(config, indent=2))}</pre></details>
<p class="quiet">Run ended {ended:%Y-%m-%d %H:%M} UTC (last row of metrics.jsonl). Page made with emf {__version__},
torch {torch.__version__}, Python {platform.python_version()}.</p>"""
    out = run / "report.html"
    out.write_text(page(f"{name}: EMF-MeanFlow", body), encoding="utf-8")
    return out


def _rows(file: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a jsonl file, none where it is missing; a last line still being written is left out."""
    text = file.read_text() if file.is_file() else ""
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
            _ = [rows[-1][key] for key in keys]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"report: {file} line {number} is no row with {', '.join(keys)} ({error!r})") from None
    return rows


def _scores(file: Path) -> dict[str, Any] | None:
    """scores.json, None where it is missing."""
    if not file.is_file():
        return None
    try:
        scores = json.loads(file.read_text())
        numbers = [scores[key] for key in TRUST] + [r["by_tag"][tag] for r in scores["rows"] for tag in TAGS]
        numbers += [_overall(scores, "fm")[n] for n in EULER]
        if not all(isinstance(x, int | float) for x in [*numbers, *closed(scores).values()]):
            raise TypeError("a score is no number")
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"report: {file} is not what `emf evaluate digits` writes ({error!r}); run it again") from None
    return scores


def _overall(scores: dict[str, Any], model: str) -> dict[int, float]:
    """A model's overall score by number of steps."""
    return {r["steps"]: r["overall"] for r in scores["rows"] if r["model"] == model}


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">{what} is missing; <code>{escape(command)}</code> makes it.</p>'


def _percent(x: float) -> str:
    return "no gap" if np.isnan(x) else f"{x:.0%}".replace("%", " %")


def _header(name: str, config: dict[str, Any], metrics: list[dict[str, Any]], scores: dict[str, Any] | None) -> str:
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
        if emf and 4 in few:
            seen += f" In 4 steps EMF scores {few[4]:.2f}; flow matching {fm[4]:.2f} in 4 and {fm[30]:.2f} in 30."
        else:
            seen += f" Its score rises from {fm[1]:.2f} in one step to {fm[30]:.2f} in 30."
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
    items = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f'<h1>{escape(name)}</h1><p class="lead">{seen}</p><dl>{items}</dl>'


def _key_figures(scores: dict[str, Any] | None) -> str:
    """Share of the gap closed, beside the paper's; for a base, its scores."""
    if not scores:
        return ""
    fm, few, share = _overall(scores, "fm"), _overall(scores, "emf"), closed(scores)
    if not few:
        cards = "".join(
            f'<div class="card fm"><b>{score:.2f}</b>overall score of {_steps(n)}{_bar(score, "")}</div>'
            for n, score in fm.items()
        )
        return f'<h2>How well it draws</h2><div class="cards">{cards}</div>'
    gap, cards = PAPER_FM[30] - PAPER_FM[1], ""
    for n, score in PAPER.items():
        if n in few:
            paper = (score - PAPER_FM[1]) / gap
            cards += (
                f'<div class="card"><b>{_percent(share[n])}</b>of the gap closed in {_steps(n)}; score {few[n]:.2f}'
                f"{_bar(share[n], '')}{_bar(paper, 'paper')}"
                f'<span class="quiet">grey, the paper: {_percent(paper)}, GenEval {score:.2f}</span></div>'
            )
    return f"""<h2>How much of the gap few-step EMF closes</h2><div class="cards">{cards}</div>
<p class="quiet">The gap runs from flow matching in one step to flow matching in 30: here from {fm[1]:.2f} to
{fm[30]:.2f}, in the paper (GenEval, another model, other images) from {PAPER_FM[1]:.2f} to {PAPER_FM[30]:.2f}.
Only the shares compare.</p>"""


def _steps(n: int) -> str:
    return f"{n} step" + ("s" if n > 1 else "")


def _bar(share: float, kind: str) -> str:
    width = 0 if np.isnan(share) else min(max(share, 0), 1)
    return f'<div class="bar"><i class="{kind}" style="width:{width:.1%}"></i></div>'


def _samples(run: Path) -> str:
    title = "<h2>Samples</h2>"
    if not (run / "samples.png").is_file():
        return title + _missing("samples.png", f"emf evaluate digits {run}")
    data = base64.b64encode((run / "samples.png").read_bytes()).decode()
    alt = "Grid of sampled images: one caption a row, one sampler and number of steps a column"
    return f"""{title}<p class="quiet">One caption a row, one sampler a column (FM: flow matching; then the number of
steps); the same noise along a row.</p><div class="wide"><img src="data:image/png;base64,{data}" alt="{alt}"></div>"""


def plot(title: str, note: str, alt: str, draw: Callable[[Axes], None], size: tuple[float, float] | None = None) -> str:
    """One plot, as an SVG inside an image element: its ids cannot meet another's, and it has an alt text."""
    figure, file = Figure(figsize=size), io.BytesIO()
    draw(figure.subplots())
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><figcaption>{escape(title)}<span class="quiet">{note}</span></figcaption>'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}"></figure>'
    )


def page(title: str, body: str) -> str:
    """A page that opens anywhere: its style is inside."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
{body}
</body></html>
"""


def _note(axes: Axes, text: str, at: tuple[float, float], above: int, **style: Any) -> None:
    axes.annotate(text, at, (0, above), textcoords="offset points", fontsize=8, **style)


def _score_section(run: Path, scores: dict[str, Any] | None) -> str:
    """Overall score by number of steps, and the table by task."""
    title = "<h2>Scores</h2>"
    if not scores:
        return title + _missing("scores.json", f"emf evaluate digits {run}")
    fm, few = _overall(scores, "fm"), _overall(scores, "emf")
    lines = {"EMF": (few, EMF, "o", "-", 6)} if few else {}
    lines["flow matching"] = (fm, FM, "s", "--", -14)

    def draw(axes: Axes) -> None:
        axes.axhline(scores["ceiling"], color=GREY, linestyle=":", label="real held-out scenes")
        for name, (overall, color, marker, dash, offset) in lines.items():
            axes.plot(list(overall), list(overall.values()), color=color, marker=marker, linestyle=dash, label=name)
            for n, score in overall.items():
                _note(axes, f"{score:.2f}", (n, score), offset, ha="center", color=color)
        ticks = sorted({n for overall, *_ in lines.values() for n in overall})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set(ylim=(-0.08, 1.05), xlabel="steps", ylabel="overall score")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, columnspacing=1.2, handlelength=1.8)

    said = "; ".join(f"{k}: " + ", ".join(f"{s:.2f} in {n}" for n, s in line[0].items()) for k, line in lines.items())
    drawn = plot("Overall score by number of steps", "", f"Overall score by steps. {said}.", draw)
    share, body = closed(scores), ""
    for r in scores["rows"]:
        emf = r["model"] == "emf"
        body += (
            f"<tr><td>{'EMF' if emf else 'flow matching'}</td><td>{r['steps']}</td><td><b>{r['overall']:.3f}</b></td>"
        )
        for x in (r["by_tag"][tag] for tag in TAGS):
            body += f'<td style="background:rgba(0,114,178,{0.3 * x:.2f})">{x:.2f}</td>'
        body += f"<td>{_percent(share[r['steps']]) if emf else ''}</td></tr>"
    names = ("model", "steps", "overall", *(tag.replace("_", " ") for tag in TAGS), "gap closed")
    heads = "".join(f"<th>{name}</th>" for name in names)
    guidance = f" Guidance {scores['guidance']:g}, every sampler." if "guidance" in scores else ""
    return f"""{title}<p class="quiet">Share of images that show what the caption says, by GenEval's rules and tasks;
overall is the mean of the six.{guidance}</p><div class="plots">{drawn}</div>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"""


def _curve_section(
    run: Path, curve: list[dict[str, Any]], scores: dict[str, Any] | None, config: dict[str, Any]
) -> str:
    """Few-step score during training: the paper's Figure 4 in small."""
    title = "<h2>Score during training</h2>"
    if not curve:
        return title + _missing("curve.jsonl", f"emf train {run / 'config.json'} --out DIR --run.eval-every 100")
    counts = sorted(map(int, curve[-1]["overall"]))
    model = "emf" if config.get("objective") == "meanflow" else "fm"
    fm = _overall(scores, "fm") if scores else {}

    def draw(axes: Axes) -> None:
        for n, color, marker in zip(counts, SHADES[model], MARKERS, strict=False):
            seen = [(row["step"], row["overall"][str(n)]) for row in curve if str(n) in row["overall"]]
            axes.plot(*zip(*seen, strict=True), color=color, marker=marker, markersize=4, label=_steps(n))
        if model == "emf":
            for n in (n for n in (EULER[0], EULER[-1]) if n in fm):
                axes.axhline(fm[n], color=FM, linestyle="--", linewidth=1.2)
                where = ("axes fraction", "data")
                _note(axes, f"flow matching, {_steps(n)}", (1, fm[n]), 3, xycoords=where, ha="right", color=FM)
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
    return f'{title}<div class="plots">{plot(heading, note, alt, draw)}</div>'


def _training_section(metrics: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """Loss, error, learning rate, share, speed and memory by step."""
    steps = np.array([m["step"] for m in metrics])
    width = max(1, len(metrics) // 50)

    def line(key: str, label: str, title: str, note: str = "", log: bool = False, smooth: bool = False) -> str:
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
            axes.set(xlabel="training step", ylabel=label)

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
    return f'<h2>Training</h2><div class="plots">{"".join(plots)}</div>'


def _trust(scores: dict[str, Any] | None) -> str:
    """What the scorer gives to images that need no model."""
    if not scores:
        return ""
    texts = {
        "ceiling": ("real held-out scenes", "from scans that nothing was trained on: the most to expect of a model"),
        "noise": ("pure noise", "what an image without content gets by chance"),
        "shuffled": ("shuffled captions", "real scenes under another's caption: does it read captions?"),
    }
    body = ""
    for key, limit in TRUST.items():
        what, why = texts[key]
        holds = scores[key] >= limit if key == "ceiling" else scores[key] <= limit
        rule = f"{'at least' if key == 'ceiling' else 'at most'} {limit:.2f}: {'✓ holds' if holds else '✗ missed'}"
        body += f'<tr><td>{what}</td><td><b>{scores[key]:.3f}</b></td><td>{rule}</td><td class="text">{why}</td></tr>'
    return f"""<h2>Can the scorer be trusted?</h2><p class="quiet">Held to images that need no model, before any
score above is read.</p><div class="wide"><table><thead><tr><th>images</th><th>overall</th><th>must be</th><th></th>
</tr></thead><tbody>{body}</tbody></table></div>"""
