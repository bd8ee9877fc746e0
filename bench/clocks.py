"""Times of our own kernels by a GPU's clock, profiles/<device>/kernels.json, beside what was predicted of them.

A row of that file is one launch of a bench case, named as in profiles/static: {op, case, kernel, launch, us}; rows of
other providers than our kernels are passed over (`bench/kernels.py` writes it).
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from bench.records import PROFILES
from emf.files import read_json

FILE = PROFILES / "static" / "calibration.json"
TABLES = {"a100": "sm_80", "3090": "sm_86", "4090": "sm_89", "h100": "sm_90", "h200": "sm_90", "b200": "sm_100"}
"""Of a device's name. An H200 is an H100 with faster memory: what is bound by memory is faster there than predicted."""
Row = dict[str, Any]


def arch_of(device: str) -> str | None:
    """The chip in `bench/chips.py` of a device's name, None where there is none."""
    return next((arch for word, arch in TABLES.items() if re.search(rf"(^|\W){word}($|\W)", device)), None)


def measured(profiles: Path = PROFILES) -> dict[str, list[Row]]:
    """By device, its rows of kernels.json, with what was predicted of the same launch and the ratio of both."""
    found: dict[str, list[Row]] = {}
    for file in sorted(profiles.glob("*/kernels.json")):
        arch = arch_of(file.parent.name)
        if arch is None:
            continue
        told = read_json(file)
        static = {place(r): r for r in read_json(profiles / "static" / f"{arch}.json")}
        rows = []
        for clock in told["rows"]:
            if clock.get("provider", "triton") != "triton" or "us" not in clock:
                continue
            clock = {**clock, "launch": {"backward": "bwd"}.get(clock["launch"], clock["launch"])}
            predicted = static.get(place(clock))
            if predicted and predicted["simulated_us"]:
                both = dict(simulated_us=predicted["simulated_us"], bound_us=max(predicted["bounds_us"].values()))
                rows.append({**clock, **both, "ratio": round(clock["us"] / predicted["simulated_us"], 3)})
        if rows:
            found[file.parent.name] = rows
    return found


def place(r: Row) -> tuple[str, ...]:
    return r["op"], r["case"], r["kernel"], r["launch"]


def summary(rows: list[Row]) -> dict[str, float]:
    ratios = sorted(r["ratio"] for r in rows)
    return dict(median=statistics.median(ratios), least=ratios[0], most=ratios[-1], launches=len(ratios))
