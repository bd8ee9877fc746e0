"""The step bench: every way to the tangent gives the same one, and ours costs what it should. No clock is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.providers import SIZES
from bench.report import cpu_records
from bench.step import measure

pytest.importorskip("diffusers")
EXACT = ["dual 1", "dual 0.75", "dual 0.5", "dual 0.25", "dual 1, checkpointing", "paper", "func.jvp"]
EXACT += ["no_grad jvp + forward", "double backward"]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    record = measure("tiny", rounds=1, say=lambda line: None)
    assert set(record["without"]) == {"compile"}
    assert record["head"]["parameters"] < 1e6 and SIZES["cpu"].batch == 4
    return {row["provider"]: row for row in record["rows"]}


def test_every_way_gives_the_same_tangent(rows: dict[str, dict[str, Any]]) -> None:
    """In float32, against float64: the released step on diffusers' own modules included."""
    for name in EXACT:
        assert rows[name]["u_dot_error"] < 2e-6, name
    assert 1e-5 < rows["finite difference"]["u_dot_error"] < 0.02
    assert rows["fm"]["u_dot_error"] is None and rows["dual 0"]["u_dot_error"] is None


def test_what_a_tangent_costs(rows: dict[str, dict[str, Any]]) -> None:
    """A third of a step in operations, by the share that carries one; nothing held for backward."""
    for share in (1, 0.75, 0.5, 0.25, 0):
        row = rows[f"dual {share:g}"]
        assert row["saved_bytes_ratio"] <= 1.02 and row["flops_ratio"] <= 1.02 + 0.37 * share, row
    assert rows["paper"]["flops_ratio"] > 1.9 and rows["paper"]["saved_peak_bytes_ratio"] > 2
    assert rows["no_grad jvp + forward"]["flops_ratio"] > 1.6
    for row in rows.values():
        assert row["time_low"] > 0 and (row["peak_bytes"] is None or row["peak_bytes"] > 0)


@pytest.mark.parametrize("file", cpu_records(), ids=lambda file: file.stem)
def test_the_record(file: Path) -> None:
    """`make bench` renews the record of its kind of core. Of what it must show: the operations, and what is held for
    backward."""
    record = json.loads(file.read_text())
    assert file.stem == f"step-cpu-{record['head']['core']}"
    rows = {row["provider"]: row for row in record["rows"]}
    assert rows["dual 1"]["flops_ratio"] <= 1.36 and rows["dual 0.25"]["flops_ratio"] <= 1.10
    assert rows["dual 0"]["flops_ratio"] == pytest.approx(1, abs=0.005)
    assert rows["dual 1"]["saved_bytes_ratio"] <= 1.02 and rows["dual 1"]["time"] <= 1.45
    assert all("ms" not in row for row in record["rows"])  # absolute times are a GPU's
