"""What a kernel has lost against its record in profiles/static."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

WORSE = {"bound": 1.05, "simulated": 1.10}
"""How much may be lost. The order that the assembler puts instructions in moves a simulated time by itself."""
LEAST = 0.05  # microseconds, below which a difference is none
Row = dict[str, Any]


def name(row: Row) -> tuple[str, ...]:
    return row["arch"], row["op"], row["kernel"], row["case"], row["launch"], json.dumps(row["config"])


def spoken(row: Row) -> str:
    return f"{row['op']}.{row['kernel']} {row['case']} {row['launch']} on {row['arch']}"


def worse(before: Row, now: Row) -> list[str]:
    """What a kernel has lost against its record: a sentence each."""
    found = []
    old, new = (max(r["bounds_us"].values()) for r in (before, now))
    if new > WORSE["bound"] * old and new - old > LEAST:
        unit, was = now["binding"], before["bounds_us"].get(now["binding"], 0)
        found.append(
            f"{spoken(now)}: bound by {unit}, {new:.1f} us; the record has {was:.1f} us for {unit} and is bound by "
            f"{before['binding']}, {old:.1f} us"
        )
    old, new = before["simulated_us"], now["simulated_us"]
    if old and new and new > WORSE["simulated"] * old and new - old > LEAST:
        found.append(f"{spoken(now)}: simulated {new:.1f} us, recorded {old:.1f}")
    if now["spill_bytes"] > before["spill_bytes"]:
        found.append(f"{spoken(now)}: spills {now['spill_bytes']} bytes, recorded {before['spill_bytes']}")
    return found


def failures(record: Iterable[Row], now: Iterable[Row]) -> list[str]:
    """What is worse than recorded. A kernel is known by its name and configuration, where that changed by its place."""
    record = list(record)
    exact = {name(r): r for r in record}
    loose: dict[tuple[str, ...], list[Row]] = {}
    for r in record:
        loose.setdefault(name(r)[:-1], []).append(r)
    found, seen = [], dict.fromkeys(loose, 0)
    for r in now:
        others = loose.get(name(r)[:-1], [])
        place = seen.get(name(r)[:-1], 0)
        seen[name(r)[:-1]] = place + 1
        before = exact.get(name(r)) or (others[place] if place < len(others) else None)
        found += [f"{spoken(r)}: not in the record; `make static` renews it"] if not before else worse(before, r)
    return found
