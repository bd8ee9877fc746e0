"""A model of one multiprocessor, clock by clock: warps issue in order, as their control words say (stall counts, six
scoreboards), into pipes that are taken for a time; memory answers after a latency and at a rate. Its result is a
prediction of a launch's time on the device, with the trust that `bench.chips.TRUST` states.

Needs numba, an optional dependency of tests and benchmarks: without it there are bounds and no simulated times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.bounds import Compiled, Program, doubled, products, rate
from bench.chips import Chip
from bench.sass import Instruction

try:
    from numba import njit
except ImportError:  # the time is then not predicted
    njit = None  # type: ignore[assignment]

SUBCORES = 4
MOST_BLOCKS = 24  # simulated of one multiprocessor; more of them take as long each as the last half of these
NONE, FMA, IMAD, ALU, SPECIAL, UNIFORM, HMMA = range(7)  # those behind the first are pipes, taken for a time
HGMMA, TCGEN05, MEMORY, COMMIT, AWAIT, WGAWAIT, TCAWAIT, BARRIER = range(7, 15)
FIXED = {"SPECIAL": 25, "SYNC": 10, "CONTROL": 1}  # clocks until a result is there
SHARED_LATENCY, SHUFFLE_LATENCY, SPECIAL_LATENCY, UNIFORM_LATENCY, ATOMIC_LATENCY = 24, 24, 18, 12, 300
TENSOR_LATENCY = 30
START, RESTART = 50.0, 200.0  # between blocks that start together; until the next takes a free place


def described(one: Instruction, chip: Chip) -> tuple[float, ...]:
    """(pipe, clocks of the pipe, latency, groups left outstanding) of one instruction."""
    lanes = lambda rate: 32 * SUBCORES / rate  # noqa: E731
    kind, name = one.kind, one.name
    last = next((o.text for o in one.operands[::-1] if o.text.startswith("0x")), "0x0")
    if kind in ("FP32", "FP16"):
        return FMA, lanes(chip.fp32) * doubled(one), 0, 0
    if kind == "IMAD":
        return IMAD, lanes(chip.multiply), 0, 0
    if kind == "ALU":
        return ALU, lanes(chip.int32), 0, 0
    if kind in ("MUFU", "CONVERT"):
        return SPECIAL, lanes(chip.special), SPECIAL_LATENCY, 0
    if kind == "UNIFORM":
        return UNIFORM, 2, UNIFORM_LATENCY, 0
    if kind == "HMMA":
        return HMMA, products(one)[0] * SUBCORES / rate(one, chip), 0, 0
    if kind == "HGMMA":
        macs, read = products(one)
        clocks = max(macs * SUBCORES / rate(one, chip), 4 * read / chip.l1_bytes)
        return HGMMA, clocks, TENSOR_LATENCY, float(any(o.text == "gsb0" for o in one.operands))
    if kind == "TCGEN05":
        macs, read = products(one)
        return TCGEN05, max(macs / rate(one, chip), read / chip.l1_bytes), TENSOR_LATENCY, 0
    if kind in ("LDG", "STG", "LDGSTS", "ATOMIC"):
        return MEMORY, 1, ATOMIC_LATENCY if kind == "ATOMIC" else 0, 0
    if kind in ("LDS", "LDSM", "STS", "SHFL", "LOCAL", "TENSOR_MEMORY"):
        return MEMORY, 1, SHUFFLE_LATENCY if kind == "SHFL" else SHARED_LATENCY, 0
    if kind == "BARRIER":
        return (BARRIER, 1, 12, 0) if "SYNC" in one.modifiers else (NONE, 1, 0, 0)
    if name == "LDGDEPBAR":
        return COMMIT, 1, 0, 0
    if name == "DEPBAR":
        return AWAIT, 1, 0, int(last, 16)
    if name == "WARPGROUP" and "DEPBAR" in one.modifiers:
        return WGAWAIT, 1, 0, int(last, 16)
    if name == "SYNCS" and "PHASECHK" in one.modifiers:
        return TCAWAIT, 1, 20, 0
    return NONE, 1, FIXED.get(kind, 0), 0


def dynamic(program: Program, warp: int) -> tuple[np.ndarray, ...]:
    """Of each instruction that a warp issues: its index, clocks of the load and store unit, bytes of L2 and of DRAM,
    and the deepest level that answers it: 0 shared, 1 L1, 2 L2, 3 DRAM."""
    order = program.trace.sequence(warp)
    clocks = np.ones(order.size, np.float32)
    l2, dram, level = np.zeros(order.size, np.float32), np.zeros(order.size, np.float32), np.zeros(order.size, np.int8)
    asked = program.traffic
    for n, event in enumerate(program.trace.events):
        at = event.at[warp]
        if at < 0:
            continue
        clocks[at] = max(1.0, asked.clocks[n, warp], clocks[at])
        if not event.shared:
            share = program.fresh.get(int(asked.owner[n]), 1.0)
            missed = asked.missed[n, warp]
            l2[at], dram[at] = missed, missed * share
            level[at] = 1 + (missed > 0) + (missed > 0 and share > 0.5)
    return order, clocks, l2, dram, level


def machine(static: Any, starts: Any, moved: Any, blocks: int, resident: int, chip: Any) -> tuple[float, float]:
    """Clocks until the last block is done and its writes have left, and until half of the blocks are done.

    static: [instructions, 8]: pipe, clocks, latency, groups, stall, write, read, wait. starts: where each warp's part
    of moved begins. moved: index, clocks, bytes of L2, of DRAM, level of every issue. chip: bytes a clock of L2 and of
    DRAM, latencies 1 to 3.
    """
    index, clocks, l2_bytes, dram_bytes, level = moved
    warps = starts.size - 1
    slots = resident * warps
    block_of = np.arange(slots) // warps
    ready, at, last = np.full(slots, 1e18), np.zeros(slots, np.int64), np.zeros(slots, np.int64)
    boards = np.zeros((slots, 6))
    pending = np.zeros(slots)
    groups, committed = np.zeros((slots, 64)), np.zeros(slots, np.int64)
    products, product_groups, product_end = np.zeros((slots, 64)), np.zeros(slots, np.int64), np.zeros(slots)
    issue, pipes = np.zeros(4), np.zeros((7, 4))
    alive, arrived, latest, matrix = np.zeros(resident), np.zeros(resident), np.zeros(resident), np.zeros(resident)
    load_store, l2, dram, end, half = 0.0, 0.0, 0.0, 0.0, 0.0
    launched, finished, running = 0, 0, 0
    for b in range(min(resident, blocks)):
        for w in range(warps):
            s = b * warps + w
            ready[s], at[s], last[s] = b * START, starts[w], starts[w + 1]
        alive[b] = warps
        launched += 1
        running += 1
    while running > 0:
        s = 0
        t = ready[0]
        for k in range(1, slots):
            if ready[k] < t:
                t = ready[k]
                s = k
        b = block_of[s]
        if at[s] >= last[s]:
            ready[s] = 1e18
            end = max(end, t)
            alive[b] -= 1
            if alive[b] == 0:
                finished += 1
                if finished * 2 <= blocks:
                    half = t
                running -= 1
                if launched < blocks:
                    launched += 1
                    running += 1
                    alive[b] = warps
                    for w in range(warps):
                        k = b * warps + w
                        ready[k], at[k], last[k] = t + RESTART, starts[w], starts[w + 1]
                        pending[k] = committed[k] = product_groups[k] = 0
                        product_end[k] = 0.0
                        for n in range(6):
                            boards[k, n] = 0.0
                    matrix[b] = 0.0
            continue
        i = index[at[s]]
        pipe, cost, latency, left = int(static[i, 0]), static[i, 1], static[i, 2], int(static[i, 3])
        wait = int(static[i, 7])
        start = t
        for n in range(6):
            if wait >> n & 1:
                start = max(start, boards[s, n])
        if pipe == AWAIT and committed[s] > left:
            start = max(start, groups[s, (committed[s] - left - 1) % 64])
        elif pipe == WGAWAIT and product_groups[s] > left:
            start = max(start, products[s, (product_groups[s] - left - 1) % 64])
        elif pipe == TCAWAIT:
            start = max(start, matrix[b])
        sub = s % 4
        start = max(start, issue[sub])
        if FMA <= pipe <= HMMA:
            start = max(start, pipes[pipe, sub])
            if pipe == IMAD:
                start = max(start, pipes[FMA, sub])
        elif pipe == MEMORY:
            start = max(start, load_store - 8.0)
        if start > t:
            ready[s] = start
            continue
        issue[sub] = t + 1.0
        done, freed = t + latency, t + 6.0
        if FMA <= pipe <= HMMA:
            pipes[pipe, sub] = t + cost
            done = t + cost + latency
        elif pipe == HGMMA:  # of the tensor cores, beside which the warp goes on
            freed = max(t, pipes[HMMA, sub]) + cost
            pipes[HMMA, sub] = freed
            product_end[s] = max(product_end[s], freed + latency)
            done = product_end[s]
            if left:
                products[s, product_groups[s] % 64] = product_end[s]
                product_groups[s] += 1
        elif pipe == TCGEN05:  # one warp's instruction takes all four tensor cores
            begin = max(t, pipes[HMMA, 0])
            for n in range(4):
                pipes[HMMA, n] = begin + cost
            matrix[b] = begin + cost + latency
        elif pipe == MEMORY:
            n = at[s]
            load_store = max(t, load_store) + clocks[n]
            done = load_store + (latency if level[n] == 0 else chip[1 + level[n]])
            if l2_bytes[n] > 0:
                l2 = max(l2, t) + l2_bytes[n] / chip[0]
                done = max(done, l2 + chip[3])
                if dram_bytes[n] > 0:
                    dram = max(dram, t) + dram_bytes[n] / chip[1]
                    done = max(done, dram + chip[1 + level[n]])
            freed = load_store + 8.0
            pending[s] = max(pending[s], done)
        elif pipe == COMMIT:
            groups[s, committed[s] % 64] = pending[s]
            committed[s] += 1
        elif pipe == BARRIER:
            at[s] += 1
            arrived[b] += 1
            latest[b] = max(latest[b], t)
            ready[s] = 1e17
            if arrived[b] >= alive[b]:
                for w in range(warps):
                    k = b * warps + w
                    if ready[k] == 1e17:
                        ready[k] = latest[b] + latency
                arrived[b] = latest[b] = 0.0
            continue
        write, read = int(static[i, 5]), int(static[i, 6])
        if write < 6:
            boards[s, write] = max(boards[s, write], done)
        if read < 6:
            boards[s, read] = max(boards[s, read], freed)
        at[s] += 1
        ready[s] = t + max(1.0, static[i, 4])
    return max(end, dram, l2), half


compiled_machine: Callable[..., tuple[float, float]] | None = None if njit is None else njit(cache=True)(machine)


def simulated(compiled: Compiled, program: Program, chip: Chip) -> float | None:
    """Microseconds of a launch, predicted; None without numba or without a figure for the chip's L2."""
    if compiled_machine is None or not chip.l2:
        return None
    static = np.array(
        [(*described(i, chip), i.stall, i.write, i.read, i.wait) for i in program.trace.instructions], np.float64
    )
    warps = [dynamic(program, w) for w in range(compiled.warps)]
    starts = np.cumsum([0, *(len(w[0]) for w in warps)])
    moved = tuple(np.concatenate(parts) for parts in zip(*warps, strict=True))
    each = chip.multiprocessors * chip.clock
    rates = (chip.l2 / each, chip.dram / each, *map(float, chip.latency))
    blocks = math.ceil(compiled.blocks / chip.multiprocessors)
    run = min(blocks, max(MOST_BLOCKS, 3 * program.resident))
    clocks, half = compiled_machine(static, starts, moved, run, min(run, program.resident), np.array(rates))
    if run < blocks:
        clocks += (blocks - run) * (clocks - half) / (run - run // 2)
    return (clocks / chip.clock + chip.launch) * 1e6
