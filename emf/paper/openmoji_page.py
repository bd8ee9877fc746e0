"""report-openmoji.html: text encoders beside what is drawn with them, on a world of named pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from emf.analyze.bootstrap import Interval, bootstrap
from emf.data.gallery import Gallery
from emf.files import write_text
from emf.paper.found import MEASURES
from emf.paper.openmoji_found import SCORED, Found, by_chance, gather, label, verdicts
from emf.paper.openmoji_parts import EMF_STEPS, ENCODERS, FM_STEPS, QUICK, Budget, TextEncoder, parts
from emf.paper.openmoji_runs import held_out, shown_of
from emf.paper.results_page import section
from emf.sample.sampling_settings import GUIDANCE_PRETRAINED
from emf.show import page
from emf.show.page import Html
from emf.show.plot import COLORS, EMF, FM, GREY, MARKERS, plot
from emf.show.sheet import Cell, sheet

PAGE = "report-openmoji.html"


def said(value: Interval, digits: int = 2) -> Html:
    """A cell with a mean, and below it its interval."""
    if np.isnan(value.mean):
        return Html("–")
    interval = page.quiet(f"{value.low:.{digits}f} to {value.high:.{digits}f}")
    return Html(f"{value.mean:.{digits}f}<br>{interval}")


def encoder_table(found: Found) -> Html:
    """What the text encoders are."""
    rows = [[e, *(said(bootstrap(found.measured(e, m)), 3) for m in MEASURES)] for e in found.tree["encoders"]]
    told = "".join(f"<li><b>{page.words(k)}</b>: {page.words(v.told)}</li>" for k, v in ENCODERS.items())
    note = page.note(
        "Discriminability: cosine of a picture's smoothed pixels, less the mean picture's, with those of the picture "
        "whose caption is nearest (the paper: DINOv3 features on COCO); 0 is chance. Disentanglement: cosine of a "
        "caption's embedding with that of the caption less half of its words. Centred: less the mean embedding. On "
        "names and aliases; intervals are over captions."
    )
    made = page.table(("text encoder", *MEASURES), rows)
    return section("What the text encoders are", Html(f"<ul>{told}</ul>"), note, made)


def score_table(found: Found) -> Html:
    """Top-1 by text encoder and steps; below each its interval."""
    every = [("base", n) for n in FM_STEPS[::-1]] + [("emf", n) for n in EMF_STEPS]
    rows: list[list[Any]] = []
    for e in found.tree["encoders"]:
        rows.append([e, "all", *(said(found.score(g, e, n)) for g, n in every)])
        rows.append(["", "top-5", *(f"{found.score(g, e, n, 5).mean:.2f}" for g, n in every)])
        for kind in ("reworded", "alias"):
            rows.append(["", kind, *(f"{found.score(g, e, n, kind=kind).mean:.2f}" for g, n in every)])
    n, limit = len(found.kinds), found.tree["ceiling"]
    note = page.note(
        f"Share of {n} held-out captions of known pictures for which the nearest real picture to the drawn one, by "
        "smoothed pixels, is the one asked for; top-5: is among the five nearest. Reworded: the known name in words "
        "around it that training has not. Alias: another name of the picture, which training has not. Real pictures "
        f"under noise give {limit['real under noise']:.2f}, noise {limit['noise']:.2f}. Intervals are over captions."
    )
    return section("What is drawn with them", note, page.table(("text encoder", "", *(label(*x) for x in every)), rows))


def answer(found: Found) -> Html:
    """Whether the order of the one and of the other agree."""
    n = len(found.encoders)
    if n < 3:
        return section("Do the orders agree?", page.note("An order needs three text encoders that are done."))
    told = {line[0]: line for line in verdicts(found)}
    mark = {"agrees": EMF, "does not": FM}
    rows = []
    for m in MEASURES:
        row: list[Any] = [m]
        for group, steps in SCORED:
            _, how, figures = told[f"{m}: {label(group, steps)}"]
            row.append(Html(f'<b style="color:{mark.get(how, GREY)}">{how}</b><br>{page.quiet(figures)}'))
        rows.append(row)
    note = page.note(
        f"Spearman's rank correlation over the {n} encoders with its 95 % interval over captions, and how often chance "
        "gives one as far from 0. Agrees, does not: the whole interval lies on one side of 0, and chance is below 5 %. "
        f"With {n} encoders even perfect agreement comes by chance in {by_chance(1, n):.1%} of all orders, and the "
        "interval knows nothing of other encoders than these, nor, with one seed, of another training."
    )
    return section("Do the orders agree?", note, page.table(("by this order", *(label(*x) for x in SCORED)), rows))


def scatter(found: Found) -> Html:
    """A score by a measure, a point for each text encoder."""
    drawn, shown = [], (("emf", 1, True), ("base", 30, False))
    highest = max(found.score(g, e, n).mean for e in found.encoders for g, n, _ in shown)
    for m in (MEASURES[1], MEASURES[3]):

        def draw(axes: Axes, m: str = m) -> None:
            for k, e in enumerate(found.encoders):
                x = found.measured(e, m).mean()
                for y, filled in ((found.score(g, e, n).mean, filled) for g, n, filled in shown):
                    color = COLORS[k % len(COLORS)]
                    face = color if filled else "none"
                    axes.plot(x, y, MARKERS[k % len(MARKERS)], color=color, markerfacecolor=face)
                axes.plot([], [], MARKERS[k % len(MARKERS)], color=COLORS[k % len(COLORS)], label=e)
            # the upper half is the legend's
            axes.set(xlabel=m, ylabel="top-1", ylim=(0, 2.2 * highest or 1.0))
            axes.legend(loc="upper left", fontsize=7, ncols=2)

        drawn.append(plot(f"Top-1 by {m}", "filled EMF at 1 step, hollow flow matching at 30", f"Top-1 by {m}", draw))
    return page.figures(drawn)


def samples(out: Path, gallery: Gallery, budget: Budget, found: Found) -> Html:
    """Images of a few held-out captions, on every text encoder, beside the real picture."""
    asked = held_out(gallery, budget)
    chosen = [asked[i] for i in shown_of(asked)]
    rows = [
        [Cell("caption"), *(Cell(c.text) for c in chosen)],
        [Cell("real"), *(Cell(image=gallery.plain(c.picture)) for c in chosen)],
    ]
    for e in found.encoders:
        for kind, group, steps, at in (
            ("FM 30", "base", FM_STEPS, 30),
            ("EMF 4", "emf", EMF_STEPS, 4),
            ("EMF 1", "emf", EMF_STEPS, 1),
        ):
            file = out / group / e / str(budget.seeds[0]) / "samples.npy"
            if file.is_file():
                images = np.load(file)[steps.index(at)]
                rows.append([Cell(f"{e}, {kind}"), *(Cell(image=image) for image in images)])
    png = io.BytesIO()
    sheet(rows, cell=72).save(png, "png")
    note = page.note(f"Held-out captions, names that training has not; the same noise for all. {gallery.source}")
    return section("Samples", note, page.wide(page.picture(png.getvalue(), "Samples by text encoder and steps")))


def write_openmoji(out: Path, gallery: Gallery, budget: Budget, encoders: dict[str, TextEncoder] | None = None) -> Path:
    """Write results.json and report-openmoji.html in `out` from the parts that are done; returns the page's path."""
    found = Found(gather(out, gallery, budget, encoders))
    short, missing, whole = [], found.tree["missing"], parts(out, budget, encoders)
    if missing:
        told = f"{len(missing)} of {len(whole)} runs are missing"
        short.append(Html(f'<p class="missing">{told}; <code>emf openmoji</code> goes on.</p>'))
    if budget == QUICK:
        short.append(Html('<p class="missing">A quick run: it tries the machinery, its figures mean nothing.</p>'))
    b, n = budget, len(budget.seeds)
    lead = f"""<h1>Text encoders on named pictures</h1><p class="lead">EMF (arXiv 2604.18168) holds that a text encoder
that tells captions apart is what few steps need. Here {b.pictures} pictures with several names each are learned with
{len(found.encoders)} text encoders: {b.base_steps} steps of flow matching from scratch, then {b.emf_steps} of EMF, of
{b.batch_size} images; {n} seed{"s" * (n > 1)}, guidance
{GUIDANCE_PRETRAINED:g}. Scored are captions that training has not.</p>"""
    text = page.page(
        "Text encoders on named pictures",
        Html(lead),
        *short,
        answer(found),
        scatter(found),
        encoder_table(found),
        score_table(found),
        samples(out, gallery, budget, found),
        page.note(gallery.source),
    )
    write_text(out / PAGE, text)
    return out / PAGE
