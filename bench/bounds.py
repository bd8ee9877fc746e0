"""Lower bounds of a launch, in microseconds, by the unit that they are of: what its machine code asks of each unit,
over what `bench/chips.py` says that unit can do. Nothing can be faster than the largest of them. They are predictions:
no clock was asked."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench import emulate, sass, traffic
from bench.chips import Chip
from bench.registers import Machine
from bench.sass import Instruction

UNITS = ("issue", "FMA", "ALU", "MUFU", "L1", "tensor", "L2", "DRAM")
"""L1: the load and store unit, with shared memory and the operands that tensor cores read from there."""


@dataclass(frozen=True)
class Compiled:
    """A launch after compilation. tensors: bytes that each pointer argument spans, in order."""

    text: str
    registers: int
    shared: int
    warps: int
    grid: tuple[int, int, int]
    constants: dict[int, int]
    tensors: list[int]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


class Program(NamedTuple):
    """One program as it runs among others: its trace, and what its accesses ask for."""

    trace: emulate.Trace
    traffic: traffic.Traffic
    resident: int
    """Programs on a multiprocessor at once."""
    fresh: dict[int, float]
    """By argument, the share of what is asked of L2 that comes from, or goes to, memory."""


def resident(compiled: Compiled, chip: Chip) -> int:
    """Programs that a multiprocessor holds at once, by registers, shared memory, warps and blocks."""
    by_registers = chip.registers // (math.ceil(compiled.registers * 32 / 256) * 256 * compiled.warps)
    by_shared = 1024 * chip.shared_total_kib // (compiled.shared + 1024)  # a block's own KiB is the system's
    return max(1, min(by_registers, by_shared, chip.warps // compiled.warps, chip.blocks))


def run(compiled: Compiled, chip: Chip) -> Program:
    """The program in the middle of the grid, after the one that ran before it on the same multiprocessor."""
    instructions = sass.parse(compiled.text)
    x, y, z = compiled.grid
    # the middle along each axis: neither the last tile of a row, which may be empty in part, nor a sample's first
    middle = (x - 1) // 2 + x * ((y - 1) // 2 + y * ((z - 1) // 2))
    held = resident(compiled, chip)
    cache = traffic.cache_of(chip, held, compiled.shared)
    for number in (middle - chip.multiprocessors, middle):
        if number < 0:
            continue
        machine = Machine(compiled.warps, (number % x, number // x % y, number // x // y), compiled.constants)
        trace = emulate.run(instructions, machine)
        asked = traffic.measure(trace, cache)
    fresh = {}
    for owner, total in asked.asked.items():
        size = compiled.tensors[owner - 1]
        fresh[owner] = min(1.0, min(size, asked.touched[owner] * compiled.blocks) / max(1, total * compiled.blocks))
    return Program(trace, asked, held, fresh)


def products(one: Instruction) -> tuple[int, int]:
    """(multiplications of one warp's share of a tensor instruction, bytes of shared memory that it reads)."""
    if one.kind == "HMMA":
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "1684": (16, 8, 4)}[one.modifiers[0]]
        return m * n * k, 0
    if one.kind == "HGMMA":  # of four warps together
        m, n, k = map(int, re.findall(r"\d+", one.modifiers[0]))
        size = 4 if "TF32" in one.modifiers else 2
        a = m * k * size if one.operands[1].text.startswith("gdesc") else 0
        return m * n * k // 4, (a + n * k * size) // 4
    if one.kind == "TCGEN05":  # its width is what its descriptor says: N / 8 in bits 17 to 22, M / 16 in bits 24 to 28
        n, m = (one.width >> 17 & 63) * 8, (one.width >> 24 & 31) * 16
        a = 32 * m if one.operands[0].text.startswith("gdesc") else 0
        return m * n * (8 if "TF32" in one.modifiers else 16), a + 32 * n
    return 0, 0


def rate(one: Instruction, chip: Chip) -> float:
    """Products a clock and multiprocessor of a tensor instruction."""
    slow = one.kind == "HMMA"
    return (chip.mma if slow else chip.tensor) / (2 if "TF32" in one.modifiers else 1)


def doubled(one: Instruction) -> int:
    """Instructions on pairs of float32 numbers count twice."""
    return 2 if one.kind == "FP32" and one.name.endswith("2") else 1


def classes(program: Program) -> dict[str, int]:
    """Instructions that all warps of one program issue, by kind."""
    counts = Counter()  # type: ignore[var-annotated]
    for one, n in zip(program.trace.instructions, program.trace.counts().tolist(), strict=True):
        counts[one.kind] += n
    return {kind: n for kind, n in sorted(counts.items()) if n}


def bounds(compiled: Compiled, program: Program, chip: Chip) -> dict[str, float]:
    """Microseconds by unit."""
    counts = program.trace.counts()
    fma = multiply = integer = special = wavefronts = tensor = 0.0
    for one, n in zip(program.trace.instructions, counts.tolist(), strict=True):
        if one.kind in ("FP32", "FP16"):
            fma += n * doubled(one)
        elif one.kind == "IMAD":
            multiply += n
        elif one.kind in ("ALU", "SHFL"):
            integer += n * (one.kind == "ALU")
            wavefronts += n * (one.kind == "SHFL")
        elif one.kind in ("MUFU", "CONVERT"):
            special += n
        elif one.kind in ("HMMA", "HGMMA", "TCGEN05") and n:
            macs, read = products(one)
            tensor += n * macs / rate(one, chip)
            wavefronts += n * read / chip.l1_bytes
    wavefronts += float(program.traffic.clocks.sum())
    clocks = dict(
        issue=int(counts.sum()) / chip.issue,
        FMA=32 * max((fma + multiply) / chip.fp32, multiply / chip.multiply),
        ALU=32 * integer / chip.int32,
        MUFU=32 * special / chip.special,
        L1=wavefronts,
        tensor=tensor,
    )
    each = compiled.blocks / chip.multiprocessors / chip.clock * 1e6
    found = {unit: value * each for unit, value in clocks.items()}
    asked = sum(program.traffic.asked.values()) * compiled.blocks
    if chip.l2:
        found["L2"] = asked / chip.l2 * 1e6
    moved = sum(n * program.fresh[owner] for owner, n in program.traffic.asked.items()) * compiled.blocks
    return found | {"DRAM": moved / chip.dram * 1e6}


def strays(compiled: Compiled, trace: emulate.Trace) -> list[str]:
    """Accesses outside of the arguments, of which a kernel has none: the emulation went wrong."""
    found = []
    for event in trace.events:
        if not event.shared:
            width, live = trace.instructions[event.place].width, event.addresses[event.active]
            for owner in np.unique(live >> traffic.SPACE):
                inside = 1 <= owner <= len(compiled.tensors)
                most = (live[live >> traffic.SPACE == owner] & (1 << traffic.SPACE) - 1).max() + width
                if not inside or most > compiled.tensors[owner - 1]:
                    found.append(f"{trace.instructions[event.place].text} at {most} of argument {owner}")
    return found
