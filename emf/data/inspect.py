"""What is in image-text data: counts, drops with their reasons, sizes, captions, and a contact sheet to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from emf.data.buckets import PARTS, nearest, sizes
from emf.data.drops import Dropped
from emf.data.images import Images, Sample, fetch
from emf.data.mixture import Mixture
from emf.data.sources import Source
from emf.files import check_writable, whole_file, write_json
from emf.show.progress import track
from emf.show.sheet import Cell, write_sheet
from emf.show.table import Terminal, terminal

QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent
CELL = 192  # pixels of a picture on the contact sheet
LINES = 3  # of caption below it
COLUMNS, CELLS = 8, 48


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Percentiles by name; empty where there are no values."""
    if not values:
        return {}
    return {str(q): round(float(v), 4) for q, v in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)}


def inspect(
    sources: Sequence[Source],
    size: int,
    out: Path,
    limit: int | None = None,
    *,
    listings: Path | None = None,
    workers: int = 4,
) -> dict[str, Any]:
    """Read every sample (or `limit` of each source, chosen at random but always the same); print what was found; write
    inspect.json and contact.png into folder out; return the figures.

    size: of the crop that training will use: a smaller image counts as upscaled. listings: see emf.data.sources.scan.
    Raises ValueError on sources without samples, and where out holds one of the two files.
    """
    written = [out / "inspect.json", out / "contact.png"]
    if taken := [f for f in written if f.exists()]:
        raise ValueError(f"data: {taken[0]} exists; choose another --out")
    check_writable(written[0], "data: ")
    if limit is not None and limit < 1:
        raise ValueError(f"data: --limit {limit} must be at least 1")
    if size < 1:
        raise ValueError(f"data: --size {size} must be at least 1")
    images = Images(sources, CELL, listings=listings)
    order, parts, shown = Mixture(images.counts, images.weights, 0, images.runs), [], []
    every: list[Sample] = []
    for source, count in enumerate(images.counts):
        chosen = sorted(order.permutation(source, 0)[:limit].tolist())
        # spread over the source; a place whose sample is dropped goes to the next
        due, wanted, used = 0, max(1, CELLS // len(images.counts)), []
        found = fetch(images, ((source, i) for i in chosen), workers)
        for n, sample in enumerate(track(found, images.names[source], len(chosen), transient=True)):
            if isinstance(sample, Dropped):
                images.drops.add(sample.key, sample.source, sample.reason, sample.detail)
                continue
            if n * wanted >= due * len(chosen):
                shown.append(sample)
                due += 1
            used.append(Sample(sample.key, sample.source, sample.caption, width=sample.width, height=sample.height))
        every += used
        parts.append(
            dict(path=images.names[source], weight=images.weights[source], samples=count, read=len(chosen))
            | dict(usable=len(used), upscaled=sum(min(s.width, s.height) < size for s in used))
        )
    figures: dict[str, Any] = {
        "crop": size,
        "sources": parts,
        "drops": [
            {"source": source, "reason": reason, "count": count, "first": images.drops.names[source, reason]}
            for (source, reason), count in images.drops.counts.items()
        ],
        "buckets": in_buckets(every, size),
        "quantiles": {
            "width": quantiles([s.width for s in every]),
            "height": quantiles([s.height for s in every]),
            "width / height": quantiles([s.width / s.height for s in every]),
            "caption, words": quantiles([len(s.caption.split()) for s in every]),
            "caption, characters": quantiles([len(s.caption) for s in every]),
        },
    }
    with whole_file(written[0]) as part:  # it has its name when the sheet has its own: both are there, or neither
        write_json(part, figures, indent=2)
        if shown:
            write_sheet(written[1], contact_sheet(shown[:CELLS]), cell=CELL, lines=LINES)
    show(figures, Terminal())
    return figures


def in_buckets(samples: Sequence[Sample], size: int) -> dict[str, int]:
    """How many samples --data.buckets would train at each size, by WIDTHxHEIGHT; empty where the size has none."""
    if size % PARTS:
        return {}
    counts = Counter(nearest(s.width, s.height) for s in samples)
    return {f"{width}x{height}": counts[b] for b, (width, height) in enumerate(sizes(size)) if counts[b]}


def show(figures: dict[str, Any], out: Console) -> None:
    """Print the figures as tables."""
    rows = []
    for s in figures["sources"]:
        share = f"{s['upscaled']} ({s['upscaled'] / max(1, s['usable']):.1%})"
        rows.append([s["path"], f"{s['weight']:g}", *(f"{s[k]:,}" for k in ("samples", "read", "usable")), share])
    heads = ("source", "weight", "samples", "read", "usable", f"below {figures['crop']} px")
    out.print(terminal(heads, rows, "sources", words=(0,)))
    if figures["drops"]:
        rows = [[d["source"], d["reason"], f"{d['count']:,}", "\n".join(d["first"])] for d in figures["drops"]]
        out.print(terminal(("source", "reason", "count", "first"), rows, "dropped", words=(0, 1, 3)))
    else:
        out.print("nothing was dropped")
    if figures["buckets"]:
        total = sum(figures["buckets"].values())
        rows = [[name, f"{n:,}", f"{n / total:.1%}"] for name, n in figures["buckets"].items()]
        out.print(terminal(("width x height", "usable", "share"), rows, "with --data.buckets True", words=(0,)))
    elif figures["crop"] % PARTS:
        out.print(f"no sizes by ratio: --data.buckets True needs a --size that is a multiple of {PARTS}")
    rows = [[name, *(f"{v:g}" for v in values.values())] for name, values in figures["quantiles"].items()]
    out.print(terminal(("", *(f"{q} %" for q in QUANTILES)), rows, "what is usable", words=(0,)))


def contact_sheet(samples: Sequence[Sample]) -> list[list[Cell]]:
    """The crops in rows, each above the beginning of its caption."""
    cells = []
    for sample in samples:
        assert sample.image is not None
        pixels = ((sample.image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        cells.append(Cell(sample.caption, pixels))
    return [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
