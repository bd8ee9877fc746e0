"""What a run's log holds, as emf.train.log writes it: rows of metrics.jsonl and of curve.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emf.files import read_rows

METRICS, CURVE = "metrics.jsonl", "curve.jsonl"
RESUMED = {"step": int, "wall_s": float | None}
"""What a run that goes on reads of its rows, in both files: key and kind of value; with None it may be missing."""
ROW = RESUMED | dict.fromkeys(("loss", "error", "lr", "it_s", "share", "memory_mib"), float) | {"skipped": int}
SCORED = {"step": int, "overall": dict[str, float], "guidance": float | None}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Raises ValueError, naming file and line, on one of another form."""
    return read_rows(run / METRICS, ROW)


def read_curve(run: Path) -> list[dict[str, Any]]:
    """The rows of curve.jsonl: scores by number of steps. Raises ValueError as read_metrics does, and where a row has
    scores of other numbers of steps than the last has."""
    rows = read_rows(run / CURVE, SCORED)
    for number, row in enumerate(rows, 1):
        where, counts = f"{run / CURVE}:{number}", row["overall"]
        if odd := [n for n in counts if not (n.isascii() and n.isdigit() and 0 < len(n) < 10)]:
            raise ValueError(f"{where} has a score of {odd[0][:40]!r} steps; repair or remove the line")
        if not counts or counts.keys() != rows[-1]["overall"].keys():
            raise ValueError(
                f"{where} has scores of {', '.join(counts) or 'no'} steps, the last row of "
                f"{', '.join(rows[-1]['overall']) or 'none'}; repair or remove the line"
            )
    return rows
