"""What one program's accesses ask of shared memory, L1, L2 and DRAM, from every address that `bench/emulate.py`
found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from bench.chips import Chip
from bench.emulate import Event, Trace

SECTOR, LINE = 32, 128
TAGS = 4  # lines looked up in a clock: an estimate that keeps a bound a bound
SPACE = 36  # each tensor argument has an address space of its own of 2^36 bytes


@dataclass
class Traffic:
    """clocks [E, W]: of the load and store unit, for each event and warp. missed [E, W]: bytes asked of L2.
    asked: bytes of L2 by argument. touched: distinct bytes by argument."""

    clocks: np.ndarray
    missed: np.ndarray
    owner: np.ndarray
    asked: Counter[int] = field(default_factory=Counter)
    touched: dict[int, int] = field(default_factory=dict)


def distinct(keys: np.ndarray) -> np.ndarray:
    """How many different keys >= 0 there are along the last axis, which is sorted."""
    return (keys[..., 0] >= 0) + ((keys[..., 1:] != keys[..., :-1]) & (keys[..., 1:] >= 0)).sum(-1)


def conflicts(addresses: np.ndarray, active: np.ndarray, width: int, rows: bool) -> np.ndarray:
    """Clocks of shared memory for [E, W, 32] accesses of width bytes: 32 banks of 4 bytes, as many passes as different
    words meet in a bank. rows: matrices' rows of 16 bytes, of which every thread names one (ldmatrix)."""
    unit = 16 if rows else max(4, width)
    lanes = max(1, min(32, LINE // unit))  # threads served together
    if rows:
        active = active & (np.arange(32) < 2 * width)
    keys = np.where(active, addresses // unit, -1).reshape(*addresses.shape[:2], 32 // lanes, lanes)
    keys.sort(-1)
    new = np.concatenate([keys[..., :1] >= 0, (keys[..., 1:] != keys[..., :-1]) & (keys[..., 1:] >= 0)], -1)
    banks = LINE // unit
    most = np.zeros(keys.shape[:-1], np.int64)
    for bank in range(banks):
        most = np.maximum(most, (new & (keys % banks == bank)).sum(-1))
    return most.sum(-1)


def stacked(events: list[Event]) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(events), -1, 32)
    return (np.stack([x for x in part]).reshape(shape) for part in ([e.addresses for e in events],
            [e.active for e in events]))  # type: ignore[return-value]  # fmt: skip


class Cache:
    """Sectors, the least recently used of which goes first."""

    def __init__(self, sectors: int) -> None:
        self.most, self.held = sectors, {}  # type: ignore[var-annotated]

    def misses(self, sectors: list[int]) -> int:
        held, missed = self.held, 0
        for sector in sectors:
            if sector in held:
                del held[sector]
            else:
                missed += 1
            held[sector] = None
        while len(held) > self.most:
            del held[next(iter(held))]
        return missed


def measure(trace: Trace, cache: Cache) -> Traffic:
    """cache: what the program before it on the same multiprocessor left behind."""
    events, warps = trace.events, trace.warps
    shape = (len(events), warps)
    traffic = Traffic(np.zeros(shape), np.zeros(shape), np.zeros(len(events), np.int64))
    kinds: dict[tuple[bool, int, bool], list[int]] = {}
    for n, event in enumerate(events):
        one = trace.instructions[event.place]
        kinds.setdefault((event.shared, one.width, one.name in ("LDSM", "STSM")), []).append(n)
    touched: dict[int, set[int]] = {}
    sectors: dict[int, np.ndarray] = {}
    for (shared, width, rows), which in kinds.items():
        addresses, active = stacked([events[n] for n in which])
        if shared:
            traffic.clocks[which] = conflicts(addresses, active, width, rows)
            continue
        keys = np.where(active, addresses // SECTOR, -1)
        keys.sort(-1)
        count = distinct(keys)
        lines = distinct(np.where(keys >= 0, keys // (LINE // SECTOR), -1))
        traffic.clocks[which] = np.ceil(np.maximum(lines / TAGS, count * SECTOR / LINE))
        traffic.missed[which] = count * SECTOR
        sectors |= dict(zip(which, keys, strict=True))
    for n in sorted(sectors):  # a copy into shared memory passes once: it is noted twice, by either end
        if n and events[n].place == events[n - 1].place and trace.instructions[events[n].place].kind == "LDGSTS":
            traffic.clocks[n] = np.maximum(traffic.clocks[n], traffic.clocks[n - 1])
            traffic.clocks[n - 1] = 0
    for n in sorted(sectors):
        one = trace.instructions[events[n].place]
        keys = sectors[n]
        alive = keys[keys >= 0]
        if not alive.size:
            continue
        owner = int(alive[0] >> SPACE - 5)
        traffic.owner[n] = owner
        unique = np.unique(alive).tolist()
        touched.setdefault(owner, set()).update(unique)
        if one.kind == "LDG" or (one.kind == "LDGSTS" and "BYPASS" not in one.modifiers):
            for w in range(warps):
                row = keys[w]
                traffic.missed[n, w] = SECTOR * cache.misses(np.unique(row[row >= 0]).tolist())
        traffic.asked[owner] += int(traffic.missed[n].sum())
    traffic.touched = {owner: SECTOR * len(s) for owner, s in touched.items()}
    return traffic


def cache_of(chip: Chip, resident: int, shared: int) -> Cache:
    """L1's share of a program that runs beside others."""
    return Cache(max(0, 1024 * chip.l1_kib - resident * (shared + 1024)) // resident // SECTOR)
