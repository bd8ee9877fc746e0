"""Prints, as JSON, what the compiler's front end makes of kernels that the interpreter does not show. A process of its
own, in which kernels are compiled.

lost: variables that a compiled loop does not hand from one turn to the next, though its Python does: (kernel, line,
variable). Triton finds what a loop carries by comparing values before and after one turn. Two variables that begin as
the very same value, of which one is given to the other (above = here), look unchanged: the compiled kernel then keeps
the first value for ever, and the interpreter does not show it. Here each variable begins as a value of its own, and
what is carried then is compared with what the compiler carries.

double: operations on float64, of kernels whose float arguments come in float64, as torch.compile hands them (eager
calls hand float32); all that may be done with those is to round them. time_embedding alone has phases in float64.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler.code_generator import CodeGenerator, _is_triton_value, flatten_values_to_ir, unflatten_ir_values

from bench.static import Launch, configured, launches, source
from emf_kernels import REGISTRY, launch

find = CodeGenerator._find_carries


def front_end(one: Launch) -> tuple[list[tuple[str, int, str]], list[str]]:
    """(lost, double) of a launch."""
    found: list[tuple[str, int, str]] = []

    def compared(self: Any, node: Any, liveins: dict[str, Any], ignore: Any = frozenset()) -> Any:
        here, block = self.builder.get_insertion_block(), self.builder.create_block()
        self.builder.set_insertion_point_to_start(block)
        apart = {name: own(self.builder, value) for name, value in liveins.items()}
        self.lscope = apart.copy()
        carried = find(self, node, apart, ignore)[0]
        self.lscope, self.local_defs = liveins.copy(), {}
        block.erase()
        self.builder.set_insertion_point_to_end(here)
        names, *rest = find(self, node, liveins, ignore)
        found.extend((one.kernel.__name__, node.lineno, name) for name in carried if name not in names)
        return names, *rest

    def own(builder: Any, value: Any) -> Any:
        if not _is_triton_value(value):
            return value
        handles = [builder.create_bitcast(h, h.get_type()) for h in flatten_values_to_ir([value])]
        return next(unflatten_ir_values(handles, [value.type]))

    target = GPUTarget("cuda", 90, 32)
    signature, constants, _ = source(one)
    signature = {name: "fp64" if kind == "fp32" else kind for name, kind in signature.items()}
    made, context, compiler = ASTSource(one.kernel, signature, constants), ir.context(), make_backend(target)
    ir.load_dialects(context)
    compiler.load_dialects(context)
    options = compiler.parse_options(dict(one.options))
    with mock.patch.object(CodeGenerator, "_find_carries", compared):
        functions, modules = compiler.get_codegen_implementation(options), compiler.get_module_map()
        text = str(made.make_ir(target, options, functions, modules, context))
    found_in = (line.partition(" loc(")[0].strip() for line in text.splitlines() if not line.startswith("#loc"))
    handed_on = ("tt.func", "tt.call", "arith.truncf")
    double = [line for line in found_in if "f64" in line and not any(word in line for word in handed_on)]
    return found, [f"{one.kernel.__name__}: {line}" for line in double]


def main() -> None:
    lost, double, seen = list[Any](), list[str](), 0
    known: set[Any] = set()
    chosen = [op for op in REGISTRY.values() if op.triton and op.name in (sys.argv[1:] or REGISTRY)]
    for op in chosen:
        for case in op.cases:
            if "test" in case.tags or op.name == "attention":
                with configured("none"), mock.patch.object(launch, "INTERPRETED", False):
                    for one in launches(op, case):
                        seen += 1
                        # the front end is told no more than this: cases that differ in sizes alone are the same to it
                        told = one.kernel.fn, repr((source(one)[:2], sorted(one.options.items())))
                        if told in known:
                            continue
                        known.add(told)
                        found = front_end(one)
                        meant = op.name == "time_embedding"
                        lost, double = lost + found[0], double + ([] if meant else found[1])
    print(json.dumps(dict(launches=seen, lost=lost, double=double)))


if __name__ == "__main__":
    main()
