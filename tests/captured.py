"""What torch.compile makes of the Triton path, without a GPU: run as a program, which prints its findings as JSON.

Kernels are compiled here, not interpreted; the compiler behind dynamo and AOTAutograd only looks at the graphs, and
what it hands back gives zeros. So nothing is launched.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import torch.utils._triton
import triton
from functorch.compile import make_boxed_func
from parity import make, require_grad
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

from bench.static import caught
from emf_kernels import REGISTRY, Dual, Op, backend

GRAPHS: list[GraphModule] = []


def look(graph: GraphModule, _: Any) -> Any:
    GRAPHS.append(graph)
    values = [None if o is None else o.meta["val"] for o in graph.graph.output_node().args[0]]
    return make_boxed_func(lambda *_: [torch.zeros_like(v) if isinstance(v, Tensor) else v for v in values])


def launches(graph: GraphModule) -> int:
    return sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes)


def run(tensors: dict[str, Any], dots: dict[str, Tensor], fixed: dict[str, Any], op: Op) -> Tensor:
    y = op(**fixed, **{k: Dual(v, dots[k]) if k in dots else v for k, v in tensors.items()})
    y = [y] if isinstance(y, (Dual, Tensor)) else y
    return torch.stack([(o.primal if isinstance(o, Dual) else o).sum() for o in y]).sum()


def captured(op: Op) -> dict[str, list[int]]:
    """Launches in forward and backward: of the compiled graphs, and of eager calls. Anything but one graph raises."""
    case = next((case for case in op.cases if case.b < case.shape["B"]), op.cases[0])
    args, dots, _ = make(op, case, torch.float32)
    leaves = [args[k] for k in require_grad(op, args)]
    fixed = {k: v for k, v in args.items() if not isinstance(v, Tensor)}
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor)}
    GRAPHS.clear()
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    with backend("triton"):
        torch.autograd.grad(compiled(tensors, dots, fixed, op), leaves, allow_unused=True)
        with caught() as forward:
            y = run(tensors, dots, fixed, op)
        with caught() as backward:
            torch.autograd.grad(y, leaves, allow_unused=True)
    return dict(graphs=[launches(graph) for graph in GRAPHS], eager=[len(forward), len(backward)])


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    with (
        mock.patch.object(torch.utils._triton, "has_triton", lambda: True),
        mock.patch("emf_kernels.launch.INTERPRETED", True),  # so that kernels are taken off a GPU
    ):
        print(json.dumps({op.name: captured(op) for op in REGISTRY.values() if op.triton}))
