"""report-paper.html: the paper's tables and figures in miniature, beside the paper's, and where they disagree."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from emf.data.digits import TAGS
from emf.evaluate.published import ENCODERS as PUBLISHED
from emf.evaluate.published import FEW_STEP, FLOW_MATCHING, by_steps
from emf.files import write_text
from emf.paper.found import MEASURES, POWER, SEEDS, Found, gap, mean, verdicts
from emf.paper.paper_record import study
from emf.paper.parts import ABLATIONS, EMF_STEPS, ENCODERS, FM_STEPS, GUIDANCE, QUICK, Budget
from emf.paper.record import Study
from emf.show import page
from emf.show.page import Html
from emf.show.plot import COLORS, EMF, FM, GREY, SHADES, plot, steps_axis
from emf.show.sheet import Cell, sheet

BY_ENCODER = dict(zip(ENCODERS, COLORS, strict=False))


def said(by_seed: Mapping[int, float], digits: int = 3) -> Html:
    """A cell with the mean over seeds, and below it their range; a dash where nothing was measured."""
    values = by_seed.values()
    if not values:
        return Html("–")
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += "<br>" + page.quiet(f"{min(values):.{digits}f}–{max(values):.{digits}f}")
    return Html(text)


def few(n: int) -> str:
    """EMF at a number of steps, in one line at the head of a column."""
    return f"EMF\N{NO-BREAK SPACE}{n}"


def section(title: str, *inside: Html) -> Html:
    """A part of the page under a heading."""
    return Html(f"<h2>{page.words(title)}</h2>{''.join(inside)}")


def encoder_tables(found: Found) -> Html:
    """The paper's Tables 1 and 2: discriminability and disentanglement of the text encoders, with the paper's below."""
    rows = [[e, *(said(found.encoder(e, m)) for m in MEASURES)] for e in ENCODERS]
    rows += [
        [f"{name}, paper", f"{x:.3f}", "", f"{PUBLISHED['disentanglement'][name]:.3f}", ""]
        for name, x in PUBLISHED["discriminability"].items()
    ]
    told = "".join(f"<li><b>{page.words(k)}</b>: {page.words(v)}</li>" for k, v in ENCODERS.items())
    note = page.note(
        "Discriminability: cosine of a scene's smoothed pixels with those of the scene whose caption is nearest (the "
        f"paper: DINOv3 features on COCO); chance gives {mean(found.encoder('trained', 'chance').values()):.3f}. "
        "Disentanglement: cosine of a caption's embedding with that of the caption less half of its words. Centred: "
        "less the mean embedding. The paper's encoders are others; only the order of good and bad can compare."
    )
    made = page.table(("text encoder", *MEASURES), rows)
    return section("Tables 1 and 2: what the text encoders are", Html(f"<ul>{told}</ul>"), note, made)


def by_task(found: Found) -> Html:
    """The paper's Table 3: the scores of EMF and of flow matching, task by task."""
    lines = [("EMF", "emf/trained", n) for n in (1, 2, 4)]
    lines += [("flow matching", "base/trained", n) for n in (30, 4, 1)]
    rows = []
    for name, group, n in lines:
        paper = by_steps("GenEval", FEW_STEP if name == "EMF" else FLOW_MATCHING).get(n)
        cells = [said(found.score(group, n, tag), 2) for tag in TAGS]
        rows.append([name, str(n), said(found.score(group, n)), *cells, "" if paper is None else f"{paper:.2f}"])
    heads = ("model", "steps", "overall", *(t.replace("_", " ") for t in TAGS), "GenEval, paper")
    return section("Table 3: few steps beside many", page.table(heads, rows))


def curve_plot(found: Found) -> Html:
    """The paper's Figure 4: the score at few steps while EMF is trained. Nothing where no curve was measured."""
    curves = list(found.of("emf/trained", "curve").values())
    if not curves:
        return Html()

    def draw(axes: Axes) -> None:
        for n, color in zip((1, 2, 4), SHADES["emf"], strict=True):
            lines, at = np.array([c["score"][str(n)] for c in curves]), curves[0]["at"]
            axes.plot(at, lines.mean(0), color=color, marker="o", markersize=4, label=f"{n} step{'s' * (n > 1)}")
            axes.fill_between(at, lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set(ylim=(0, 1), xlabel="training step", ylabel="overall score")
        axes.legend(loc="lower right", ncols=3)

    note = "mean and range over seeds; the paper: 4 steps near their best at 10k, 2 at 70k, 1 at 90k"
    return plot("Figure 4: score by training step", note, "Few-step scores during training", draw)


def table_5(found: Found) -> Html:
    """The paper's Table 5, its scores by text encoder, and the plots that belong to it."""
    rows = []
    for e in ENCODERS:
        many = [said(found.score(f"base/{e}", n)) for n in (30, 4, 1)]
        own = [said(found.score(f"emf/{e}", n)) for n in (1, 2, 4)]
        rows.append([e, *many, *own, said(found.kept(e, 1), 2), said(found.kept(e, 4), 2)])
    heads = ("text encoder", "FM 30", "FM 4", "FM 1", few(1), few(2), few(4), f"{few(1)} / FM 30", f"{few(4)} / FM 30")

    def draw(axes: Axes) -> None:
        for e, color in BY_ENCODER.items():
            for group, steps, dash in ((f"base/{e}", FM_STEPS, "--"), (f"emf/{e}", EMF_STEPS, "-")):
                lines = [mean(found.score(group, n).values()) for n in steps]
                axes.plot(steps, lines, color=color, linestyle=dash, marker="o", markersize=4)
            axes.plot([], [], color=color, label=e)
        steps_axis(axes, FM_STEPS)
        axes.set(ylim=(0, 1), ylabel="overall score")
        axes.legend(loc="lower right")

    drawn = plot("Score by steps and encoder", "solid EMF, dashed flow matching", "Scores by encoder", draw)
    plots = page.figures([drawn, curve_plot(found), stability(found)])
    return section("Table 5: does a worse encoder cost few steps more than many?", page.table(heads, rows), plots)


def stability(found: Found) -> Html:
    """The paper's Figure 6: the error while EMF is trained, on each text encoder."""

    def draw(axes: Axes) -> None:
        for e, color in BY_ENCODER.items():
            if curves := list(found.of(f"emf/{e}", "curve").values()):
                lines, steps = np.array([c["error"] for c in curves]), curves[0]["steps"]
                axes.plot(steps, lines.mean(0), color=color, label=e)
                axes.fill_between(steps, lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set(xlabel="training step", ylabel="mean squared error")
        axes.legend(loc="upper left")

    note = "raw error to the target by encoder, mean and range over seeds"
    return plot("Figure 6: training stability", note, "Error during training by encoder", draw)


def ablations(found: Found) -> Html:
    """EMF with one setting changed at a time, beside EMF unchanged."""
    rows = [[Html("<b>none</b>"), *(said(found.score("emf/trained", n)) for n in EMF_STEPS), ""]]
    for name, told in ABLATIONS.items():
        cells = []
        for n in EMF_STEPS:
            own, other = found.score(f"ablation/{name}", n), found.score("emf/trained", n)
            # within one seed: base, prompts and noise are the same
            gaps = gap(own, other)
            cells.append(Html(f"{said(own)}<br>{mean(gaps):+.3f}" if gaps else "–"))
        rows.append([Html(f"<b>{page.words(name)}</b>"), *cells, page.quiet(told)])
    note = page.note(
        "One setting of EMF changed, the base the same; below each score the mean difference to none, seed by seed."
    )
    heads = ("changed", *map(few, EMF_STEPS), "")
    return section("Ablations", note, page.table(heads, rows, told=(len(heads) - 1,)))


def seed_drawn(out: Path, seeds: Sequence[int]) -> int:
    """The first whose runs are in this folder, with images, and not in its results.json alone."""
    there = {file.parent.name for file in out.glob("base/*/*/samples.npy")}
    return next((seed for seed in seeds if str(seed) in there), seeds[0])


def shortfall(study: Study, missing: Sequence[str], *, quick: bool) -> list[Html]:
    """What the figures of a study lack, for the head of its page. missing: parts that are not done."""
    short = []
    if missing:
        runs = f"{len(missing)} of {len(study.parts)} runs are missing"
        goes_on = f"<code>emf {study.who}</code> with the same settings goes on"
        short.append(Html(f'<p class="missing">{runs}; {goes_on}.</p>'))
    if quick:
        short.append(Html('<p class="missing">A quick run: it tries the machinery, its figures mean nothing.</p>'))
    return short


def samples(out: Path, budget: Budget) -> Html:
    """A sheet of images of each task, drawn on every text encoder by flow matching and by EMF. Nothing where no run has
    images yet."""
    kinds = (("FM", "base", FM_STEPS, (1, 4, 30)), ("EMF", "emf", EMF_STEPS, (1, 2, 4)))
    rows, seed = [], seed_drawn(out, budget.seeds)
    for e in ENCODERS:
        for kind, group, steps, chosen in kinds:
            file = out / group / e / str(seed) / "samples.npy"
            if file.is_file():
                images = np.load(file)  # [steps, tasks, H, W, 3]
                across = [(n, task) for task in range(len(TAGS)) for n in chosen]
                cells = [Cell(str(n), images[steps.index(n), task]) for n, task in across]
                rows.append([Cell(f"{kind} {e}"), *cells])
    if not rows:
        return Html()
    png = io.BytesIO()
    sheet(rows, cell=54).save(png, "png")
    note = page.note(
        f"Three images of each of the six tasks ({', '.join(TAGS)}); below each its number of steps. The same noise "
        "for all."
    )
    drawn = page.picture(png.getvalue(), "Samples by encoder, sampler and steps")
    return section("Samples", note, page.wide(drawn))


def write_paper(out: Path, budget: Budget) -> Path:
    """Write results.json and report-paper.html in `out` from the parts that are done; returns the page's path."""
    whole = study(budget)
    tree = whole.gather(out)
    found = Found(tree)
    mark = {"agrees": EMF, "does not": FM}
    rows = [
        [claim, Html(f'<b style="color:{mark.get(how, GREY)}">{how}</b>'), page.quiet(told)]
        for claim, how, told in verdicts(found)
    ]
    b = budget
    lead = f"""<h1>The paper in miniature</h1><p class="lead">EMF (arXiv 2604.18168) on coloured digits: four text
encoders, {len(b.seeds)} seed{"s" * (len(b.seeds) > 1)}; on each encoder, from scratch, the shipped transformer takes
{b.base_steps} steps of flow matching, then {b.emf_steps} of EMF, of {b.batch_size} scenes. Scores are GenEval's rules
on a learned detector, {6 * b.per_tag} captions. The tables have means over seeds with their range; guidance is
{GUIDANCE:g}.</p>"""
    text = page.page(
        "The paper in miniature",
        Html(lead),
        *shortfall(whole, tree["missing"], quick=budget == QUICK),
        section(
            "Where the toy agrees with the paper, and where it does not",
            page.note(
                "In brackets the interval of 95 % over seeds (Student's). Agrees, does not: it leaves 0 out. Not told "
                f"apart: it does not, or the seeds are fewer than {SEEDS}, or few and all the same. With the number of "
                f"seeds named {POWER:.0%} of such studies would tell, if all seeds had this mean and spread. These are "
                f"{len(rows)} claims, each asked at 5 % by itself: a single one that is told apart may well be chance."
            ),
            page.table(("the paper's claim", "here", "figures"), rows, told=(2,)),
        ),
        encoder_tables(found),
        by_task(found),
        table_5(found),
        ablations(found),
        samples(out, budget),
        page.note("The paper's single figures of its Table 5 and Figure 6 are not at hand; their claims are."),
    )
    file = out / "report-paper.html"
    write_text(file, text)
    return file
