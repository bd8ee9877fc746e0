"""Plots of scores with their intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from emf.analyze.bootstrap import Interval
from emf.analyze.outcome import Row
from emf.show.lettering import readable
from emf.show.plot import COLORS, EMF, FM, GREY, MARKERS, steps_axis, write_plot


def plot_scores(
    path: Path, rows: Sequence[Row], paper: dict[str, float], label: str, chance: float | None = None
) -> None:
    """A line for each encoder with its plain and its centred score, and the paper's figures below in grey. chance: the
    score of a random image, a dotted line."""

    def draw(figure: Figure) -> None:
        axes, named = figure.subplots(), dict[str, Any]()
        for i, row in enumerate(rows):
            for score, color, marker, name, dy in (
                (row.plain, EMF, "o", "as they are", -0.12),
                (row.centred, FM, "s", "centred", 0.12),
            ):
                if score.mean == score.mean:
                    spread = [[score.mean - score.low], [score.high - score.mean]]
                    how: dict[str, Any] = dict(color=color, marker=marker, capsize=3, linestyle="none")
                    named[name] = axes.errorbar(score.mean, i + dy, xerr=spread, **how)
        for i, x in enumerate(paper.values(), len(rows)):
            (named["paper"],) = axes.plot(x, i, color=GREY, marker="D", linestyle="none")
        if chance is not None:
            named["random image"] = axes.axvline(chance, color=GREY, linestyle=":")
        axes.set_yticks(range(len(rows) + len(paper)), [_name(r.name) for r in rows] + [f"{n}, paper" for n in paper])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        order = [name for name in ("as they are", "centred", "paper", "random image") if name in named]
        handles = [named[name] for name in order]
        figure.legend(handles, order, loc="outside upper center", ncols=4, columnspacing=1.2, handletextpad=0.4)

    write_plot(path, draw, (6.4, 1.3 + 0.34 * (len(rows) + len(paper))))


def plot_steps(path: Path, panels: dict[str, dict[str, dict[int, Interval]]]) -> None:
    """A panel for each measure with a line for each backbone, over the number of steps."""

    def draw(figure: Figure) -> None:
        named: dict[str, Any] = {}
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (measure, lines) in zip(every, panels.items(), strict=True):
            for i, (name, line) in enumerate(lines.items()):
                color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
                mean = [line[n].mean for n in line]
                low, high = ([getattr(line[n], end) for n in line] for end in ("low", "high"))
                (named[name],) = axes.plot(list(line), mean, color=color, marker=marker)
                axes.fill_between(list(line), low, high, color=color, alpha=0.15, linewidth=0)
            steps_axis(axes, (n for line in lines.values() for n in line))
            axes.set_title(measure)
            if measure == "score":
                axes.set_ylim(0, 1.02)
        # handles and names by themselves: matplotlib's own search leaves out a name that begins with _
        figure.legend([*named.values()], [_name(n) for n in named], loc="outside upper center", ncols=3)

    write_plot(path, draw, (4.4 * len(panels), 3.3))


def _name(text: str) -> str:
    """A name that is short enough for a legend."""
    return readable(textwrap.shorten(text, 28, placeholder="…"))
