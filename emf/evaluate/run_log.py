"""What a run's log holds, as emf.train.log writes it: rows of metrics.jsonl and of curve.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from emf.files import misfit, read_rows
from emf.limits import Within

METRICS, CURVE = "metrics.jsonl", "curve.jsonl"
Share = Annotated[float, Within(0, 1)]
Amount = Annotated[float, Within(0, 2.0**128)]
"""Of what grows where training goes wrong, so that its log can be read: as far as float32 goes, in which it is made."""
RESUMED = {"step": Annotated[int, Within(1)], "wall_s": Amount | None}
"""What a run that goes on reads of its rows, in both files: key and kind of value; with None it may be missing."""
ROW = RESUMED | {"loss": float} | dict.fromkeys(("error", "lr", "it_s", "memory_mib"), Amount)
ROW |= {"share": Share, "skipped": Annotated[int, Within(0)]}
SCORED = {"step": Annotated[int, Within(1)], "overall": dict[str, Any], "guidance": float | None}


def read_log(file: Path, kinds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a log, each of a later step than the one before: a run that goes on drops those past the step that it
    goes on from. kinds: of the values, see emf.files.misfit. Raises ValueError, naming file, line and key, on a row
    that is otherwise."""
    rows = read_rows(file, kinds)
    for number, (before, row) in enumerate(zip(rows, rows[1:], strict=False), 2):
        if row["step"] <= before["step"]:
            raise ValueError(
                f"{file}:{number} has step {row['step']} below one with step {before['step']}; expected a later step; "
                "repair or remove the line"
            )
    return rows


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Raises ValueError as read_log does."""
    return read_log(run / METRICS, ROW)


def read_curve(run: Path) -> list[dict[str, Any]]:
    """The rows of curve.jsonl: scores by number of steps. Raises ValueError as read_log does, and where a row has
    scores of other numbers of steps than the last has."""
    rows = read_log(run / CURVE, SCORED)
    for number, row in enumerate(rows, 1):
        where, counts = f"{run / CURVE}:{number}", row["overall"]
        if odd := [n for n in counts if not (n.isascii() and n.isdigit() and n[0] != "0" and len(n) < 10)]:
            raise ValueError(f"{where} has a score of {odd[0][:40]!r} steps; repair or remove the line")
        if said := misfit(counts, dict.fromkeys(counts, Share)):
            raise ValueError(f"overall of {where} {said}; repair or remove the line")
    for number, row in enumerate(rows, 1):
        where, counts = f"{run / CURVE}:{number}", row["overall"]
        if not counts or counts.keys() != rows[-1]["overall"].keys():
            raise ValueError(
                f"{where} has scores of {', '.join(counts) or 'no'} steps, the last row of "
                f"{', '.join(rows[-1]['overall']) or 'none'}; repair or remove the line"
            )
    return rows
