"""Compile the kernels for sm_90 at their bench shape in bfloat16, without a GPU; prints a line of JSON for each.

Run with TRITON_INTERPRET=0: `triton.jit` decides at import whether a kernel is compiled or interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emf_kernels import REGISTRY, Case

TOOL = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
FLOAT32 = ("mean_ptr", "rstd_ptr", "lse_ptr", "dscale_ptr", "dshift_ptr")  # statistics and partial sums


def kind(name: str) -> str:
    if name.endswith("_ptr"):
        return "*i1" if name == "mask_ptr" else "*fp32" if name in FLOAT32 else "*bf16"
    return "fp32" if name in ("eps", "scale") else "i32"


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    """constants: the constexprs, and None for the pointers that are not there."""
    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
    # pointers and strides that a launch would find to be multiples of 16
    aligned = [n for n in signature if n not in constants and (n.endswith("_ptr") or re.fullmatch(r".*_[bnh]|C", n))]
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned if n != "mask_b"}
    binary = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        dump = lambda what: subprocess.run([TOOL, what, file.name], capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))  # type: ignore[union-attr]
    return dict(registers=registers, stack=stack, shared=binary.metadata.shared, tensor_cores=sass.count("HGMMA"))


def adaln(case: Case) -> dict[str, dict[str, Any]]:
    from emf_kernels.adaln import ROWS, _bwd, _fwd, launch

    block = launch(case.shape["C"])
    live = {f"{name.upper()}_LIVE": name in case.live for name in ("x", "scale", "shift")}
    options = dict(num_warps=block.pop("num_warps"))
    return dict(
        forward=compiled(_fwd, live | block, options), backward=compiled(_bwd, dict(ROWS=ROWS) | block, options)
    )


def attention(case: Case) -> dict[str, dict[str, Any]]:
    from emf_kernels.attention import _fwd, launch

    s = case.shape
    rows = {}
    for title, live in (("dual", case.live), ("all live", ("q", "k", "v")), ("primal", ())):
        block = launch(s["D"], s["Nq"], s["Nk"], 2)
        options = {k: block.pop(k) for k in ("num_warps", "num_stages")}
        constants = dict(H=s["H"], D=s["D"], MASKED=True, PRECISION="tf32") | block
        constants |= {f"{name.upper()}_LIVE": name in live for name in "qkv"}
        constants |= {f"{name}_dot_ptr": None for name in "qkv" if name not in live}
        rows[title] = compiled(_fwd, constants, options)
    return rows


if __name__ == "__main__":
    makers = dict(adaln=adaln, attention=attention)
    for op in REGISTRY.values():
        for case in op.cases:
            if op.triton and "bench" in case.tags:
                for title, row in makers[op.name](case).items():
                    print(json.dumps(dict(op=op.name, case=case.name, kernel=title) | row), flush=True)
