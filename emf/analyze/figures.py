"""Plots of scores with their intervals, and sheets of images with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from emf.analyze.bootstrap import Interval
from emf.analyze.outcome import Row
from emf.show.run_page import EMF, FM, GREY, STYLE

CELL, GAP, LINE, CHARS = 176, 10, 14, 27  # pixels; letters a line
SMALL = 64  # pixels below which an image is enlarged without smoothing


def plot_scores(
    path: Path, rows: Sequence[Row], paper: dict[str, float], label: str, chance: float | None = None
) -> None:
    """A line for each encoder, plain and centred; the paper's figures below in grey."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.3 + 0.34 * (len(rows) + len(paper))), constrained_layout=True)
        axes = figure.subplots()
        for i, row in enumerate(rows):
            for score, color, marker, name, dy in (
                (row.plain, EMF, "o", "as they are", -0.12),
                (row.centred, FM, "s", "centred", 0.12),
            ):
                if score.mean == score.mean:
                    spread = [[score.mean - score.low], [score.high - score.mean]]
                    axes.errorbar(
                        score.mean,
                        i + dy,
                        xerr=spread,
                        color=color,
                        marker=marker,
                        capsize=3,
                        linestyle="none",
                        label=name if not i else None,
                    )
        for i, x in enumerate(paper.values(), len(rows)):
            axes.plot(x, i, color=GREY, marker="D", linestyle="none", label="paper" if i == len(rows) else None)
        if chance is not None:
            axes.axvline(chance, color=GREY, linestyle=":", label="random image")
        names = [textwrap.shorten(row.name, 28, placeholder="…") for row in rows]
        axes.set_yticks(range(len(rows) + len(paper)), names + [f"{name}, paper" for name in paper])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        order = [name for name in ("as they are", "centred", "paper", "random image") if name in named]
        handles = [named[name] for name in order]
        figure.legend(handles, order, loc="outside upper center", ncols=4, columnspacing=1.2, handletextpad=0.4)
        figure.savefig(path, dpi=150)


def plot_steps(path: Path, panels: dict[str, dict[str, dict[int, Interval]]]) -> None:
    """A panel by measure, in it a line for each backbone over the number of steps."""
    colors, markers = (EMF, FM, "#009e73", "#cc79a7", "#e69f00", "#56b4e9"), "os^Dvp"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.3), constrained_layout=True)
        for axes, (measure, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            ticks = sorted({n for line in lines.values() for n in line})
            for i, (name, line) in enumerate(lines.items()):
                mean = [line[n].mean for n in line]
                low, high = ([getattr(line[n], end) for n in line] for end in ("low", "high"))
                style = dict(color=colors[i % len(colors)], marker=markers[i % len(markers)])
                axes.plot(list(line), mean, label=name if axes is figure.axes[0] else None, **style)
                axes.fill_between(list(line), low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.minorticks_off()
            axes.set(xlabel="steps", title=measure)
            axes.title.set_fontsize(9.5)
            if measure == "score":
                axes.set_ylim(0, 1.02)
        figure.legend(loc="outside upper center", ncols=3)
        figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Cell:
    """A place on a sheet: an image above text, or text alone."""

    text: str
    image: Image.Image | None = None


def write_sheet(path: Path, heads: Sequence[str], rows: Sequence[Sequence[Cell]], lines: int = 6) -> None:
    """Rows of cells under column heads. lines: of text at most. A letter that the font (DejaVu Sans) lacks is an empty
    box."""
    from matplotlib import get_data_path

    fonts = Path(get_data_path(), "fonts", "ttf")
    font, bold = (ImageFont.truetype(str(fonts / f), 11) for f in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    texts = [[_wrapped(cell.text, lines) for cell in row] for row in rows]
    used = [max((len(t) for t in row), default=1) for row in texts]
    tall = [CELL if any(cell.image for cell in row) else 0 for row in rows]
    step, top = CELL + GAP, LINE + 2 * GAP
    height = top + sum(t + n * LINE + 2 * GAP for t, n in zip(tall, used, strict=True))
    sheet = Image.new("RGB", (GAP + len(heads) * step, height), "white")
    pen = ImageDraw.Draw(sheet)
    for j, head in enumerate(heads):
        pen.text((GAP + j * step, GAP), textwrap.shorten(head, 25, placeholder="…"), "black", bold)
    y = top
    for row, text, t, n in zip(rows, texts, tall, used, strict=True):
        for j, cell in enumerate(row):
            x = GAP + j * step
            if cell.image is not None:
                sheet.paste(_fitted(cell.image), (x, y))
            pen.multiline_text((x, y + t + 3), "\n".join(text[j]), "black", font, spacing=2)
        y += t + n * LINE + 2 * GAP
    sheet.save(path)


def _wrapped(text: str, lines: int) -> list[str]:
    """Paragraphs wrapped, the whole cut to some lines."""
    made = [line for part in text.split("\n") for line in textwrap.wrap(part, CHARS) or [""]]
    return made if len(made) <= lines else [*made[: lines - 1], made[lines - 1][: CHARS - 2] + " …"]


def _fitted(image: Image.Image) -> Image.Image:
    """Within a cell, on its own aspect, in the middle of grey."""
    how = Image.Resampling.NEAREST if max(image.size) < SMALL else Image.Resampling.BICUBIC
    scale = CELL / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)
    square = Image.new("RGB", (CELL, CELL), "#eef0f3")
    square.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return square
