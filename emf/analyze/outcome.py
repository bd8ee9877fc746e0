"""What an analysis leaves in its folder: settings.json, results.json and results.md."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emf.analyze.bootstrap import LEVEL, Interval
from emf.evaluate.published import ENCODERS

RESULTS, TABLE, SETTINGS = "results.json", "results.md", "settings.json"


@dataclass(frozen=True)
class Row:
    """An encoder's two scores: of its embeddings as they are, and less their mean."""

    name: str
    plain: Interval
    centred: Interval


def check_out(out: Path, files: Sequence[str]) -> None:
    """Raises ValueError where `out` is a file, or holds one of our names without our settings."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"analyze: {out} is no folder; give another --out")
    strange = next((n for n in (*files, RESULTS, TABLE) if (out / n).exists()), None)
    if strange and not (out / SETTINGS).exists():
        raise ValueError(f"analyze: {out / strange} exists without {SETTINGS}: not this analysis's; give another --out")


def claim(out: Path, settings: dict[str, Any], growing: str, files: Sequence[str]) -> None:
    """Make `out` ours: results of other settings are not overwritten. settings[growing], a dict by name, may get more
    names, and lose none; new ones are noted by `note`, when there are results. Raises ValueError."""
    check_out(out, files)
    path, kept = out / SETTINGS, {}
    if path.exists():
        try:
            old = json.loads(path.read_text())
            kept = dict(old[growing])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"analyze: {path} is not this analysis's; give another --out") from None
        if lost := [n for n in kept if settings[growing].get(n) != kept[n]]:
            raise ValueError(
                f"analyze: {out} holds results of {lost[0]} ({kept[lost[0]]}); name it too, or another --out"
            )
        changed = [k for k in sorted(old.keys() | settings.keys()) if k != growing and old.get(k) != settings.get(k)]
        if changed:
            raise ValueError(
                f"analyze: {out} holds results by other settings ({', '.join(changed)}); give another --out"
            )
    note(out, settings | {growing: kept})


def note(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings that `out` holds results of."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / SETTINGS, json.dumps(settings, indent=1, sort_keys=True) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def finite(tree: Any) -> Any:
    """JSON knows no nan: null in its place."""
    if isinstance(tree, dict):
        return {str(k): finite(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write_outcome(
    out: Path,
    analysis: str,
    rows: Sequence[Row],
    settings: dict[str, Any],
    assumed: Sequence[str],
    notes: Sequence[str],
    further: dict[str, Any] | None = None,
    tail: Sequence[str] = (),
) -> None:
    """results.json and results.md: ours beside the paper's, what was assumed, what else there is to know; notes the
    settings."""
    tree: dict[str, Any] = {"analysis": analysis, "rows": [asdict(row) for row in rows], "paper": ENCODERS[analysis]}
    tree |= {"settings": settings, "assumed": list(assumed), "notes": list(notes)} | (further or {})
    write_whole(out / RESULTS, json.dumps(finite(tree), indent=1) + "\n")
    note(out, settings)
    lines = [f"# {analysis.capitalize()}", "", f"| text encoder | {analysis} | of centred embeddings |", "|--|--|--|"]
    lines += [f"| {name}, paper | {x:.3f} | |" for name, x in ENCODERS[analysis].items()]
    lines += [f"| **{cell(row.name)}** | **{row.plain}** | {row.centred} |" for row in rows]
    lines += ["", f"In brackets the {LEVEL:.0%} bootstrap interval. Higher is better in the paper's reading.", ""]
    lines += ["The paper does not say the following; here it is assumed:"]
    lines += [f"- {text}" for text in assumed]
    lines += ["", "Notes:", *(f"- {text}" for text in notes)] if notes else []
    lines += ["", *tail] if tail else []
    write_whole(out / TABLE, "\n".join(lines) + "\n")


def cell(text: str) -> str:
    """A table cell's text."""
    return " ".join(text.split()).replace("|", "\\|")
