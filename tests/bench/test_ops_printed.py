"""What `python -m bench.ops` prints: a header with units, and which case it is at."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import ops


def test_rows_stand_under_their_units(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a case that is small enough for any machine."""
    from dataclasses import replace

    op = ops.REGISTRY["adaln"]
    case = replace(op.cases[0], name="small")
    monkeypatch.setattr(ops, "GPU", False)
    monkeypatch.setattr(ops, "DEVICE", "cpu")
    monkeypatch.setattr(ops, "bench_cases", lambda names: iter([(op, case)] if names == ["adaln"] else []))
    monkeypatch.setattr(ops, "ceilings", lambda dtype: {"bytes_s": 1e9, "flop_s": 1e9})
    monkeypatch.setattr(sys, "argv", ["bench.ops", "adaln"])
    torch.manual_seed(0)
    ops.main()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    header = lines[1].split()
    assert header == ops.COLUMNS.split() and "median_ms" in header and "GB/s" in header
    forward = [line.split() for line in lines[2:] if line.split()[4] == "forward" and line.split()[5] != "+"]
    assert forward and all(len(row) == len(header) for row in forward), lines
    assert printed.err.splitlines()[-1] == "case 1 of 1: adaln small ..." and "measuring" in printed.err
