"""What moves, sums, products, shifts and conversions do to registers, for `bench/emulate.py`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import dropwhile
from typing import Any

import numpy as np

from bench.registers import M32, Machine, Read, Value, logic, reader, signed, split, wide_reader, wrapped
from bench.sass import Instruction, Operand

Handler = Callable[[Machine, Instruction], Read]


def simple(function: Callable[..., Value]) -> Callable[[Machine, Instruction], Read]:
    """A handler of result <- function(sources)."""

    def handler(m: Machine, i: Instruction) -> Read:
        result, *operands = i.operands
        reads = [reader(m, o) for o in operands if o.kind != "X"]
        return lambda: m.put(result, function(*(read() for read in reads)))

    return handler


def add(m: Machine, i: Instruction) -> Read:
    result, out, operands, given = split(i)
    if "64" in i.modifiers:
        wide = [wide_reader(m, o) for o in operands]
        return lambda: m.put_wide(result, sum(read() for read in wide))
    reads, carries = [reader(m, o) for o in operands], [reader(m, o) for o in given]

    def run() -> None:
        total = sum(read() for read in reads) + sum(carry() * 1 for carry in carries)
        m.put(result, total)
        for n, o in enumerate(out):
            m.put(o, total >> 32 > n)

    return run


def multiply(m: Machine, i: Instruction) -> Read:
    """IMAD: a b + c, of 32 bits, WIDE of 64, HI the upper ones of 64; MOV, IADD, SHL and the like are the same."""
    result, out, operands, given = split(i)
    unsigned, carries = "U32" in i.modifiers, [reader(m, o) for o in given]
    a, b, *_ = reads = [reader(m, o) for o in operands]
    extend = (lambda x: x & M32) if unsigned else (lambda x: signed(x & M32))
    if "WIDE" in i.modifiers or "HI" in i.modifiers:
        c = wide_reader(m, operands[2])
        high = "HI" in i.modifiers

        def wide() -> None:
            before = c()
            total = wrapped(extend(a()) * extend(b()) + before + sum(carry() * 1 for carry in carries))
            if high:
                m.put(result, total >> 32)
            else:
                m.put_wide(result, total)
            for o in out:
                m.put(o, np.asarray(total, np.int64).view(np.uint64) < np.asarray(before, np.int64).view(np.uint64))

        return wide
    third = reads[2] if len(reads) > 2 else lambda: 0
    return lambda: m.put(result, (a() * b() + third() + sum(carry() * 1 for carry in carries)) & M32)


def scaled_add(m: Machine, i: Instruction) -> Read:
    """LEA: (a << n) + b; HI the upper half of {c, a} << n, + b; SX32 with a's sign for c."""
    result, out, operands, given = split(i)
    shift = operands[-1].number
    reads, carries = [reader(m, o) for o in operands[:-1]], [reader(m, o) for o in given]
    high, extended = "HI" in i.modifiers, "SX32" in i.modifiers

    def run() -> None:
        a, b, *more = (read() for read in reads)
        if high:
            top = 0 if extended or not more else more[0] & M32
            a = signed(a & M32) >> (32 - shift) if extended else (top << shift | (a & M32) >> (32 - shift)) & M32
        else:
            a = a << shift & M32
        total = (a & M32) + b + sum(carry() * 1 for carry in carries)
        m.put(result, total)
        for o in out:
            m.put(o, total >> 32 > 0)

    return run


def shift(m: Machine, i: Instruction) -> Read:
    """SHF: a funnel of {c, a}."""
    result, *operands = i.operands
    low, by, top = (reader(m, o) for o in operands)
    left, arithmetic = "L" in i.modifiers, "S32" in i.modifiers
    high, wraps = "HI" in i.modifiers, "W" in i.modifiers

    def run() -> None:
        a, n, c = low() & M32, by(), top() & M32
        n = n & 31 if wraps else np.minimum(n, 32) if isinstance(n, np.ndarray) else min(n, 32)
        if left:
            value = (c << n | a >> (32 - n)) if high else a << n
        elif high:
            value = signed(c) >> n if arithmetic else c >> n
        else:
            value = a >> n | c << (32 - n)
        m.put(result, value)

    return run


def lop3(m: Machine, i: Instruction) -> Read:
    operands = list(i.operands)
    out = operands.pop(0) if operands[0].kind == "P" else None
    result, *inputs = operands[:4]
    a, b, c = (reader(m, o) for o in inputs)
    table, other = operands[4].number, reader(m, operands[5]) if len(operands) > 5 else lambda: False

    def run() -> None:
        value = logic(table, a(), b(), c(), M32)
        m.put(result, value)
        if out:
            m.put(out, (value != 0) | other())

    return run


def floating(m: Machine, o: Operand) -> Read:
    plain = reader(m, o._replace(negative=False, inverted=False, absolute=False))
    absolute = np.abs if o.absolute else lambda x: x
    sign = -1 if o.negative else 1
    return lambda: sign * absolute(np.asarray(plain(), np.uint32).view(np.float32))


def whole(x: Any) -> Value:
    """The bits of float32 numbers."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.int64)
    return bits if bits.ndim else int(bits)


def reciprocal(m: Machine, i: Instruction) -> Read:
    """What an integer division begins with. Other functions are a kernel's own numbers."""
    result, source = i.operands
    get, rcp = floating(m, source), "RCP" in i.modifiers
    return lambda: m.put(result, whole(1 / np.maximum(get(), np.float32(1e-30))) if rcp else 0)


def to_float(m: Machine, i: Instruction) -> Read:
    result, source = i.operands
    if "U64" in i.modifiers:
        read = wide_reader(m, source)
        return lambda: m.put(result, whole(np.asarray(read(), np.int64).astype(np.float32)))
    get, unsigned = reader(m, source), "U32" in i.modifiers
    return lambda: m.put(result, whole(get() & M32 if unsigned else signed(get() & M32)))


def to_integer(m: Machine, i: Instruction) -> Read:
    result, source = i.operands
    read, wide = floating(m, source), "U64" in i.modifiers
    most = 2.0**63 - 2**40 if wide else 2.0**32 - 256

    def run() -> None:
        value = np.clip(np.nan_to_num(read().astype(np.float64)), -(2.0**31), most).astype(np.int64)
        value = value if value.ndim else int(value)
        m.put_wide(result, value) if wide else m.put(result, value)

    return run


def permute(m: Machine, i: Instruction) -> Read:
    result, low, selector, high = i.operands
    a, s, c = reader(m, low), reader(m, selector), reader(m, high)

    def run() -> None:
        both, pick, total = (a() & M32) | wrapped((c() & M32) << 32), s(), 0
        for n in range(4):
            nibble = pick >> 4 * n & 15
            byte = both >> 8 * (nibble & 7) & 255
            byte = np.where(nibble & 8, (byte >> 7) * 255, byte) if not isinstance(nibble, int) or nibble & 8 else byte
            total = total | byte << 8 * n
        m.put(result, total)

    return run


def extend(m: Machine, i: Instruction) -> Read:
    unsigned = "U32" in i.modifiers

    def function(a: Value, n: Value) -> Value:
        low = a & (1 << n) - 1
        return low if unsigned else (low ^ 1 << n - 1) - (1 << n - 1)

    return simple(function)(m, i)


def select(m: Machine, i: Instruction) -> Read:
    result, first, second, by = i.operands
    a, b, p = reader(m, first), reader(m, second), reader(m, by)

    def run() -> None:
        which = p()
        m.put(result, np.where(which, a(), b()) if isinstance(which, np.ndarray) else a() if which else b())

    return run


def extreme(m: Machine, i: Instruction) -> Read:
    """The smaller where the last predicate holds, else the greater."""
    wide, unsigned = "S64" in i.modifiers or "U64" in i.modifiers, "U32" in i.modifiers
    result, first, second, by, *_ = dropwhile(lambda o: o.kind == "P", i.operands)
    read = wide_reader if wide else reader
    a, b, p = read(m, first), read(m, second), reader(m, by)

    def run() -> None:
        x, y = a(), b()
        if not wide:
            x, y = (x & M32, y & M32) if unsigned else (signed(x & M32), signed(y & M32))
        value = np.where(p(), np.minimum(x, y), np.maximum(x, y))
        m.put_wide(result, value) if wide else m.put(result, value)

    return run


def halves(m: Machine, i: Instruction) -> Read:
    """HFMA2 R, -RZ, RZ, a, b: a constant of two float16 numbers."""
    result, *_, high, low = i.operands
    if not all(o.kind == "I" for o in (high, low)):
        return lambda: m.put(result, 0)
    bits = [int(np.float16(np.uint32(o.number & M32).view(np.float32)).view(np.uint16)) for o in (high, low)]
    return lambda: m.put(result, bits[0] << 16 | bits[1])


def move(m: Machine, i: Instruction) -> Read:
    if "64" in i.modifiers:
        get = wide_reader(m, i.operands[1])
        return lambda: m.put_wide(i.operands[0], get())
    return simple(lambda a, *_: a)(m, i)


def add_extreme(m: Machine, i: Instruction) -> Read:
    """VIADDMNMX: the smaller of a + b and c where the last predicate holds, else the greater."""
    result, *sources, by = i.operands
    a, b, c = (reader(m, o) for o in sources)
    p, sign = reader(m, by), (lambda x: x & M32) if "U32" in i.modifiers else (lambda x: signed(x & M32))

    def run() -> None:
        x, y = sign(a() + b()), sign(c())
        m.put(result, np.where(p(), np.minimum(x, y), np.maximum(x, y)))

    return run


INTEGERS: dict[str, Handler] = {
    "MOV": move, "MOV32I": move, "IABS": simple(lambda a: abs(signed(a & M32))), "VIADD": simple(lambda a, b: a + b),
    "BMSK": simple(lambda a, b: ((1 << b) - 1) << a),
    "POPC": simple(lambda a: np.bitwise_count(np.asarray(a & M32)).astype(np.int64)),
    "FLO": simple(lambda a, *_: np.floor(np.log2(np.maximum(a & M32, 1))).astype(np.int64)),
    "IADD3": add, "IADD": add, "IMAD": multiply, "LEA": scaled_add, "SHF": shift, "LOP3": lop3, "PRMT": permute,
    "SGXT": extend, "VIADDMNMX": add_extreme, "SEL": select, "IMNMX": extreme, "VIMNMX": extreme,
    "I2F": to_float, "I2FP": to_float, "F2I": to_integer,
}  # fmt: skip
