"""The figures of the bench, drawn from records: for `make profile` as files, for `make report` on a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from emf.show.plot import EMF, FM, GREY, INK

KINDS = (
    *("GEMM", "attention", "conv", "norm and modulate", "activation", "copies", "elementwise", "communication"),
    *("optimizer", "launch gaps", "other"),
)


def shares(axes: Axes, record: dict[str, Any]) -> None:
    """A bar a phase, stacked by kind of operator."""
    rows = record["shares"]
    colors = dict(zip(KINDS, (*matplotlib.color_sequences["tab10"], "#444444"), strict=True))
    for row, kinds in enumerate(rows.values()):
        left = 0.0
        for name in (k for k in KINDS if k in kinds):
            width = 100 * kinds[name]
            axes.barh(row, width, left=left, color=colors[name], label=name)
            if width > 4:
                axes.text(left + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
            left += width
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xlabel("% of the step")
    handles, labels = axes.get_legend_handles_labels()
    unique = {name: handles[labels.index(name)] for name in KINDS if name in labels}
    axes.legend(unique.values(), unique.keys(), fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")


def roof(axes: Axes, record: dict[str, Any]) -> None:
    """Each op of the forward under the roofs of copies and products; a dot's area is its share of the time."""
    ridge = record["head"]["ridge"]
    x = np.geomspace(0.05, max(4 * ridge, 2e3), 200)
    axes.plot(x, np.minimum(1, x / ridge), color=GREY)
    axes.text(x[-1], 1.15, "measured matrix product", ha="right", fontsize=8, color=GREY)
    axes.text(0.06, 0.09 / ridge, "measured copy", fontsize=8, color=GREY, ha="left", va="bottom")
    for i, row in enumerate(record["roofline"], 1):
        at = row["intensity"], row["product_share"]
        label = f"{i}  {row['op']}, {row['time_share']:.1%}"
        axes.scatter(*at, s=20 + 500 * row["time_share"], color=EMF, alpha=0.6, linewidths=0, label=label)
        axes.annotate(str(i), at, (5, -3 if i % 2 else 5), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="share of the product's rate")
    axes.set_ylim(min(r["product_share"] for r in record["roofline"]) / 3, 3)
    legend = axes.legend(title="op, share of the forward", bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8)
    for handle in filter(None, legend.legend_handles):
        handle.set_visible(False)


def memory(axes: Axes, record: dict[str, Any]) -> None:
    """Bytes allocated over the step beyond what was there before it."""
    line = np.array(record["memory"])
    axes.fill_between(100 * line[:, 0], line[:, 1] / 2**20, color=EMF, alpha=0.3, linewidth=0)
    axes.plot(100 * line[:, 0], line[:, 1] / 2**20, color=EMF, linewidth=1.2)
    for name, start in record["phases"].items():
        if name == "data":  # its first moment
            continue
        axes.axvline(100 * start, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(name, (100 * start, 1), (3, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=8, color=GREY, va="top")  # fmt: skip
    axes.set(xlabel="% of the step's time", ylabel="MiB", ylim=(min(0, line[:, 1].min() / 2**20), None))


def floors(axes: Axes, rows: list[dict[str, Any]], clocks: dict[tuple[str, ...], float]) -> None:
    """A bar a launch: its simulated time, against its bound (named by the unit) and its byte floor. clocks: measured
    microseconds by (op, case, kernel, launch), a second bar where there are any."""
    where = np.arange(len(rows))
    thick = 0.38 if clocks else 0.7
    predicted = [r["simulated_us"] for r in rows]
    axes.barh(where - thick / 2 * bool(clocks), predicted, thick, color=EMF, alpha=0.45, label="simulated (predicted)")
    if clocks:
        times = [clocks.get((r["op"], r["case"], r["kernel"], r["launch"]), np.nan) for r in rows]
        axes.barh(where + thick / 2, times, thick, color=FM, label="measured")
    bounds = [max(r["bounds_us"].values()) for r in rows]
    marks: dict[str, Any] = dict(linestyle="none", markersize=11, markeredgewidth=2)
    axes.plot(bounds, where, marker="|", color=EMF, label="bound by the unit named (predicted)", **marks)
    axes.plot([r["floor_us"] for r in rows], where, marker="|", color=INK, label="its bytes, each once", **marks)
    for i, r in enumerate(rows):
        most = max(predicted[i], bounds[i], *([times[i]] if clocks and times[i] > 0 else []))
        axes.annotate(r["binding"], (most, i), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    names = [f"{r['op']} {r['kernel'][1:]}, {r['case'].removeprefix('sana-1.6b-')}, {r['launch']}" for r in rows]
    axes.set_yticks(where, [name.replace(", sana-1.6b", "") for name in names], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="microseconds", xscale="log")
    axes.margins(x=0.12)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, fontsize=8)


def ratios(key: str, label: str, low: str = "", high: str = "", log: bool = False) -> Callable[..., None]:
    """Bars of a step record's rows: ratio to plain flow matching, or error; with the range where one was measured."""

    def draw(axes: Axes, record: dict[str, Any]) -> None:
        rows = [r for r in record["rows"] if r.get(key) is not None and (r[key] > 0 or not log)]
        y = np.array([r[key] for r in rows])
        ours = [r["provider"].startswith(("dual", "fm")) for r in rows]
        where = np.arange(len(rows))
        bounds = np.abs(np.array([[r[low] for r in rows], [r[high] for r in rows]]) - y) if low else None
        colors = [EMF if own else FM for own in ours]
        axes.barh(where, y, color=colors, xerr=bounds, error_kw=dict(ecolor=INK, lw=1), height=0.7)
        for i, value in enumerate(y):
            text = f"{value:.0e}" if log else f"{value:.2f}"
            end = value + (bounds[1][i] if bounds is not None else 0)
            axes.annotate(text, (end, i), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(where, [r["provider"] for r in rows], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        if log:
            axes.set_xscale("log")
        else:
            axes.axvline(1, color=GREY, linewidth=0.8)
        axes.margins(x=0.12)

    return draw
