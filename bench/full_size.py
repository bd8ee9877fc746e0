"""The real 1.6B once, on a CPU: random weights in bfloat16, 1024 tokens, 730 of condition, micro-batch 1, checkpointing
on; one forward + tangent + backward. Writes profiles/cpu/full-size.json: peak memory, whether du/dt is finite. Minutes,
12 GiB. Every weight, activation, tangent and gradient is bfloat16; a product is done in float32 and rounded, because a
CPU without bfloat16 units does some of them at 0.4 GFLOP/s."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.meters import process_peak_bytes
from bench.records import PROFILES, revision, write_record
from emf.errors import as_command
from emf.flow import FlowConfig, meanflow_loss
from emf.model.transformer import Transformer, TransformerConfig

GIB = 2**30
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)


class Float32Products(TorchDispatchMode):
    """bfloat16 products computed in float32, their results rounded to bfloat16, as tensor cores do."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.overloadpacket not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return op(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, op(*args, **kwargs))


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = TransformerConfig(dual_time=True, checkpointing=True)
    seen: dict[str, Any] = {}

    def whole() -> None:
        net = Transformer(config)
        print(f"{sum(p.numel() for p in net.parameters()) / 1e9:.2f}B parameters", flush=True)
        net.time_embed.requires_grad_(False)
        x, e = torch.randn(2, 1, 32, 32, 32)
        c = torch.randn(1, 730, config.caption_channels)
        t, r = torch.tensor([0.8], dtype=torch.float32), torch.tensor([0.3], dtype=torch.float32)

        def velocity(z: Any, t: Any, r: Any) -> Any:
            u = net(z, t, r, c)
            seen.update(u=u.primal.detach().float(), u_dot=u.tangent.float())
            return u

        start = time.monotonic()
        loss = meanflow_loss(velocity, velocity, x, e, (t, r, 1), FlowConfig())[0].mean()
        print(f"forward + tangent: {time.monotonic() - start:.0f} s", flush=True)
        loss.backward()
        print(f"with backward: {time.monotonic() - start:.0f} s", flush=True)
        gradients = [p.grad for p in net.parameters() if p.requires_grad]
        seen.update(finite=all(g is not None and bool(g.isfinite().all()) for g in gradients))

    with Float32Products():
        peak = process_peak_bytes(whole)
    record = dict(
        model="1.6b", dtype="bfloat16", tokens=1024, condition=730, micro_batch=1, checkpointing=True,
        u_dot_finite=bool(seen["u_dot"].isfinite().all()), gradients_finite=seen["finite"],
        u_dot_over_u=(seen["u_dot"].norm() / seen["u"].norm()).item(), peak_gib=None if peak is None else peak / GIB,
        torch=torch.__version__, commit=revision(),
    )  # fmt: skip
    write_record(PROFILES / "cpu" / "full-size.json", record)
    print(record)


if __name__ == "__main__":
    with as_command():
        main()
