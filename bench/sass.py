"""Machine code as cuobjdump prints it: instructions with their operands and control words, by the class of unit that
runs them. The encoding of 128 bits an instruction is that of every NVIDIA chip from sm_70 on; where the control fields
lie in it was found by Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking"
(arXiv 1804.06826, section 2.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import numpy as np

PAIR = re.compile(
    r"/\*([0-9a-f]{4,6})\*/ +(.*?) *; +/\* 0x([0-9a-f]{16}) \*/\n +/\* 0x([0-9a-f]{16}) \*/"  # two lines an instruction
)
NONE = 7  # the scoreboard that means none


class Operand(NamedTuple):
    """kind: R register, P predicate, I immediate (a float's bits), C constant, M memory, S special register, X other.
    number: the register (uniform ones from 256 on, uniform predicates from 8 on), the immediate, or the constant's
    offset. parts: the registers of an address, each with what it is multiplied by."""

    kind: Literal["R", "P", "I", "C", "M", "S", "X"]
    number: int = 0
    negative: bool = False
    inverted: bool = False
    absolute: bool = False
    parts: tuple[tuple[int, int], ...] = ()
    text: str = ""


@dataclass(eq=False)
class Instruction:
    address: int
    guard: Operand | None
    name: str
    modifiers: tuple[str, ...]
    operands: list[Operand]
    kind: str
    width: int
    """Bytes a thread moves."""
    stall: int
    write: int
    """The scoreboard that is released when the result is there, 7: none."""
    read: int
    """The scoreboard that is released when the operands have been read, 7: none."""
    wait: int
    """A bit for each scoreboard waited for before issue."""
    target: int = -1
    """Where a branch goes, as an index."""

    @property
    def text(self) -> str:
        return ".".join((self.name, *self.modifiers)) + " " + ", ".join(o.text for o in self.operands)


KINDS = {
    "FP32": "FFMA FADD FMUL FFMA32I FADD32I FMUL32I FFMA2 FADD2 FMUL2 FSWZADD FHADD FHFMA",
    "FP16": "HFMA2 HADD2 HMUL2 HADD2_32I HFMA2_32I HMUL2_32I",
    "IMAD": "IMAD",
    "ALU": "IADD3 IADD IADD32I LOP3 ISETP FSETP FMNMX FMNMX3 FSEL SEL PRMT SHF LEA IABS IMNMX VIMNMX VIMNMX3 PLOP3 "
    "F2FP MOV MOV32I SGXT BMSK P2R R2P VOTE FCHK LOP HMNMX2 HSETP2 HSET2 VIADD VIADDMNMX I2FP CREDUX",
    "MUFU": "MUFU",
    "CONVERT": "I2F F2I F2F FRND I2I FLO POPC BREV DMUL DADD DFMA DSETP",
    "LDG": "LDG LD",
    "STG": "STG ST",
    "LDGSTS": "LDGSTS",
    "LDS": "LDS",
    "STS": "STS STSM",
    "LDSM": "LDSM",
    "LOCAL": "LDL STL",
    "ATOMIC": "ATOM ATOMG RED ATOMS REDG",
    "SHFL": "SHFL",
    "HMMA": "HMMA IMMA",
    "HGMMA": "HGMMA",
    "TCGEN05": "UTCHMMA UTCQMMA",
    "TENSOR_MEMORY": "LDTM STTM UTCCP",
    "TMA": "UTMALDG UTMASTG UTMAREDG UBLKCP UTMAPF",
    "BARRIER": "BAR",
    "SYNC": "WARPSYNC SYNCS WARPGROUP DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR CCTL CCTLL BSSY BSYNC BREAK BMOV NANOSLEEP "
    "ELECT WARPGROUPDEPBAR ARRIVES UTCBAR UTCATOMSWS ACQBULK YIELD UTMACMDFLUSH UTMACCTL CGAERRBAR UCGABAR_WAIT "
    "UCGABAR_ARV PREEXIT ACQSHMINIT USETMAXREG",
    "CONTROL": "BRA EXIT BRX RET CALL JMP BPT RPCMOV KILL",
    "SPECIAL": "S2R CS2R R2UR S2UR LDC UTCSHIFT REDUX",
    "NOP": "NOP",
    "UNIFORM": "VOTEU",
}
KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
WIDTHS = {"128": 16, "64": 8, "256": 32, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "ENL2": 32}
REGISTER = re.compile(r"(U?)R(Z|\d+)")
FLOATS = {"+INF": 0x7F800000, "-INF": 0xFF800000, "INF": 0x7F800000, "+QNAN": 0x7FC00000, "QNAN": 0x7FC00000}
ZERO, UNIFORM = 255, 256  # the register that is zero; where uniform registers begin
NO_RESULT = {"STG", "STS", "STSM", "STL", "RED", "REDG", "LDGSTS", "BAR", "BRA", "EXIT", "CALL", "RET", "ST", "STTM"}
CARRY = {"IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD"}  # predicates behind the result are results too
COMPARE = {"ISETP", "UISETP", "FSETP", "PLOP3", "UPLOP3", "HSETP2", "DSETP"}  # of two predicates
Bit = tuple[str, int]  # ("R", register) or ("P", predicate)
TRUE = 7  # the predicate that is true, and 15 among the uniform ones


def register(text: str) -> int:
    uniform, number = REGISTER.fullmatch(text).groups()  # type: ignore[union-attr]
    return (UNIFORM if uniform else 0) + (ZERO if number == "Z" else int(number))


def operand(text: str) -> Operand:
    text = text.strip()
    body, inverted, negative = text, False, False
    while body[:1] in "-!~|" and body:
        if body[0] == "|" or (body[0] == "-" and re.match(r"-(0x|\d|INF)", body)):
            break
        negative, inverted, body = negative or body[0] == "-", inverted or body[0] in "!~", body[1:]
    absolute, body = body.startswith("|"), body.strip("|")
    signs: dict[str, Any] = dict(negative=negative, inverted=inverted, absolute=absolute, text=text)
    if match := re.match(r"(U?)P(T|R|\d)$", body):
        if match[2] == "R":
            return Operand("X", **signs)
        return Operand("P", (8 if match[1] else 0) + (TRUE if match[2] == "T" else int(match[2])), **signs)
    if (match := REGISTER.match(body)) and "[" not in body:
        return Operand("R", register(match[0]), **signs)
    if match := re.match(r"c\[0x([0-9a-f]+)\]\[(.*?)\]", body):
        offset = re.findall(r"0x([0-9a-f]+)", match[2])
        parts = tuple((register(m[0]), 1) for m in REGISTER.finditer(match[2]))
        return Operand("C", (int(match[1], 16) << 16) + (int(offset[0], 16) if offset else 0), parts=parts, **signs)
    if "[" in body:
        return memory(body, signs)
    if match := re.match(r"(-?)0x([0-9a-f]+)$", body):
        return Operand("I", int(match[1] + match[2], 16), **signs)
    if body in FLOATS:
        return Operand("I", FLOATS[body], **signs)
    if re.fullmatch(r"-?\d[\d.e+-]*", body):
        with np.errstate(over="ignore"):  # of an instruction on float64, whose numbers are not computed here
            return Operand("I", int(np.float32(body).view(np.uint32)), **signs)
    return Operand("S" if body.startswith("SR") else "X", **signs)


def memory(body: str, signs: dict[str, Any]) -> Operand:
    """[R2.64+UR4+0x10], [R3.X16+0x8] or desc[UR4][R2.64]: the last bracket; gdesc[UR4] of a tensor instruction too."""
    inside = re.findall(r"\[([^\[\]]*)\]", body)[-1]
    offset, parts = 0, []
    for term in re.findall(r"[+-]?[^+-]+", inside):
        term = term.strip("+ ")
        if match := REGISTER.match(term):
            times = re.search(r"\.X(\d+)", term)
            parts.append((register(match[0]), int(times[1]) if times else 1))
        elif match := re.fullmatch(r"(-?)0x([0-9a-f]+)", term.replace(" ", "")):
            offset += int(match[1] + match[2], 16)
    return Operand("M", offset, parts=tuple(parts), **signs)


def instruction(address: str, text: str, high: int) -> Instruction:
    guard = None
    if text.startswith("@"):
        word, text = text[1:].split(None, 1)
        guard = operand(word)
    head, _, rest = text.partition(" ")
    name, *modifiers = head.split(".")
    # commas inside brackets do not part operands
    operands = [operand(part) for part in re.split(r",(?![^\[]*\])", rest) if part.strip()] if rest else []
    width = next((WIDTHS[m] for m in modifiers if m in WIDTHS), 4)
    kind = KIND.get(name) or ("UNIFORM" if name.startswith("U") or name == "LDCU" else "OTHER")
    if name in ("LDSM", "STSM"):
        width = 4 * int(modifiers[-1]) if modifiers[-1].isdigit() and int(modifiers[-1]) < 8 else 4
    if name == "HFMA2" and "MMA" in modifiers:
        kind = "IMAD"  # a move by way of the multiplier
    if name == "LDS" and operands and operands[0].number == ZERO:
        kind = "SYNC"  # reads nothing
    field = lambda at, bits: high >> at & (1 << bits) - 1  # noqa: E731
    return Instruction(
        int(address, 16), guard, name, tuple(modifiers), operands, kind, width,
        stall=field(41, 4), write=field(46, 3), read=field(49, 3), wait=field(52, 6),
    )  # fmt: skip


def parse(text: str) -> list[Instruction]:
    """The one function of cuobjdump's text, without the padding behind it."""
    found = [instruction(m[1], m[2], int(m[4], 16)) for m in PAIR.finditer(text)]
    index = {one.address: i for i, one in enumerate(found)}
    for one in found:
        if one.name in ("BRA", "CALL", "BSSY", "JMP") and one.operands:
            last = re.findall(r"0x([0-9a-f]+)", one.operands[-1].text)
            one.target = index.get(int(last[0], 16), -1) if last else -1
    # behind the code stands a branch to itself, then padding; functions that the code calls come before it
    ends = [i for i, one in enumerate(found) if one.name == "BRA" and one.target == i and one.guard is None]
    return found[: ends[0]] if ends else found


def outputs(one: Instruction) -> list[Operand]:
    """The operands that an instruction writes, which come first."""
    if one.name in NO_RESULT or one.name == "R2P" or not one.operands or one.operands[0].kind not in "RP":
        return []
    first, *others = one.operands
    more = list(takewhile(lambda o: o.kind == "P", others))
    if first.kind == "R":
        return [first, *(more if one.name in CARRY else ())]
    if one.name in COMPARE:
        return [first, *more[:1]]
    register = [o for o in others[len(more) : len(more) + 1] if o.kind == "R"]
    return [first, *more, *register] if register else [first]


def results(one: Instruction) -> list[Bit]:
    """The registers and predicates that an instruction writes."""
    if one.name == "R2P":
        return [("P", n) for n in range(7)]
    return [b for o in outputs(one) for b in bits(one, o)]


def bits(one: Instruction, result: Operand) -> list[Bit]:
    """The predicate, or the registers that follow each other, of one result."""
    if result.kind == "P":
        return [("P", result.number)]
    wide = bool({"WIDE", "64"} & set(one.modifiers))
    wide |= bool({"U64", "S64"} & set(one.modifiers)) and one.name not in ("SHF", "USHF", "I2F", "UI2F")
    wide |= one.name == "CS2R" and "32" not in one.modifiers
    size = one.width // 4 if one.name in ("LDG", "LDS", "LDC", "LDCU", "LD", "LDL", "LDSM") else 1 + wide
    return [("R", result.number + k) for k in range(max(1, size))]
