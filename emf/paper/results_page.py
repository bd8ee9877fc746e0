"""report-paper.html: the paper's tables and figures in miniature, beside the paper's, and where they disagree."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from emf.analyze.outcome import PAPER as PAPER_ENCODERS
from emf.data.digits import TAGS
from emf.paper.parts import ABLATIONS, EMF_STEPS, ENCODERS, FM_STEPS, QUICK, Budget, parts
from emf.paper.runs import ENCODER, SCORES, write_whole
from emf.show.run_page import EMF, FM, GREY, PAPER, PAPER_FM, SHADES, STYLE, page, plot

COLORS = dict(zip(ENCODERS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
MEASURES = ("discriminability", "discriminability, centred", "disentanglement", "disentanglement, centred")
Series = dict[str, list[Any]]
QUIET, TEXT = '<span class="quiet">', ' class="text"'  # what is told in a table stands left, and wraps


def gather(out: Path, budget: Budget) -> dict[str, Any]:
    """What the parts that are done have found, each a list over seeds; results.json. `missing`: the others."""
    scores: dict[str, Any] = {}
    encoders: dict[str, Series] = {}
    curves: dict[str, Any] = {}
    missing = []
    for part in parts(budget):
        folder, group = out / part.name, part.name.rpartition("/")[0]
        if not (folder / SCORES).is_file():
            missing.append(part.name)
            continue
        for steps, row in json.loads((folder / SCORES).read_text()).items():
            kept = scores.setdefault(group, {}).setdefault(steps, {"overall": [], "by_tag": {t: [] for t in TAGS}})
            kept["overall"].append(row["overall"])
            for tag in TAGS:
                kept["by_tag"][tag].append(row["by_tag"][tag])
        if (folder / ENCODER).is_file():
            for name, value in json.loads((folder / ENCODER).read_text()).items():
                encoders.setdefault(group.removeprefix("base/"), {}).setdefault(name, []).append(value)
        if (folder / "curve.jsonl").is_file():
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
            own = curves.setdefault(group, {"steps": [], "error": [], "at": [], "score": {"1": [], "2": [], "4": []}})
            own["steps"], own["at"] = [m["step"] for m in metrics], [c["step"] for c in curve]
            own["error"].append([m["error"] for m in metrics])
            for n, lines in own["score"].items():
                lines.append([c["overall"][n] for c in curve])
    found = {"budget": asdict(budget), "scores": scores, "encoders": encoders, "curves": curves, "missing": missing}
    write_whole(out / "results.json", found)
    return found


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def spread(values: Sequence[float]) -> float:
    """From the least to the largest."""
    return float(np.ptp(values)) if len(values) else float("nan")


def said(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and below it the range over seeds."""
    if not len(values):
        return "–"
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f'<br><span class="quiet">{min(values):.{digits}f}–{max(values):.{digits}f}</span>'
    return text


class Found:
    """results.json, asked by name."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree

    def score(self, group: str, steps: int, tag: str | None = None) -> list[float]:
        """By seed; of parts that are missing none."""
        row = self.tree["scores"].get(group, {}).get(str(steps))
        if row is None:
            return []
        values: list[float] = row["overall"] if tag is None else row["by_tag"][tag]
        return values

    def encoder(self, name: str, measure: str) -> list[float]:
        values: list[float] = self.tree["encoders"].get(name, {}).get(measure, [])
        return values

    def kept(self, encoder: str, steps: int) -> list[float]:
        """EMF's score in so many steps as a share of the same base's in 30, by seed."""
        pairs = zip(self.score(f"emf/{encoder}", steps), self.score(f"base/{encoder}", 30), strict=False)
        return [few / many for few, many in pairs if many]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    told = [c.startswith(QUIET) for c in rows[0]]
    align = lambda text: f' style="white-space: normal{"; text-align: left" * text}"'  # noqa: E731
    head = "".join(
        f"<th{align(text)}>{escape(h).replace('EMF ', 'EMF&nbsp;')}</th>" for h, text in zip(heads, told, strict=True)
    )
    cells = lambda row: "".join(f"<td{TEXT if c.startswith(QUIET) else ''}>{c}</td>" for c in row)  # noqa: E731
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def encoder_tables(found: Found) -> str:
    """Tables 1 and 2."""
    rows = [[escape(e), *(said(found.encoder(e, m)) for m in MEASURES)] for e in ENCODERS]
    theirs = [
        [f"{name}, paper", f"{x:.3f}", "", f"{PAPER_ENCODERS['disentanglement'][name]:.3f}", ""]
        for name, x in PAPER_ENCODERS["discriminability"].items()
    ]
    told = "".join(f"<li><b>{escape(k)}</b>: {escape(v)}</li>" for k, v in ENCODERS.items())
    return f"""<h2>Tables 1 and 2: what the text encoders are</h2><ul>{told}</ul>
<p class="quiet">Discriminability: cosine of a scene's smoothed pixels with those of the scene whose caption is nearest
(the paper: DINOv3 features on COCO); chance gives {mean(found.encoder("trained", "chance")):.3f}. Disentanglement:
cosine of a caption's embedding with that of the caption less half of its words. Centred: less the mean embedding. The
paper's encoders are others; only the order of good and bad can compare.</p>
{table(("text encoder", *MEASURES), rows + theirs)}"""


def by_task(found: Found) -> str:
    """Table 3."""
    lines = [("EMF", "emf/trained", n) for n in (1, 2, 4)]
    lines += [("flow matching", "base/trained", n) for n in (30, 4, 1)]
    rows = []
    for name, group, n in lines:
        paper = PAPER.get(n) if name == "EMF" else {**PAPER_FM, 4: 0.86}.get(n)
        cells = [said(found.score(group, n, tag), 2) for tag in TAGS]
        rows.append([name, str(n), said(found.score(group, n)), *cells, "" if paper is None else f"{paper:.2f}"])
    heads = ("model", "steps", "overall", *(t.replace("_", " ") for t in TAGS), "GenEval, paper")
    return f"<h2>Table 3: few steps beside many</h2>{table(heads, rows)}"


def curve_plot(found: Found) -> str:
    """Figure 4."""
    curve = found.tree["curves"].get("emf/trained")
    if not curve:
        return ""

    def draw(axes: Axes) -> None:
        for n, color in zip((1, 2, 4), SHADES["emf"], strict=True):
            lines = np.array(curve["score"][str(n)])
            axes.plot(curve["at"], lines.mean(0), color=color, marker="o", markersize=4, label=f"{n} steps")
            axes.fill_between(curve["at"], lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set(ylim=(0, 1), xlabel="training step", ylabel="overall score")
        axes.legend(loc="lower right", ncols=3)

    note = "mean and range over seeds; the paper: 4 steps near their best at 10k, 2 at 70k, 1 at 90k"
    return plot("Figure 4: score by training step", note, "Few-step scores during training", draw)


def table_5(found: Found) -> str:
    rows = []
    for e in ENCODERS:
        fm = [said(found.score(f"base/{e}", n)) for n in (30, 4, 1)]
        few = [said(found.score(f"emf/{e}", n)) for n in (1, 2, 4)]
        rows.append([escape(e), *fm, *few, said(found.kept(e, 1), 2), said(found.kept(e, 4), 2)])
    heads = ("text encoder", "FM 30", "FM 4", "FM 1", "EMF 1", "EMF 2", "EMF 4", "EMF 1 / FM 30", "EMF 4 / FM 30")

    def draw(axes: Axes) -> None:
        for e, color in COLORS.items():
            for group, steps, dash in ((f"base/{e}", FM_STEPS, "--"), (f"emf/{e}", EMF_STEPS, "-")):
                lines = [mean(found.score(group, n)) for n in steps]
                axes.plot(steps, lines, color=color, linestyle=dash, marker="o", markersize=4)
            axes.plot([], [], color=color, label=e)
        axes.set_xscale("log", base=2)
        axes.set_xticks(FM_STEPS, [str(n) for n in FM_STEPS])
        axes.set(ylim=(0, 1), xlabel="steps", ylabel="overall score")
        axes.legend(loc="lower right")

    drawn = plot("Score by steps and encoder", "solid EMF, dashed flow matching", "Scores by encoder", draw)
    return f"""<h2>Table 5: does a worse encoder cost few steps more than many?</h2>
{table(heads, rows)}<div class="plots">{drawn}{curve_plot(found)}{stability(found)}</div>"""


def stability(found: Found) -> str:
    """Figure 6."""

    def draw(axes: Axes) -> None:
        for e, color in COLORS.items():
            if curve := found.tree["curves"].get(f"emf/{e}"):
                lines = np.array(curve["error"])
                axes.plot(curve["steps"], lines.mean(0), color=color, label=e)
                axes.fill_between(curve["steps"], lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set(xlabel="training step", ylabel="mean squared error")
        axes.legend(loc="upper left")

    note = "raw error to the target by encoder, mean and range over seeds"
    return plot("Figure 6: training stability", note, "Error during training by encoder", draw)


def ablations(found: Found) -> str:
    rows = [["<b>none</b>", *(said(found.score("emf/trained", n)) for n in EMF_STEPS), ""]]
    note = '<span class="quiet">{}</span>'
    for name, told in ABLATIONS.items():
        cells = []
        for n in EMF_STEPS:
            own, other = found.score(f"ablation/{name}", n), found.score("emf/trained", n)
            # within one seed: base, prompts and noise are the same
            gaps = [a - b for a, b in zip(own, other, strict=False)]
            cells.append(f"{said(own)}<br>{mean(gaps):+.3f}" if gaps else "–")
        rows.append([f"<b>{escape(name)}</b>", *cells, note.format(escape(told))])
    heads = ("changed", *(f"EMF {n}" for n in EMF_STEPS), "")
    return f"""<h2>Ablations</h2><p class="quiet">One setting of EMF changed, the base the same; below each score the
mean difference to none, seed by seed.</p>{table(heads, rows)}"""


def verdicts(found: Found) -> list[tuple[str, str, str]]:
    """(the paper's claim, agrees | does not | not told apart | not run, the figures here)."""

    def judged(claim: str, gaps: Sequence[float], told: str) -> tuple[str, str, str]:
        """gaps: above 0 where the claim holds, by seed."""
        if not len(gaps):
            return claim, "not run", ""
        whole = "agrees" if min(gaps) > 0 else "does not" if max(gaps) < 0 else "not told apart"
        return claim, whole, f"{told}: {mean(gaps):+.3f}, by seed {', '.join(f'{g:+.3f}' for g in gaps)}"

    def gap(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=False)]

    s, few = found.score, "emf/trained"
    every = [
        judged("EMF in one step beats flow matching in one", gap(s(few, 1), s("base/trained", 1)), "EMF 1 - FM 1"),
        judged("EMF gains from one step to two", gap(s(few, 2), s(few, 1)), "EMF 2 - EMF 1"),
        judged("... and from two to four", gap(s(few, 4), s(few, 2)), "EMF 4 - EMF 2"),
        judged("EMF in four steps beats flow matching in four", gap(s(few, 4), s("base/trained", 4)), "EMF 4 - FM 4"),
        judged(
            "EMF in four steps is within 0.02 of flow matching in 30",
            [g + 0.02 for g in gap(s(few, 4), s("base/trained", 30))],
            "EMF 4 - FM 30 + 0.02",
        ),
    ]
    for e in list(ENCODERS)[1:]:
        better = gap(found.encoder("trained", MEASURES[0]), found.encoder(e, MEASURES[0]))
        every.append(judged(f"encoder {e}: less discriminative than trained", better, "difference"))
        lost = gap(found.kept("trained", 1), found.kept(e, 1))
        every.append(
            judged(f"encoder {e}: one step loses more than 30", lost, "share of FM 30 kept by EMF 1, trained - it")
        )
    if curve := found.tree["curves"].get(few):
        reached = {n: [_reached(curve["at"], line) for line in curve["score"][n]] for n in ("1", "4")}
        gaps = [float(a - b) for a, b in zip(reached["1"], reached["4"], strict=True)]
        every.append(judged("four steps are near their best before one step is", gaps, "training steps later"))
    return every


def _reached(at: Sequence[int], scores: Sequence[float]) -> int:
    """The first training step with 95 % of the best score."""
    return next(step for step, x in zip(at, scores, strict=True) if x >= 0.95 * max(scores))


def samples(out: Path, budget: Budget) -> str:
    """One image of each task by every encoder, flow matching and EMF."""
    from matplotlib.figure import Figure

    kinds = (("FM", "base", FM_STEPS), ("EMF", "emf", EMF_STEPS))
    rows = [
        (f"{kind} {e}", out / group / e / str(budget.seeds[0]) / "samples.npy", steps)
        for e in ENCODERS
        for kind, group, steps in kinds
    ]
    rows = [row for row in rows if row[1].is_file()]
    if not rows:
        return ""
    wide = len(TAGS) * 3
    figure = Figure(figsize=(wide * 0.62 + 1.6, len(rows) * 0.66 + 0.4))
    axes = figure.subplots(len(rows), wide, squeeze=False)
    for row, (name, file, steps) in zip(axes, rows, strict=True):
        images = np.load(file)
        chosen = [steps.index(n) for n in ((1, 4, 30) if 30 in steps else (1, 2, 4))]
        for i, cell in enumerate(row):
            cell.imshow(images[chosen[i % 3], i // 3], interpolation="nearest")
            cell.set_axis_off()
            cell.set_title(f"{steps[chosen[i % 3]]}", fontsize=7, pad=1.5)
        row[0].text(-0.3, 0.5, name, ha="right", va="center", transform=row[0].transAxes, fontsize=8)
    figure.subplots_adjust(left=0.12, right=0.995, top=0.97, bottom=0.01, wspace=0.08, hspace=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    data = base64.b64encode(png.getvalue()).decode()
    picture = f'<img src="data:image/png;base64,{data}" alt="Samples by encoder, sampler and steps">'
    return f"""<h2>Samples</h2><p class="quiet">Three images of each of the six tasks ({", ".join(TAGS)}); above
each its number of steps. The same noise for all.</p><div class="wide">{picture}</div>"""


def write_paper(out: Path, budget: Budget) -> Path:
    """results.json and report-paper.html in `out`, from the parts that are done."""
    tree = gather(out, budget)
    found = Found(tree)
    mark = {"agrees": EMF, "does not": FM}
    rows = [
        [escape(claim), f'<b style="color:{mark.get(how, GREY)}">{how}</b>', f'<span class="quiet">{told}</span>']
        for claim, how, told in verdicts(found)
    ]
    short = ""
    if tree["missing"]:
        runs = f"{len(tree['missing'])} of {len(parts(budget))} runs are missing"
        short = f'<p class="missing">{runs}; <code>make paper</code> goes on.</p>'
    if budget == QUICK:
        short += '<p class="missing">A quick run: it tries the machinery, its figures mean nothing.</p>'
    with matplotlib.rc_context(STYLE):
        sections = encoder_tables(found) + by_task(found) + table_5(found) + ablations(found)
    sections += samples(out, budget)
    b = budget
    body = f"""<h1>The paper in miniature</h1><p class="lead">EMF (arXiv 2604.18168) on coloured digits: four text
encoders, {len(b.seeds)} seed{"s" * (len(b.seeds) > 1)}; on each encoder, from scratch, the shipped transformer takes
{b.base_steps} steps of flow matching, then {b.emf_steps} of EMF, of {b.batch_size} scenes. Scores are GenEval's rules
on a learned detector, {6 * b.per_tag} captions. Every figure is a mean over seeds with their range; guidance is
1.25.</p>{short}
<h2>Where the toy agrees with the paper, and where it does not</h2>
<p class="quiet">Agrees, does not: every seed says so. Not told apart: seeds differ.</p>
{table(("the paper's claim", "here", "figures"), rows)}{sections}
<p class="quiet">The paper's single figures of its Table 5 and Figure 6 are not at hand; their claims are.</p>"""
    file = out / "report-paper.html"
    file.write_text(page("The paper in miniature", body), encoding="utf-8")
    return file
