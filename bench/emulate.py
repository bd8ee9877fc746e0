"""One program of a launch, run through its machine code: which instructions each warp issues, and every address.

Only what decides about branches, predicates and addresses is computed; the numbers of the kernel itself are not, and
memory reads as zero. So a trip count, a share of active lanes, a bank conflict and a cache line touched twice are
counted and not guessed. All warps of the program run side by side as one numpy vector of threads; where they part,
those that are furthest behind go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bench.arithmetic import INTEGERS, Handler, halves, reciprocal
from bench.predicates import OTHERS, PREDICATES, number
from bench.registers import Machine, reader
from bench.sass import TRUE, UNIFORM, ZERO, Bit, Instruction, Operand, outputs, results

MOST = 3_000_000  # instructions of a program, over which something is wrong
GLOBAL = {"LDG", "STG", "LDGSTS", "ATOMIC"}
SHARED = {"LDS", "STS", "LDSM", "LDGSTS"}


CONTROL = {"BRA", "EXIT", "RET", "CALL", "JMP", "BRX", "UTCHMMA"}
VECTOR = INTEGERS | PREDICATES
HANDLERS: dict[str, Handler] = OTHERS | VECTOR | {f"U{name}": handler for name, handler in VECTOR.items()}
HANDLERS |= {"MUFU": reciprocal, "HFMA2": halves}


class Event(NamedTuple):
    """One memory instruction, run once. place: of it in the program. at: its place in each warp's sequence, -1 where a
    warp does not run it."""

    place: int
    shared: bool
    at: np.ndarray
    addresses: np.ndarray
    active: np.ndarray


@dataclass
class Trace:
    instructions: list[Instruction]
    warps: int
    steps: list[tuple[int, int, np.ndarray | None]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def sequence(self, warp: int) -> np.ndarray:
        """The instructions that a warp issues, by index."""
        parts = [np.arange(a, b, dtype=np.int32) for a, b, who in self.steps if who is None or who[warp]]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def counts(self) -> np.ndarray:
        """How often all warps together issue each instruction."""
        total = np.zeros(len(self.instructions) + 1, np.int64)
        for a, b, who in self.steps:
            n = self.warps if who is None else int(who.sum())
            total[a] += n
            total[b] -= n
        return np.cumsum(total)[:-1]


STACK = 1 << 3 * UNIFORM  # spilled registers, as one thing that is written and read
CONSTANT = {("R", ZERO), ("R", UNIFORM + ZERO), ("P", TRUE), ("P", 15)}


def mask(found: Iterable[Bit]) -> int:
    """A set of registers and predicates, without those that are constant, as the bits of an integer."""
    total = 0
    for kind, place in set(found) - CONSTANT:
        total |= 1 << place + (2 * UNIFORM + 2) * (kind == "P")
    return total


def sources(operands: Iterable[Operand], wide: bool = False) -> int:
    found: list[Bit] = []
    for o in operands:
        if o.kind in "RP":
            found += [(o.kind, o.number), *([("R", o.number + 1)] if wide and o.kind == "R" else ())]
        for part, _ in o.parts:
            found += [("R", part), *([("R", part + 1)] if ".64" in o.text or "desc" in o.text else ())]
        if o.kind == "X" and "PR" in o.text:
            found += [("P", n) for n in range(15)]
    return mask(found)


def demanded(one: Instruction) -> int:
    """What an instruction needs to be known whatever comes after it: of branches and accesses to memory."""
    if one.kind in GLOBAL | SHARED:
        given = [o for n, o in enumerate(one.operands) if o.kind == "M" or (n and o.kind == "P")]
    elif one.name in CONTROL:
        given = one.operands
    else:
        return 0
    return sources([*given, *([one.guard] if one.guard else ())], wide=one.name == "RET")


def deciding(instructions: list[Instruction]) -> list[bool]:
    """Which instructions decide about branches, predicates and addresses: those whose results are demanded later, found
    backwards along every way through the code until nothing changes."""
    n = len(instructions)
    writes = [STACK if one.name == "STL" else mask(results(one)) for one in instructions]
    guards = [bool(one.guard) for one in instructions]
    always, reads = [demanded(one) for one in instructions], []
    for one in instructions:
        pairs = bool({"64", "U64", "S64"} & set(one.modifiers)) and one.name not in ("SHF", "USHF")
        sums = {"WIDE", "HI"} & set(one.modifiers) and one.name in ("IMAD", "UIMAD")  # whose third source is a pair
        third = [o for o in one.operands if o.kind != "P"][3:] if sums else []
        # what memory holds depends on nothing here
        given = [] if one.kind in GLOBAL | SHARED else one.operands[len(outputs(one)) :]
        guard = [one.guard] if one.guard else []
        reads.append(sources([*guard, *given], pairs) | sources(third, wide=True) | STACK * (one.name == "LDL"))
        if one.name == "STL":
            reads[-1] |= mask(("R", one.operands[1].number + n) for n in range(one.width // 4))
    goes_on = [
        guards[k] or one.name not in ("BRA", "EXIT", "RET", "CALL", "JMP") or any(o.kind == "P" for o in one.operands)
        for k, one in enumerate(instructions)
    ]
    calls = [k for k, one in enumerate(instructions) if one.name == "CALL"]
    before, after, changed = [0] * (n + 1), [0] * n, True
    while changed:
        changed = False
        for k in reversed(range(n)):
            one = instructions[k]
            out = before[k + 1] if goes_on[k] else 0
            if one.name in CONTROL:
                out |= before[one.target] if one.target >= 0 else 0
                for call in calls if one.name == "RET" else ():
                    out |= before[call + 1]
            need = out | always[k]
            if writes[k] & out:  # what a guard leaves, or another place on the stack holds, is needed still
                need = (out if guards[k] or writes[k] == STACK else out & ~writes[k]) | always[k] | reads[k]
            after[k] = out
            if need != before[k]:
                before[k], changed = need, True
    return [bool(writes[k] & after[k]) for k in range(n)]


class Program:
    """instructions, and the closures that compute what decides."""

    def __init__(self, instructions: list[Instruction], machine: Machine) -> None:
        self.instructions, self.machine = instructions, machine
        chosen = deciding(instructions)
        self.actions: list[Callable[[], Any] | None] = []
        for one, mine in zip(instructions, chosen, strict=True):
            self.actions.append(self.action(one, mine) if mine or self.stops(one) else None)
        self.next = [len(instructions)] * (len(instructions) + 1)
        for k in range(len(instructions) - 1, -1, -1):
            self.next[k] = k if self.actions[k] else self.next[k + 1]

    @staticmethod
    def stops(one: Instruction) -> bool:
        return one.kind in GLOBAL | SHARED or one.name in CONTROL

    def action(self, one: Instruction, mine: bool) -> Callable[[], Any]:
        if one.kind in GLOBAL | SHARED:
            loads = number(self.machine, one) if mine and results(one) else None
            return lambda: ("memory", one, loads)
        if one.name in ("BRA", "JMP"):
            conditions = [reader(self.machine, o) for o in one.operands if o.kind == "P"]
            never = "DIV" in one.modifiers  # a detour for warps that have parted
            return lambda: ("branch", one.target, False if never else [c() for c in conditions])
        if one.name == "EXIT":
            return lambda: ("branch", len(self.instructions), [])
        if one.name == "CALL":
            return lambda: ("branch", one.target, [])
        if one.name == "RET":
            back = reader(self.machine, one.operands[0])
            index = {i.address: k for k, i in enumerate(self.instructions)}
            return lambda: ("branch", index[int(np.max(np.where(self.machine.acts, back(), 0)))], [])
        if one.name == "UTCHMMA":
            descriptor = next(o for o in one.operands if o.text.startswith("idesc"))
            read = reader(self.machine, Operand("R", descriptor.parts[0][0]))
            return lambda: ("product", one, int(np.max(read())))
        if one.name not in HANDLERS:
            raise NotImplementedError(f"{one.text}: decides about a branch or an address; bench/arithmetic.py lacks it")
        return HANDLERS[one.name](self.machine, one)


def run(instructions: list[Instruction], machine: Machine) -> Trace:
    """The trace of one program. machine: its threads, its place in the grid, its arguments."""
    program, trace = Program(instructions, machine), Trace(instructions, machine.warps)
    lanes, end = 32 * machine.warps, len(instructions)
    counters, count = np.zeros(lanes, np.int64), np.zeros(machine.warps, np.int64)
    together, pc, issued = True, 0, 0
    while True:
        if together:
            mask, limit = None, end + 1
        else:
            pc = int(counters.min())
            mask = counters == pc
            together = bool(mask.all())
            limit = end + 1 if together else int(counters[~mask].min())
            mask = None if together else mask
        if pc >= end:
            return trace
        who = None if mask is None else mask.reshape(-1, 32).any(1)
        stop = min(program.next[pc], limit - 1, end - 1)
        runs = program.next[pc] == stop
        trace.steps.append((pc, stop + 1, who))
        count += (stop + 1 - pc) * (1 if who is None else who)
        issued += stop + 1 - pc
        if issued > MOST:
            raise RuntimeError(f"a program of more than {MOST} instructions: a loop that does not end?")
        after: Any = stop + 1
        if runs:
            one = instructions[stop]
            machine.mask = mask
            acts = True if one.guard is None else program.machine.predicate(one.guard)
            acts = acts if mask is None else acts & mask
            if acts is not False:
                machine.acts = acts
                outcome = program.actions[stop]()  # type: ignore[misc]
                if outcome is not None:
                    after = consequence(outcome, stop, trace, machine, count)
        if isinstance(after, int):
            if together:
                pc = after
            else:
                counters[mask] = after
        else:  # some branch and some do not
            counters = np.where(mask, after, counters) if mask is not None else after
            together = False


def consequence(outcome: tuple[Any, ...], stop: int, trace: Trace, machine: Machine, count: np.ndarray) -> Any:
    """Where the threads go on after a branch; a memory access is noted."""
    what, one, given = outcome
    acts, lanes = machine.acts, 32 * machine.warps
    if what == "branch":
        if given is False:
            return stop + 1
        for condition in given:
            acts = acts & condition
        if isinstance(acts, np.ndarray):
            among = acts if machine.mask is None else acts[machine.mask]
            if among.all():
                return one
            return np.where(acts, one, stop + 1) if among.any() else stop + 1
        return one if acts else stop + 1
    if what == "product":
        one.width = given  # of the tensor instruction's own description, which is a constant of the code
        return stop + 1
    active = np.broadcast_to(np.asarray(acts), lanes)
    at = np.where(active.reshape(-1, 32).any(1), count - 1, -1)
    spaces = [o for o in one.operands if o.kind == "M"]
    if one.kind == "LDGSTS":
        trace.events.append(Event(stop, True, at, machine.address(spaces[0]), active))
        if one.operands[-1].kind == "P":
            active = active & machine.predicate(one.operands[-1])
    shared = one.kind in SHARED - GLOBAL or one.name == "ATOMS"
    if spaces:
        trace.events.append(Event(stop, shared, at, machine.address(spaces[-1]), active))
    if given is not None:
        given()
    return stop + 1
