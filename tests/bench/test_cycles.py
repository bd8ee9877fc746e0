"""The model of a multiprocessor (bench/cycles.py), on code whose time can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from bench.chips import CHIPS
from bench.cycles import ALU, FMA, MEMORY, NONE, compiled_machine

CHIP = CHIPS["sm_90"]
RATES = np.array([24.0, 13.0, 41.0, 263.0, 650.0])  # bytes a clock of L2 and DRAM, latencies


def clocks(*rows: tuple[float, ...], warps: int = 1, blocks: int = 1, resident: int = 1, **memory: float) -> float:
    """Of a program of instructions (pipe, clocks, latency, groups, stall, write, read, wait), without its start."""
    n = len(rows)
    static = np.array(rows, np.float64)
    order = np.tile(np.arange(n, dtype=np.int32), warps)
    pieces = [np.full(n * warps, memory.get(k, 0), np.float32) for k in ("clocks", "l2", "dram")]
    level = np.full(n * warps, memory.get("level", 0), np.int8)
    starts = np.arange(0, n * warps + 1, n)
    assert compiled_machine is not None
    return compiled_machine(static, starts, (order, *pieces, level), blocks, resident, RATES)[0]


def test_issue_is_one_a_clock_and_quarter() -> None:
    one = (NONE, 1, 0, 0, 1, 7, 7, 0)
    assert clocks(*[one] * 100) == 100
    assert clocks(*[one] * 100, warps=4) == 100  # one warp a quarter
    assert clocks(*[one] * 100, warps=8) == pytest.approx(200, abs=2)


def test_a_pipe_is_taken_for_its_time() -> None:
    assert clocks(*[(ALU, 2, 0, 0, 1, 7, 7, 0)] * 100, warps=8) == pytest.approx(400, abs=4)
    both = [(ALU, 2, 0, 0, 1, 7, 7, 0), (FMA, 1, 0, 0, 1, 7, 7, 0)] * 100
    assert clocks(*both, warps=8) == pytest.approx(400, abs=6)  # side by side


def test_a_result_is_waited_for() -> None:
    """A load into scoreboard 0, then an instruction that waits for it: the latency of memory, and of L1."""
    load, use = (MEMORY, 1, 0, 0, 1, 0, 7, 0), (NONE, 1, 0, 0, 1, 7, 7, 1)
    far = clocks(load, use, clocks=4, l2=512, dram=512, level=3)
    assert far == pytest.approx(650 + 512 / 13, abs=8)
    assert clocks(load, use, clocks=4, level=1) == pytest.approx(45, abs=3)
    assert clocks(load, (NONE, 1, 0, 0, 1, 7, 7, 2), clocks=4, level=1) < 10  # of another scoreboard: not waited for


def test_more_programs_hide_latency() -> None:
    program = [(MEMORY, 1, 0, 0, 1, 0, 7, 0), (NONE, 1, 0, 0, 1, 7, 7, 1)] * 4
    alone, four = (clocks(*program, blocks=4, resident=n, clocks=1, level=3, l2=32, dram=32) for n in (1, 4))
    assert four < 0.4 * alone
