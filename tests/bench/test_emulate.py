"""Machine code run instruction by instruction (bench/emulate.py): what is stored is every element of the results, once,
on every generation of chips; and the parser, the banks of shared memory and the loops on code written by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT

from bench import emulate, sass
from bench.registers import Machine
from bench.traffic import SPACE, Cache, conflicts, distinct

ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120"]  # sm_86 and sm_89 have the instructions of sm_80


def test_every_element_is_stored_once() -> None:
    """Of three ops' small cases, over all programs of the grid; nothing is read or written outside of an argument."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "emulated.py"), *ARCHS]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {*ARCHS}
    for arch, rows in found.items():
        assert len(rows) == 9
        for row in rows:
            assert not row["outside"], (arch, row)
            for name, (stored, different, all_) in row["stores"].items():
                assert stored == different == all_, (arch, row["kernel"], row["phase"], name)


def code(*lines: str) -> list[sass.Instruction]:
    """Machine code as cuobjdump prints it; a control word that waits for nothing."""
    control = f"{1 << 41 | 7 << 46 | 7 << 49:016x}"
    shown = (
        f"        /*{16 * n:04x}*/                   {line} ;   /* 0x{0:016x} */\n"
        f"                                                 /* 0x{control} */\n"
        for n, line in enumerate(lines)
    )
    return sass.parse("".join(shown))


def run(*lines: str, warps: int = 1, block: tuple[int, int, int] = (0, 0, 0), **constants: int) -> emulate.Trace:
    words = {int(name.removeprefix("c"), 16): value for name, value in constants.items()}
    return emulate.run(code(*lines), Machine(warps, block, words))


def test_a_loop_is_counted() -> None:
    trace = run(
        "MOV R0, RZ",
        "FADD R4, R4, 1",
        "IADD3 R0, R0, 0x20, RZ",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",
        "@!P0 BRA 0x10",
        "EXIT",
        c210=100,
    )
    assert trace.counts().tolist() == [1, 4, 4, 4, 4, 1]
    assert trace.sequence(0).size == 18


def test_threads_that_part_meet_again() -> None:
    """Half of a warp takes a branch: both ways are issued, each by those who go it, and the store by all."""
    trace = run(
        "S2R R0, SR_TID.X",
        "ISETP.GE.U32.AND P0, PT, R0, 0x10, PT",
        "MOV R2, 0x100",
        "@P0 BRA 0x50",
        "MOV R2, 0x200",
        "IMAD.WIDE R2, R0, 0x4, R2",
        "STG.E [R2.64], R5",
        "EXIT",
        warps=2,
    )
    assert trace.counts().tolist() == [2, 2, 2, 2, 1, 2, 2, 2]
    (event,) = trace.events
    want = np.where(np.arange(64) < 16, 0x200, 0x100) + 4 * np.arange(64)
    assert event.active.all() and (event.addresses == want).all()


@pytest.mark.parametrize(
    "line, want",
    [
        ("IADD3 R2, P0, R0, 0x1, RZ", (0, 1)),
        ("IMAD.HI.U32 R2, R0, R0, RZ", (0xFFFFFFFE, 0)),
        ("LEA R2, R1, R1, 0x4", (7 * 17, 0)),
        ("LEA.HI R2, R0, R1, RZ, 0x3", (14, 0)),
        ("SHF.R.S32.HI R2, RZ, 0x1f, R0", (0xFFFFFFFF, 0)),
        ("SHF.L.U64.HI R2, R0, 0x4, R1", (7 << 4 | 15, 0)),
        ("LOP3.LUT R2, R0, 0xf0, R1, 0xf8, !PT", (0xFFFFFFFF, 0)),
        ("PRMT R2, R1, 0x3210, R0", (7, 0)),
        ("PRMT R2, R1, 0x5410, R0", (0xFFFF0007, 0)),
        ("SGXT.U32 R2, R0, 0x5", (31, 0)),
        ("SEL R2, R1, 0x9, !PT", (9, 0)),
        ("VIMNMX R2, R0, R1, PT", (0xFFFFFFFF, 0)),
        ("IMNMX.U32 R2, R0, R1, PT", (7, 0)),
        ("VIADDMNMX R2, R0, -R1, 0xfffffff0, !PT", (0xFFFFFFF8, 0)),
        ("IABS R2, R0", (1, 0)),
        ("IADD3 R2, -R1, 0x3, RZ", (0xFFFFFFFC, 0)),
        ("HFMA2.MMA R2, -RZ, RZ, 0, 5.9604644775390625e-08", (1, 0)),
        ("ISETP.LT.U32.AND P0, PT, R0, R1, PT", (0, 0)),
        ("ISETP.LT.AND P0, PT, R0, R1, PT", (0, 1)),
    ],
)
def test_an_instruction_computes(line: str, want: tuple[int, int]) -> None:
    """R0 = -1, R1 = 7: (R2, P0), read off the address and the guard of a store."""
    trace = run("MOV R0, 0xffffffff", "MOV R1, 0x7", line, "MOV R3, RZ", "STG.E [R2.64], R9", "@P0 STG.E [R2.64], R9",
                "EXIT")  # fmt: skip
    first, *second = trace.events
    assert int(first.addresses[0]) == want[0]
    assert bool(second and second[0].active[0]) == bool(want[1])


def test_a_spilled_address_comes_back() -> None:
    trace = run("MOV R2, 0x40", "MOV R3, RZ", "STL.64 [R1+0x8], R2", "MOV R2, RZ", "LDL.64 R4, [R1+0x8]",
                "STG.E [R4.64], R9", "EXIT")  # fmt: skip
    assert int(trace.events[0].addresses[0]) == 0x40


def test_an_unknown_instruction_that_decides_is_named() -> None:
    with pytest.raises(NotImplementedError, match="BOGUS R2, R3: decides about a branch or an address"):
        run("BOGUS R2, R3", "MOV R3, RZ", "STG.E [R2.64], R9", "EXIT")
    assert run("BOGUS R9, R3", "STG.E [R2.64], R9", "EXIT").events  # of the data alone: not asked for


def test_a_loop_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulate, "MOST", 1000)
    with pytest.raises(RuntimeError, match="does not end"):
        run("BRA 0x10", "FADD R1, R1, 1", "BRA 0x0", "EXIT")


@pytest.mark.parametrize(
    "stride, width, rows, want",
    [
        (4, 4, False, 1),  # neighbours
        (0, 4, False, 1),  # one word for all
        (8, 4, False, 2),  # every other bank
        (128, 4, False, 32),  # one bank
        (2, 2, False, 1),
        (8, 8, False, 2),  # 256 bytes
        (16, 16, False, 4),  # 512 bytes
        (128, 16, False, 32),
        (16, 16, True, 4),  # four matrices
        (128, 16, True, 32),  # all rows of each in the same banks
        (144, 16, True, 4),  # padded
    ],
)
def test_banks_of_shared_memory(stride: int, width: int, rows: bool, want: int) -> None:
    addresses = (stride * np.arange(32)).reshape(1, 1, 32)
    assert conflicts(addresses, np.ones((1, 1, 32), bool), width, rows).item() == want


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    cache = Cache(3)
    assert [cache.misses([n]) for n in (1, 2, 3, 1, 4, 2, 1)] == [1, 1, 1, 0, 1, 1, 0]
    assert distinct(np.array([-1, -1, 2, 2, 5])) == 2 and SPACE > 34
