"""What the compiler makes of every kernel and what that can cost at least, without a GPU: `make static` writes
profiles/static/<arch>.json, `make static CHECK=1` fails where a bound is more than 5 % worse than recorded there.

Each op is called on tensors without data at its bench cases, forward and backward; its launches are caught on the way
and compiled ahead of time. So a kernel that exists is here, with the configuration its op would launch it with. The
machine code is then run through `bench/emulate.py`, `bench/bounds.py` and `bench/cycles.py`: every time in a row is a
prediction. Run with TRITON_INTERPRET=0: `triton.jit` decides at import whether a kernel is compiled or interpreted.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench import bounds, cycles
from bench.chips import CHIPS
from bench.ops import outputs, require_grad
from bench.records import PROFILES
from bench.traffic import SPACE
from emf_kernels import REGISTRY, Case, Dual, Op, backend, launch

ARCHS = tuple(CHIPS)
STATIC = PROFILES / "static"
TOOL = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
POINTERS = {
    **{torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"},
    **{torch.bool: "*i1", torch.int32: "*i32"},
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
Rows = dict[launch.Key, dict[str, int]]


class Launch(NamedTuple):
    """grid: programs along each axis. phase: plain, dual (value and tangent) or bwd. calls: how often it is there."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...] = (1,)
    phase: str = ""
    calls: int = 1


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Launches are listed instead of run."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, arguments, options, tuple(grid(arguments) if callable(grid) else grid)))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


@contextmanager
def configured(*chips: str, given: Rows | None = None) -> Iterator[Rows]:
    """A chip's configurations and its shared memory, without the chip. chips: as of launch.chips. given: rows that go
    before the recorded ones. What was asked for is listed under chips[0], with what it got."""
    asked: Rows = {}

    def configuration(kernel: str, x: Tensor, default: dict[str, int], **shape: int) -> dict[str, int]:
        key = launch.key(chips[0], kernel, shape | {"bytes": x.element_size()})
        recorded = (launch.CONFIGURATIONS.get((name, *key[1:])) for name in chips)
        asked[key] = (given or {}).get(key) or next(filter(None, recorded), default)
        return asked[key]

    most = next((1024 * CHIPS[name].shared_kib for name in chips if name in CHIPS), 227 * 1024)
    with (
        mock.patch.object(launch, "configuration", configuration),
        mock.patch.object(launch, "shared_memory", lambda x: most),
    ):
        yield asked


def launches(op: Op, case: Case, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What a plain call of an op, a dual call and its backward launch; each kernel and specialisation once a phase."""
    assert op.triton is not None
    refusals = mock.patch("emf_kernels.op.check_kernel_dtype")  # which would refuse bfloat16 off a GPU
    phases: list[str] = []
    with caught() as every, refusals, backend("triton"):

        def ended(phase: str) -> None:
            phases.extend([phase] * (len(every) - len(phases)))

        args = op.inputs(case, dtype, "meta", torch.Generator())
        duals = {k: Dual(v, torch.empty_like(v[: case.b])) if k in case.live else v for k, v in args.items()}
        leaves = require_grad(op, args)
        op(**args)
        ended("plain")
        values = [v for v in outputs(op(**duals))[0] if v.requires_grad]
        ended("dual")
        torch.autograd.grad(values, leaves, [torch.empty_like(v) for v in values], allow_unused=True)
        ended("bwd")
    found: dict[str, Launch] = {}
    for one, phase in zip(every, phases, strict=True):
        key = repr((phase, one.kernel.__name__, source(one)[1:], one.grid))
        found[key] = one._replace(phase=phase, calls=found[key].calls + 1 if key in found else 1)
    return list(found.values())


def source(one: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """(signature, constants, positions of arguments that are multiples of 16): what a real launch would find.
    Pointers are taken for aligned."""
    signature, constants, aligned = {}, {}, []
    for i, parameter in enumerate(one.kernel.params):
        value = one.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned.append(i)
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            if isinstance(value, int) and value % 16 == 0:
                aligned.append(i)
    return signature, constants, aligned


def arguments(one: Launch, arch: str) -> tuple[dict[int, int], list[int]]:
    """(words of the constant bank by offset, bytes that each pointer spans), as a launch would pass them. Each tensor
    lies in an address space of its own."""
    at, spans = CHIPS[arch].arguments, list[int]()
    threads, grid = (32 * one.options.get("num_warps", 4), 1, 1), (*one.grid, 1, 1)[:3]
    first, second = (0x360, 0x370) if at == 0x380 else (0, 12)  # threads of a block and blocks, along each axis
    words = {first + 4 * k: n for k, n in enumerate(threads)} | {second + 4 * k: n for k, n in enumerate(grid)}
    for name, kind in source(one)[0].items():
        if kind == "constexpr":
            continue
        value, size = one.arguments[name], 8 if kind[0] == "*" or kind == "i64" else 4
        if isinstance(value, Tensor):
            last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
            spans.append((last + 1) * value.element_size())
            value = len(spans) << SPACE
        elif kind == "fp32":
            value = int(np.float32(value).view(np.uint32))
        at = -(-at // size) * size
        words |= {at + 4 * k: int(value) >> 32 * k & 0xFFFFFFFF for k in range(size // 4)}
        at += size
    return words, spans


def compiled(one: Launch, arch: str) -> tuple[bounds.Compiled, int]:
    """(the launch's machine code and what it takes, bytes of stack)."""
    signature, constants, aligned = source(one)
    binary = triton.compile(
        ASTSource(
            fn=one.kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", int(arch[3:]), 32),
        options=one.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [str(TOOL), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{word}:(\d+)", text)[0]) for word in ("REG", "STACK"))
    x, y, z = (*one.grid, 1, 1)[:3]
    made = bounds.Compiled(
        text, registers, binary.metadata.shared, binary.metadata.num_warps, (x, y, z), *arguments(one, arch)
    )
    return made, stack


def config(one: Launch) -> dict[str, Any]:
    """Constants of the compiled kernel, arguments that are None, and options."""
    return {k: v for k, v in source(one)[1].items() if not k.islower() or v is None} | one.options


def figures(one: Launch, made: bounds.Compiled, stack: int) -> dict[str, Any]:
    count = lambda pattern: len(re.findall(pattern, made.text))  # noqa: E731
    return dict(
        registers=made.registers,
        spill_bytes=stack,
        shared_bytes=made.shared,
        hgmma=count(r"\bHGMMA\b"),
        hmma=count(r"\bHMMA\b"),
        ldg128=count(r"\bLDG\.E\S*\.128\b"),
        ldg=count(r"\bLDG\b"),
        config=config(one),
    )


def measure(one: Launch, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of one launch on one architecture."""
    return figures(one, *compiled(one, arch))


def predict(made: bounds.Compiled, arch: str) -> dict[str, Any]:
    """Bounds by unit, what binds, occupancy, waves, instructions and the simulated time of one launch, in
    microseconds: predictions by `bench/chips.py`."""
    chip = CHIPS[arch]
    program = bounds.run(made, chip)
    least = bounds.bounds(made, program, chip)
    time = cycles.simulated(made, program, chip)
    return dict(
        bounds_us={unit: round(us, 3) for unit, us in least.items()},
        binding=max(least, key=lambda unit: least[unit]),
        floor_us=round(least["DRAM"], 3),
        simulated_us=None if time is None else round(time, 2),
        occupancy=program.resident * made.warps,
        waves=round(made.blocks / (program.resident * chip.multiprocessors), 2),
        instructions=bounds.classes(program),
    )


MODEL = ("arithmetic", "bounds", "chips", "cycles", "emulate", "predicates", "registers", "sass", "traffic")


@cache
def model() -> str:
    """The text that a prediction comes from, and what else it depends on."""
    text = "".join((Path(__file__).parent / f"{name}.py").read_text() for name in MODEL)
    text += "".join(inspect.getsource(f) for f in (arguments, compiled, figures, predict))
    return f"{text} {triton.__version__} {cycles.njit is not None}"


def key(one: Launch, arch: str) -> str:
    """A launch's name in a folder of finished rows: it changes with the kernel's source, its arguments, the model."""
    signature, constants, aligned = source(one)
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    made = ASTSource(fn=one.kernel, signature=signature, constexprs=constants, attrs=attrs).hash()
    parts = (made, one.options, one.grid, arguments(one, arch), arch, model())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def bench_cases(names: Sequence[str]) -> list[tuple[Op, Case]]:
    """Of the ops with a kernel; no names: of all."""
    ops = [op for op in REGISTRY.values() if op.triton and (not names or op.name in names)]
    return [(op, case) for op in ops for case in op.cases if "bench" in case.tags]


def named(arch: str, op: Op, case: Case) -> Iterator[tuple[dict[str, Any], Launch]]:
    """The launches of a case, with what names each of them in a record."""
    with configured(arch):
        found = launches(op, case)
    for one in found:
        name = dict(op=op.name, kernel=one.kernel.__name__, case=case.name, arch=arch, launch=one.phase)
        yield name | dict(calls=one.calls), one


def row(name: dict[str, Any], one: Launch, kept: Path | None = None) -> dict[str, Any]:
    """A record's row of one launch. kept: a folder in which finished rows are kept by their source."""
    file = None if kept is None else kept / f"{key(one, name['arch'])}.json"
    if file is not None and file.exists():
        return name | json.loads(file.read_text())
    made, stack = compiled(one, name["arch"])
    found = figures(one, made, stack) | predict(made, name["arch"])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.rename(file)
    return name | found
