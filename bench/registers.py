"""The registers of one program's threads, for `bench/emulate.py`. A value is an int where all threads have the same,
else an int64 array of a thread's 32 bits each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.sass import TRUE, UNIFORM, ZERO, Instruction, Operand

M32 = 0xFFFFFFFF
Value = Any  # int, or an array of one int64 a thread
Read = Callable[[], Any]


class Machine:
    """Registers and predicates of one program's threads.

    block:     its place in the grid.
    constants: words of the constant bank 0, by offset: the launch's arguments.
    """

    def __init__(self, warps: int, block: tuple[int, int, int], constants: dict[int, int]) -> None:
        self.warps, self.constants = warps, constants
        self.r: list[Value] = [0] * (2 * UNIFORM + 2)
        self.p: list[Value] = [n in (TRUE, 15) for n in range(16)]
        self.local: dict[int, Value] = {}  # what was spilled, by the place of a word on the stack
        self.mask: Any = None
        self.acts: Any = True
        lanes = np.arange(32 * warps, dtype=np.int64)
        self.special = {"SR_TID.X": lanes, "SR_LANEID": lanes % 32, "SR_NTID.X": 32 * warps}
        self.special |= {f"SR_CTAID.{axis}": at for axis, at in zip("XYZ", block, strict=True)}

    def predicate(self, o: Operand) -> Value:
        return self.p[o.number] ^ True if o.inverted else self.p[o.number]

    def address(self, o: Operand) -> np.ndarray:
        total: Value = o.number
        for number, times in o.parts:
            if number % UNIFORM != ZERO:
                low = self.r[number]
                wide = f"R{number % UNIFORM}.64" in o.text or ("desc" in o.text and number >= UNIFORM)
                total = total + (low | (self.r[number + 1] << 32) if wide else low) * times
        return np.broadcast_to(np.asarray(total, np.int64), 32 * self.warps)

    def put(self, o: Operand, value: Value) -> None:
        """Into a register or a predicate, of the threads that act."""
        if o.kind == "P":
            if o.number % 8 != TRUE:
                self.p[o.number] = self.merged(value, self.p[o.number])
        elif o.number % UNIFORM != ZERO:
            self.r[o.number] = self.merged(value & M32, self.r[o.number])

    def put_wide(self, o: Operand, value: Value) -> None:
        if o.number % UNIFORM != ZERO:
            self.r[o.number] = self.merged(value & M32, self.r[o.number])
            self.r[o.number + 1] = self.merged(value >> 32 & M32, self.r[o.number + 1])

    def merged(self, new: Value, old: Value) -> Value:
        if isinstance(new, np.generic) or (isinstance(new, np.ndarray) and not new.ndim):
            new = new.item()
        return new if self.acts is True else np.where(self.acts, new, old)

    def first(self, value: Value) -> Value:
        """What the first acting thread of each warp has, for all of its warp."""
        if not isinstance(value, np.ndarray):
            return value
        rows = value.reshape(-1, 32)
        place = np.broadcast_to(self.acts, value.shape).reshape(-1, 32).argmax(1)
        return np.repeat(rows[np.arange(self.warps), place], 32)


def signed(x: Value) -> Value:
    return (x ^ 0x80000000) - 0x80000000


def wrapped(x: Value) -> Value:
    """64 bits as an array's int64 has them."""
    return x if isinstance(x, np.ndarray) else (x + 2**63) % 2**64 - 2**63


def reader(m: Machine, o: Operand) -> Read:
    """The 32 bits of a source. A negative one is left as what carries are found by: the complement and one."""
    number = o.number
    if o.kind == "P":
        return lambda: m.predicate(o)
    if o.kind == "R" and number % UNIFORM != ZERO:
        get: Read = lambda: m.r[number]  # noqa: E731
    elif o.kind == "C":
        word = m.constants.get(number, 0)
        get = lambda: word  # noqa: E731
    else:
        value = number & M32 if o.kind == "I" else 0
        get = lambda: value  # noqa: E731
    if o.absolute:
        plain = get
        get = lambda: abs(signed(plain()))  # noqa: E731
    if o.negative:
        return lambda: (get() ^ M32) + 1
    return (lambda: get() ^ M32) if o.inverted else get


def wide_reader(m: Machine, o: Operand) -> Read:
    """The 64 bits of a source."""
    if o.kind == "I":
        return lambda: o.number
    if o.kind == "C":
        word = wrapped(m.constants.get(o.number, 0) | m.constants.get(o.number + 4, 0) << 32)
        return lambda: word
    if o.number % UNIFORM == ZERO:
        return lambda: 0
    get: Read = lambda: wrapped(m.r[o.number] | m.r[o.number + 1] << 32)  # noqa: E731
    return (lambda: -get()) if o.negative else get


def split(i: Instruction) -> tuple[Operand, list[Operand], list[Operand], list[Operand]]:
    """(result, carries out, sources, carries in)."""
    result, *rest = i.operands
    out: list[Operand] = []
    while rest and rest[0].kind == "P":
        out.append(rest.pop(0))
    given: list[Operand] = []
    while rest and rest[-1].kind == "P":
        given.insert(0, rest.pop())
    return result, out, rest, given


def logic(table: int, a: Value, b: Value, c: Value, ones: int) -> Value:
    """Of three inputs, by the table of its eight results; ones: all bits of a value set."""
    total: Value = 0
    for n in range(8):
        if table >> n & 1:
            term = ones
            for x, bit in ((a, n & 4), (b, n & 2), (c, n & 1)):
                term = term & (x if bit else x ^ ones)
            total = total | term
    return total
