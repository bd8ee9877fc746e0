"""report-openmoji.html: text encoders beside what is drawn with them, on a world of named pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from emf.analyze.bootstrap import Interval
from emf.data.gallery import Gallery
from emf.files import write_text
from emf.paper.found import MEASURES, SEEDS, mean
from emf.paper.openmoji_found import SCORED, Found, by_chance, label, verdicts
from emf.paper.openmoji_parts import EMF_STEPS, ENCODERS, FM_STEPS, QUICK, Budget, TextEncoder
from emf.paper.openmoji_record import ceiling, held_out, measured, study
from emf.paper.openmoji_runs import shown_of
from emf.paper.results_page import said, section, seed_drawn, shortfall
from emf.sample.sampling_settings import GUIDANCE_PRETRAINED
from emf.show import page
from emf.show.page import Html
from emf.show.plot import COLORS, EMF, FM, GREY, MARKERS, plot
from emf.show.sheet import Cell, sheet

PAGE = "report-openmoji.html"


def over(interval: Interval, digits: int = 2) -> Html:
    """A cell with an interval alone."""
    return page.quiet("–" if np.isnan(interval.mean) else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}")


def spread_told(found: Found) -> str:
    """What the lines below a mean are, in a sentence."""
    many = len(found.tree["budget"]["seeds"]) > 1
    first = "Below a mean is its range over seeds" if many else "There is one seed, so no range over seeds"
    return f"{first}; the row below has the interval over pictures, whose captions are drawn together."


def encoder_table(found: Found) -> Html:
    """What the text encoders are."""
    rows: list[list[Any]] = []
    for e in found.named:
        own = {m: found.measured(e, m) for m in MEASURES}
        means = [{seed: float(x.mean()) for seed, x in by_seed.items()} for by_seed in own.values()]
        rows.append([e, "", *map(said, means)])
        rows.append(["", "pictures", *(over(found.over_named(m, by_seed), 3) for m, by_seed in own.items())])
    told = "".join(f"<li><b>{page.words(k)}</b>: {page.words(v.told)}</li>" for k, v in ENCODERS.items())
    note = page.note(
        "Discriminability: cosine of a picture's smoothed pixels, less the mean picture's, with those of the picture "
        "whose caption is nearest (the paper: DINOv3 features on COCO); 0 is chance. Disentanglement: cosine of a "
        "caption's embedding with that of the caption less half of its words. Centred: less the mean embedding. On "
        f"names and aliases. {spread_told(found)} A frozen encoder is the same in every seed."
    )
    made = page.table(("text encoder", "", *MEASURES), rows)
    return section("What the text encoders are", Html(f"<ul>{told}</ul>"), note, made)


def score_table(found: Found) -> Html:
    """Top-1 by text encoder and steps, with its range over seeds and its interval over pictures."""
    every = [("base", n) for n in FM_STEPS[::-1]] + [("emf", n) for n in EMF_STEPS]
    rows: list[list[Any]] = []
    for e in found.named:
        rows.append([e, "all", *(said(found.score(g, e, n), 2) for g, n in every)])
        rows.append(["", "pictures", *(over(found.over_asked(found.hits(g, e, n))) for g, n in every)])
        rows.append(["", "top-5", *(said(found.score(g, e, n, 5), 2) for g, n in every)])
        for kind in ("reworded", "alias"):
            rows.append(["", kind, *(said(found.score(g, e, n, kind=kind), 2) for g, n in every)])
    n, limit = len(found.kinds), found.tree["ceiling"]
    note = page.note(
        f"Share of {n} held-out captions of known pictures for which the nearest real picture to the drawn one, by "
        "smoothed pixels, is the one asked for; top-5: is among the five nearest. Reworded: the known name in words "
        "around it that training has not. Alias: another name of the picture, which training has not. Real pictures "
        f"under noise give {limit['real under noise']:.2f}, noise {limit['noise']:.2f}. {spread_told(found)}"
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
            lines = "<br>".join(map(page.quiet, figures.splitlines()))
            row.append(Html(f'<b style="color:{mark.get(how, GREY)}">{how}</b><br>{lines}'))
        rows.append(row)
    perfect = np.arange(n)[None]
    note = page.note(
        f"Spearman's rank correlation over the {n} encoders, the mean of every seed's, with its interval of 95 % over "
        "seeds (Student's) and over pictures, and how often chance gives one as far from 0 (every order of the "
        "encoders, the same in all seeds). Agrees, does not: both intervals lie on one side of 0, and chance is below "
        f"5 %; fewer than {SEEDS} seeds tell nothing apart, as two of them often agree exactly by chance. These are "
        f"{len(MEASURES) * len(SCORED)} questions, each asked at 5 % by itself: a single one that is told apart may "
        "well be chance. "
        f"With {n} encoders even perfect agreement comes by chance in {by_chance(perfect, perfect):.1%} of all orders, "
        "and no interval knows of other encoders than these. Seeds that lack an encoder do not count here, nor "
        "do those in which all encoders score alike; the figures say of how many seeds they are."
    )
    return section("Do the orders agree?", note, page.table(("by this order", *(label(*x) for x in SCORED)), rows))


def scatter(found: Found) -> Html:
    """A score by a measure, a point for each text encoder."""
    told = "filled EMF at 1 step, hollow flow matching at 30; lines are the range over seeds"
    drawn, shown = [], (("emf", 1, True), ("base", 30, False))
    highest = max((max(found.score(g, e, n).values()) for e in found.encoders for g, n, _ in shown), default=0.0)
    for m in (MEASURES[1], MEASURES[3]):

        def draw(axes: Axes, m: str = m) -> None:
            for k, e in enumerate(found.encoders):
                x = mean(float(own.mean()) for own in found.measured(e, m).values())
                color, marker = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]
                for group, steps, filled in shown:
                    y = found.score(group, e, steps).values()
                    axes.plot([x, x], [min(y), max(y)], color=color, linewidth=1)
                    axes.plot(x, mean(y), marker, color=color, markerfacecolor=color if filled else "none")
                axes.plot([], [], marker, color=color, label=e)
            # the upper half is the legend's
            axes.set(xlabel=m, ylabel="top-1", ylim=(0, 2.2 * highest or 1.0))
            axes.legend(loc="upper left", fontsize=7, ncols=2)

        drawn.append(plot(f"Top-1 by {m}", told, f"Top-1 by {m}", draw))
    return page.figures(drawn)


def samples(out: Path, gallery: Gallery, budget: Budget, found: Found) -> Html:
    """Images of a few held-out captions, on every text encoder, beside the real picture. Nothing where no run has
    images yet."""
    asked = held_out(gallery, budget)
    chosen = [asked[i] for i in shown_of(asked)]
    rows = [
        [Cell("caption"), *(Cell(c.text) for c in chosen)],
        [Cell("real"), *(Cell(image=gallery.plain(c.picture)) for c in chosen)],
    ]
    seed = seed_drawn(out, budget.seeds)
    for e in found.encoders:
        for kind, group, steps, at in (
            ("FM 30", "base", FM_STEPS, 30),
            ("EMF 4", "emf", EMF_STEPS, 4),
            ("EMF 1", "emf", EMF_STEPS, 1),
        ):
            file = out / group / e / str(seed) / "samples.npy"
            if file.is_file():
                images = np.load(file)[steps.index(at)]
                rows.append([Cell(f"{e}, {kind}"), *(Cell(image=image) for image in images)])
    if len(rows) == 2:
        return Html()
    png = io.BytesIO()
    sheet(rows, cell=72).save(png, "png")
    note = page.note(f"Held-out captions, names that training has not; the same noise for all. {gallery.source}")
    return section("Samples", note, page.wide(page.picture(png.getvalue(), "Samples by text encoder and steps")))


def write_openmoji(
    out: Path, gallery: Gallery, budget: Budget, encoders: Mapping[str, TextEncoder] | None = None
) -> Path:
    """Write results.json and report-openmoji.html in `out` from the parts that are done; returns the page's path."""
    whole = study(out, gallery, budget, encoders)
    told = {"ceiling": ceiling(gallery), "measured": measured(gallery)}
    tree = whole.gather(out, world=gallery.world, source=gallery.source, **told)
    found = Found(tree, encoders or ENCODERS)
    b, n = budget, len(budget.seeds)
    lead = f"""<h1>Text encoders on named pictures</h1><p class="lead">EMF (arXiv 2604.18168) holds that a text encoder
that tells captions apart is what few steps need. Here {b.pictures} pictures with several names each are learned with
{len(found.encoders)} text encoders: {b.base_steps} steps of flow matching from scratch, then {b.emf_steps} of EMF, of
{b.batch_size} images; {n} seed{"s" * (n > 1)}, guidance
{GUIDANCE_PRETRAINED:g}. Scored are captions that training has not.</p>"""
    text = page.page(
        "Text encoders on named pictures",
        Html(lead),
        *shortfall(whole, found.tree["missing"], quick=budget == QUICK),
        answer(found),
        scatter(found),
        encoder_table(found),
        score_table(found),
        samples(out, gallery, budget, found),
        page.note(gallery.source),
    )
    write_text(out / PAGE, text)
    return out / PAGE
