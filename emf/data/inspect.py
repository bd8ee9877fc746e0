"""What is in image-text data: counts, drops with their reasons, sizes, captions, and a contact sheet to look at."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from emf.data.drops import Dropped
from emf.data.images import Images, Sample, fetch
from emf.data.mixture import Mixture
from emf.data.sources import Source

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
    if limit is not None and limit < 1:
        raise ValueError(f"data: --limit {limit} must be at least 1")
    if size < 1:
        raise ValueError(f"data: --size {size} must be at least 1")
    images = Images(sources, CELL, listings=listings)
    order, parts, shown = Mixture(images.counts, images.weights, 0), [], []
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
        "quantiles": {
            "width": quantiles([s.width for s in every]),
            "height": quantiles([s.height for s in every]),
            "width / height": quantiles([s.width / s.height for s in every]),
            "caption, words": quantiles([len(s.caption.split()) for s in every]),
            "caption, characters": quantiles([len(s.caption) for s in every]),
        },
    }
    show(figures, Console())
    out.mkdir(parents=True, exist_ok=True)
    written[0].write_text(json.dumps(figures, indent=2) + "\n")
    if shown:
        contact_sheet(shown[:CELLS]).save(written[1])
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the figures as tables. Names are Text: a [ in them is no markup."""

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for name in columns:
            made.add_column(name, overflow="fold", justify="left" if name in TEXT else "right")
        return made

    sources = table("sources", "source", "weight", "samples", "read", "usable", f"below {figures['crop']} px")
    for s in figures["sources"]:
        share = f"{s['upscaled']} ({s['upscaled'] / max(1, s['usable']):.1%})"
        sources.add_row(
            Text(s["path"]), f"{s['weight']:g}", *(f"{s[k]:,}" for k in ("samples", "read", "usable")), share
        )
    drops = table("dropped", "source", "reason", "count", "first")
    for d in figures["drops"]:
        drops.add_row(Text(d["source"]), d["reason"], f"{d['count']:,}", Text("\n".join(d["first"])))
    spread = table("what is usable", "", *(f"{q} %" for q in QUANTILES))
    for name, values in figures["quantiles"].items():
        spread.add_row(name, *(f"{v:g}" for v in values.values()))
    console.print(sources)
    if figures["drops"]:
        console.print(drops)
    else:
        console.print("nothing was dropped")
    console.print(spread)


TEXT = ("source", "reason", "first", "")  # columns of words, not numbers


def contact_sheet(samples: Sequence[Sample]) -> Image.Image:
    """The crops in a grid, each above the beginning of its caption. A letter that the font (DejaVu Sans) does not have,
    Chinese for one, is an empty box."""
    from matplotlib import get_data_path

    font = ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 11)
    gap, line = 8, 14
    columns = min(COLUMNS, len(samples))
    step, row = CELL + gap, CELL + LINES * line + gap
    sheet = Image.new("RGB", (gap + columns * step, gap + -(-len(samples) // columns) * row), "white")
    pen = ImageDraw.Draw(sheet)
    for i, sample in enumerate(samples):
        x, y = gap + i % columns * step, gap + i // columns * row
        assert sample.image is not None
        pixels = ((sample.image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        sheet.paste(Image.fromarray(pixels), (x, y))
        text = textwrap.wrap(sample.caption, 30, max_lines=LINES, placeholder=" …")
        pen.multiline_text((x, y + CELL + 2), "\n".join(text), "black", font, spacing=2)
    return sheet
