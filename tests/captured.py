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
from tiny import tiny_sana
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

from bench.static import caught
from emf.flow import meanflow_loss
from emf.flow_config import FlowConfig
from emf.model.transformer import Transformer
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


def captured(op: Op, name: str = "", dynamic: bool = False) -> dict[str, list[int]]:
    """Launches in forward and backward: of the compiled graphs, and of eager calls. Anything but one graph raises.
    name: of a case; else one is taken that is split, where there is one."""
    case = next((c for c in op.cases if (c.name == name if name else c.b < c.shape["B"])), op.cases[0])
    args, dots, _ = make(op, case, torch.float32)
    leaves = [args[k] for k in require_grad(op, args)]
    fixed = {k: v for k, v in args.items() if not isinstance(v, Tensor)}
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor)}
    GRAPHS.clear()
    torch._dynamo.reset()
    looked = aot_autograd(fw_compiler=look, bw_compiler=look)
    compiled = torch.compile(run, fullgraph=True, backend=looked, dynamic=dynamic)
    with backend("triton"):
        torch.autograd.grad(compiled(tensors, dots, fixed, op), leaves, allow_unused=True)
        with caught() as forward:
            y = run(tensors, dots, fixed, op)
        with caught() as backward:
            torch.autograd.grad(y, leaves, allow_unused=True)
    return dict(graphs=[launches(graph) for graph in GRAPHS], eager=[len(forward), len(backward)])


def as_on_a_gpu(op: Op, x: Tensor) -> str:
    return "reference" if op.triton is None else "triton"


def whole_step() -> dict[str, list[int]]:
    """The same of a dual step of a network, path and loss included, two of three samples with a tangent."""
    torch.manual_seed(0)
    flow = FlowConfig()
    config = tiny_sana(num_layers=2, num_attention_heads=1, attention_head_dim=16)
    net = Transformer(config)
    net.time_embed.requires_grad_(False)  # which MeanFlow does not use
    x, e, c = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.randn(3, 5, 12)
    t = torch.tensor([0.9, 0.8, 0.7])
    r = torch.tensor([0.5, 0.1, 0.7])
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    leaves = [p for p in net.parameters() if p.requires_grad]

    def step(x: Tensor, e: Tensor) -> Tensor:
        velocity = lambda z, t, r: net(z, t, r, c, mask)  # noqa: E731
        return meanflow_loss(velocity, velocity, x, e, (t, r, 2), flow)[0].mean()

    GRAPHS.clear()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    with mock.patch.object(Op, "backend_for", as_on_a_gpu):
        compiled(x, e).backward()
        assert all(p.grad is not None for p in leaves)
        with caught() as forward:
            loss = step(x, e)
        with caught() as backward:
            torch.autograd.grad(loss, leaves)
    return dict(graphs=[launches(graph) for graph in GRAPHS], eager=[len(forward), len(backward)])


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    with (
        mock.patch.object(torch.utils._triton, "has_triton", lambda: True),
        mock.patch("emf_kernels.launch.INTERPRETED", True),  # so that kernels are taken off a GPU
    ):
        found = {op.name: captured(op) for op in REGISTRY.values() if op.triton}
        for name in ("bias", "block-mask", "packed"):  # attention, whose launches are others then
            found[name] = captured(REGISTRY["attention"], name)
        found["dynamic sizes"] = captured(REGISTRY["linear_attention"], dynamic=True)
        print(json.dumps(found | {"step": whole_step()}))
