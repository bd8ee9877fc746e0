"""Plots in one style, as SVG on a page or as a PNG file. A name in a plot is shown as it is written: nothing is
mathematics."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

from emf.files import whole_file
from emf.show import page
from emf.show.lettering import readable

# Okabe and Ito's colours: told apart with any colour vision; marker and dash say the same again in grey print
FM, EMF, GREY, INK = "#d55e00", "#0072b2", "#8a8f98", "#1d2430"
COLORS = (EMF, FM, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SHADES = {"fm": ("#f0a873", "#d55e00", "#7d3700"), "emf": ("#7fbfe6", "#0072b2", "#003a5c")}
MARKERS = ("o", "s", "D", "^", "v", "p")
STYLE: Any = {
    "figure.figsize": (4.6, 2.8),
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "emf",
}


def plot(
    title: str, said: str, alt: str, draw: Callable[[Axes], None], size: tuple[float, float] | None = None
) -> page.Html:
    """One plot for a page, below its title and a note, with a text in its place for those who do not see it. size: in
    inches."""
    made = _rendered(lambda figure: draw(figure.subplots()), size, format="svg", metadata={"Date": None})
    return page.figure(title, said, page.picture(made, alt, "svg+xml"))


def write_plot(path: Path, draw: Callable[[Figure], None], size: tuple[float, float], dpi: int = 150) -> None:
    """A figure of one or more plots as a PNG file; see emf.files.whole_file. size: in inches."""
    made = _rendered(draw, size, format="png", dpi=dpi)
    with whole_file(path) as part:
        part.write_bytes(made)


def _rendered(draw: Callable[[Figure], None], size: tuple[float, float] | None, **save: Any) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        draw(figure)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                base = getattr(axis.get_transform(), "base", 10.0)
                if type(axis.get_major_formatter()) is LogFormatterSciNotation:
                    axis.set_major_formatter(_Powers(base))
                if type(axis.get_minor_formatter()) is LogFormatterSciNotation:
                    axis.set_minor_formatter(_Powers(base))
        figure.savefig(file, **save)
    return file.getvalue()


class _Powers(LogFormatterSciNotation):
    """matplotlib's labels of a logarithmic axis as plain text, 2×10⁻³, for mathematics is switched off."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        text = super().__call__(x, pos).replace(r"\times", "×").replace(r"\mathdefault", "")
        raised = re.sub(r"\^\{(.*?)\}", lambda m: m[1].translate(str.maketrans("-−0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")), text)
        return re.sub(r"[${}]", "", raised)


def steps_axis(axes: Axes, counts: Iterable[int]) -> None:
    """Numbers of sampling steps along a logarithmic axis, each with its tick."""
    ticks = sorted({*counts})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("steps")


def label(axes: Axes, text: str, at: tuple[float, float], above: int, **style: Any) -> None:
    """A small text beside a point, some points above it."""
    axes.annotate(readable(text), at, (0, above), textcoords="offset points", fontsize=8, **style)


def margin(axes: Axes, heights: Mapping[str, float], apart: float, **style: Any) -> None:
    """Small texts right of a plot, where no line runs, each at its height in it. apart: what of the plot's heights a
    text takes; one that is nearer to the one below it stands so far above that."""
    place = -math.inf
    for text, height in sorted(heights.items(), key=lambda pair: pair[1]):
        place = max(height, place + apart)
        at, where = (1, place), ("axes fraction", "data")
        how: Any = dict(textcoords="offset points", va="center", annotation_clip=False, fontsize=8, **style)
        axes.annotate(readable(text), at, (4, 0), xycoords=where, **how)
