"""What the compiler makes of every kernel, without a GPU: `make static` writes profiles/static/<arch>.json.

Each op is called on tensors without data at its bench cases, forward and backward; its launches are caught on the way
and compiled ahead of time. So a kernel that exists is here, with the configuration its op would launch it with.
Run with TRITON_INTERPRET=0: `triton.jit` decides at import whether a kernel is compiled or interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.ops import outputs, require_grad
from emf_kernels import REGISTRY, Case, Dual, Op, backend, launch

ARCHS = ("sm_80", "sm_90", "sm_100")
OUT = Path(__file__).parent.parent / "profiles" / "static"
TOOL = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1"}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227}  # KiB that a block may have
SHOWN = ("arch", "op", "kernel", "registers", "spill_bytes", "shared_bytes", "hgmma", "hmma", "ldg128", "ldg")
Rows = dict[launch.Key, dict[str, int]]


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Launches are listed instead of run."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


@contextmanager
def configured(*chips: str, given: Rows | None = None) -> Iterator[Rows]:
    """A chip's configurations, without the chip. chips: as of launch.chips. given: rows that go before the recorded
    ones. What was asked for is listed under chips[0], with what it got."""
    asked: Rows = {}

    def configuration(kernel: str, x: Tensor, default: dict[str, int], **shape: int) -> dict[str, int]:
        key = launch.key(chips[0], kernel, shape | {"bytes": x.element_size()})
        recorded = (launch.CONFIGURATIONS.get((name, *key[1:])) for name in chips)
        asked[key] = (given or {}).get(key) or next(filter(None, recorded), default)
        return asked[key]

    with mock.patch.object(launch, "configuration", configuration):
        yield asked


def launches(op: Op, case: Case, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What a plain call of an op, a dual call and its backward launch; each kernel and specialisation once."""
    assert op.triton is not None
    refusals = mock.patch("emf_kernels.op.check_kernel_dtype")  # which would refuse bfloat16 off a GPU
    with caught() as every, refusals, backend("triton"):
        args = op.inputs(case, dtype, "meta", torch.Generator())
        duals = {k: Dual(v, torch.empty_like(v[: case.b])) if k in case.live else v for k, v in args.items()}
        leaves = require_grad(op, args)
        op(**args)
        values = [v for v in outputs(op(**duals))[0] if v.requires_grad]
        torch.autograd.grad(values, leaves, [torch.empty_like(v) for v in values], allow_unused=True)
    return list({repr((one.kernel.__name__, source(one)[1:])): one for one in every}.values())


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


def measure(one: Launch, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of one launch on one architecture."""
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
        dump = lambda what: subprocess.run([TOOL, what, file.name], capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[0]) for word in ("REG", "STACK"))
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return dict(
        registers=registers,
        spill_bytes=stack,
        shared_bytes=binary.metadata.shared,
        hgmma=count(r"\bHGMMA\b"),
        hmma=count(r"\bHMMA\b"),
        ldg128=count(r"\bLDG\.E\S*\.128\b"),
        ldg=count(r"\bLDG\b"),
        config={k: v for k, v in constants.items() if not k.islower() or v is None} | one.options,
    )


def bench_cases(names: Sequence[str]) -> list[tuple[Op, Case]]:
    """Of the ops with a kernel; no names: of all."""
    ops = [op for op in REGISTRY.values() if op.triton and (not names or op.name in names)]
    return [(op, case) for op in ops for case in op.cases if "bench" in case.tags]


def rows(arch: str, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    for op, case in bench_cases(names):
        with configured(arch):
            found = launches(op, case)
        for one in found:
            yield dict(op=op.name, kernel=one.kernel.__name__, case=case.name, arch=arch) | measure(one, arch)


if __name__ == "__main__":
    from rich.console import Console

    console = Console()
    for arch in ARCHS:
        found = []
        with console.status(f"{arch} ...") as status:
            for row in rows(arch, sys.argv[1:]):
                found.append(row)
                status.update(f"{arch} {row['op']} {row['kernel']}: {len(found)} kernels")
        if not sys.argv[1:]:
            OUT.mkdir(parents=True, exist_ok=True)
            (OUT / f"{arch}.json").write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
        for row in found:
            print(*(row[k] for k in SHOWN))
