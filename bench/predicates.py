"""What comparisons, predicates, exchanges between threads and special registers do, for `bench/emulate.py`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.arithmetic import Handler, floating
from bench.registers import M32, Machine, Read, Value, logic, reader, signed, wide_reader
from bench.sass import KINDS, UNIFORM, ZERO, Instruction, Operand, results


def plop3(m: Machine, i: Instruction) -> Read:
    first, second, *inputs = i.operands
    a, b, c = (reader(m, o) for o in inputs[:3])
    tables = [o.number for o in inputs[3:]]

    def run() -> None:
        x, y, z = a() * 1, b() * 1, c() * 1
        for o, table in zip((first, second), tables, strict=True):
            value = logic(table, x, y, z, 1)
            m.put(o, value != 0)

    return run


COMPARISONS: dict[str, Callable[[Value, Value], Value]] = {
    "GE": lambda a, b: a >= b, "GT": lambda a, b: a > b, "LE": lambda a, b: a <= b, "LT": lambda a, b: a < b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "NEU": lambda a, b: a != b, "GEU": lambda a, b: ~(a < b),
    "GTU": lambda a, b: ~(a <= b), "LEU": lambda a, b: ~(a > b), "LTU": lambda a, b: ~(a >= b),
    "EQU": lambda a, b: a == b, "T": lambda a, b: True, "F": lambda a, b: False,
}  # fmt: skip


def joined(m: Machine, i: Instruction, values: Callable[[], Value]) -> Read:
    """A comparison's result, joined with its last predicate: and, or, xor."""
    first, second = i.operands[:2]
    with_ = reader(m, i.operands[4]) if len(i.operands) > 4 else lambda: True

    def run() -> None:
        found, other = values(), with_()
        for o, value in ((first, found), (second, found ^ True)):
            if "AND" in i.modifiers:
                m.put(o, value & other)
            else:
                m.put(o, value | other if "OR" in i.modifiers else value ^ other)

    return run


def compare(m: Machine, i: Instruction) -> Read:
    """EX compares the upper halves, and where those are equal says what the lower halves' comparison did."""
    a, b = (reader(m, o) for o in i.operands[2:4])
    name = next(x for x in i.modifiers if x in COMPARISONS)
    unsigned, extended = "U32" in i.modifiers, "EX" in i.modifiers
    lower = reader(m, i.operands[5]) if extended else lambda: True
    test, strict = COMPARISONS[name], COMPARISONS[{"GE": "GT", "LE": "LT"}.get(name, name)]

    if "S64" in i.modifiers or "U64" in i.modifiers:  # addresses and sizes: never so large that the sign counts
        low, high = (wide_reader(m, o) for o in i.operands[2:4])
        return joined(m, i, lambda: test(low(), high()))

    def values() -> Value:
        x, y = a() & M32, b() & M32
        x, y = (x, y) if unsigned else (signed(x), signed(y))
        if not extended:
            return test(x, y)
        if name == "EQ":
            return (x == y) & lower()
        return (x != y) | lower() if name == "NE" else strict(x, y) | ((x == y) & lower())

    return joined(m, i, values)


def float_compare(m: Machine, i: Instruction) -> Read:
    a, b = (floating(m, o) for o in i.operands[2:4])
    test = COMPARISONS[next(x for x in i.modifiers if x in COMPARISONS)]
    return joined(m, i, lambda: test(a(), b()))


def special(m: Machine, i: Instruction) -> Read:
    result, source = i.operands
    value = m.special.get(source.text, 0)
    if i.name == "CS2R" and "32" not in i.modifiers:
        return lambda: m.put_wide(result, value)
    return lambda: m.put(result, m.first(value) if i.name == "S2UR" else value)


def constant(m: Machine, i: Instruction) -> Read:
    """LDC, ULDC, LDCU: words of a constant bank."""
    result, source = i.operands
    words = max(1, i.width // 4)
    if source.parts:
        raise NotImplementedError(f"{i.text}: a constant at an address that is computed")
    values = [m.constants.get(source.number + 4 * k, 0) for k in range(words)]

    def run() -> None:
        for k, value in enumerate(values):
            m.put(result._replace(number=result.number + k), value)

    return run


def shuffle(m: Machine, i: Instruction) -> Read:
    """Of the 32 threads of a warp; no kernel of Triton's has narrower groups."""
    operands = list(i.operands)
    out = operands.pop(0) if operands[0].kind == "P" else None
    result, source, lane = operands[:3]
    value, by, way = reader(m, source), reader(m, lane), i.modifiers[0]

    def run() -> None:
        x, n = value(), by()
        if isinstance(x, np.ndarray):
            own = np.arange(x.size)
            place = {"BFLY": own % 32 ^ n, "IDX": n & 31, "UP": own % 32 - n, "DOWN": own % 32 + n}[way]
            inside = (place >= 0) & (place < 32)
            x = x[np.where(inside, own // 32 * 32 + place, own)]
        m.put(result, x)
        if out:
            m.put(out, True)

    return run


def vote(m: Machine, i: Instruction) -> Read:
    """ANY and ALL of a warp's threads, as a predicate or as a mask of threads."""
    of = [o for o in i.operands if o.kind == "P"][-1]
    outs = [o for o in i.operands if o is not of]
    joins = np.all if i.modifiers[0] == "ALL" else np.any

    def run() -> None:
        values = np.broadcast_to(np.asarray(m.predicate(of)) & m.acts, 32 * m.warps).reshape(-1, 32)
        weights = (values * (1 << np.arange(32, dtype=np.int64))).sum(1)
        for o in outs:
            m.put(o, np.repeat(joins(values, axis=1) if o.kind == "P" else weights, 32))

    return run


def elect(m: Machine, i: Instruction) -> Read:
    out = i.operands[0]
    first = np.arange(32 * m.warps) % 32 == 0
    return lambda: m.put(out, first)


def to_uniform(m: Machine, i: Instruction) -> Read:
    operands = [o for o in i.operands if o.kind != "P"]
    get = reader(m, operands[1])
    return lambda: m.put(operands[0], m.first(get()))


def predicates_to_register(m: Machine, i: Instruction) -> Read:
    result, _, source, mask = i.operands
    get, bits, base = reader(m, source), mask.number, 8 if i.name.startswith("U") else 0
    byte = {"B1": 8, "B2": 16, "B3": 24}.get(next(iter(i.modifiers), ""), 0)

    def run() -> None:
        packed = sum((m.p[base + n] * 1) << n for n in range(7)) & bits
        m.put(result, (get() & ~(bits << byte)) | packed << byte)

    return run


def register_to_predicates(m: Machine, i: Instruction) -> Read:
    _, source, mask = i.operands
    get = reader(m, source)
    byte = {"B1": 8, "B2": 16, "B3": 24}.get(
        next((x for x in source.text.split(".")[1:] if x in ("B1", "B2", "B3")), ""), 0
    )

    def run() -> None:
        value = get()
        for n in range(7):
            if mask.number >> n & 1:
                m.put(Operand("P", n), value >> byte + n & 1 != 0)

    return run


def number(m: Machine, i: Instruction) -> Read:
    """A number of the kernel's own, from memory or computed: zero. What is waited for is there."""
    there = i.name in ("SYNCS", "UTCATOMSWS")
    operands = [Operand(kind, number) for kind, number in results(i)]  # type: ignore[arg-type]

    def run() -> None:
        for o in operands:
            m.put(o, there if o.kind == "P" else 0)

    return run


def spill(m: Machine, i: Instruction) -> Read:
    """STL, LDL: registers on the stack, at an offset from its pointer R1. What was not put there is zero."""
    if i.name == "STL":
        place, first = i.operands[0], i.operands[1]
    else:
        first, place = i.operands[0], i.operands[1]
    words = range(max(1, i.width // 4))

    def run() -> None:
        for k in words:
            at, register = place.number + 4 * k, first._replace(number=first.number + k)
            if i.name == "LDL":
                m.put(register, m.local.get(at, 0))
            else:
                value = 0 if first.number % UNIFORM == ZERO else m.r[register.number]
                m.local[at] = m.merged(value, m.local.get(at, 0))

    return run


PREDICATES: dict[str, Handler] = {
    "PLOP3": plop3, "ISETP": compare, "FSETP": float_compare, "P2R": predicates_to_register,
    "P2UR": predicates_to_register, "UP2UR": predicates_to_register,
}  # fmt: skip
NUMBERS = ("FP32", "FP16", "LDG", "LDS", "LDSM", "ATOMIC", "HMMA", "HGMMA", "TENSOR_MEMORY", "CONVERT")
FLOATS = ("F2FP", "FSEL", "FMNMX", "FMNMX3", "UFMUL", "UFADD", "UFFMA", "UFSEL", "UFMNMX", "UF2FP")
OTHERS: dict[str, Handler] = {
    **{name: number for kind in NUMBERS for name in KINDS[kind].split()},
    **dict.fromkeys((*FLOATS, "SYNCS", "UTCATOMSWS"), number),
    "S2R": special, "S2UR": special, "CS2R": special, "LDC": constant, "ULDC": constant, "LDCU": constant,
    "SHFL": shuffle, "VOTE": vote, "VOTEU": vote, "ELECT": elect, "R2UR": to_uniform, "REDUX": to_uniform,
    "R2P": register_to_predicates, "STL": spill, "LDL": spill,
}  # fmt: skip
