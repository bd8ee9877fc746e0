"""What a sample costs: operations, and what is kept of it for backward.

The transformer's activations are those of the fused kernels: what each op of a block keeps for backward, counted from
its code and held to measured bytes by tests/train/test_plan.py. What torch computes is counted by running it on the
meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from emf.model.sizes import TransformerConfig


def activation_bytes(config: TransformerConfig, tokens: int, condition: int, itemsize: int = 2) -> dict[str, float]:
    """Bytes a sample: `block`, what one block keeps for backward; `input`, what it keeps under checkpointing; `rest`,
    outside the blocks; `tangent`, what is alive of tangents at most, for a sample that carries one."""
    C, F, N, M = config.channels, int(config.mlp_ratio * config.channels), tokens, condition
    # x, h, q k v, o, its projection; x, q before and after its norm, o; x, h, the feed-forward's output
    by_token = 14 * C + 3 * F
    by_text = 3 * C  # k before and after its norm, v
    norms = 4 * (8 * N + M + config.num_cross_attention_heads * N)  # float32 statistics of norms and softmax
    states = 4 * C * (config.attention_head_dim + 1)  # linear attention's sums, float32
    block = itemsize * (N * by_token + M * by_text + 6 * C) + norms + states  # 6 C: its modulation
    text = M * (config.caption_channels + 4 * C)  # the caption's projection, GELU and norm
    times = 2 * (256 + 4 * C) + 2 * C
    pixels = N * config.patch_size**2 * (config.in_channels + config.out_channels)
    rest = itemsize * (text + times + pixels + 2 * N * C)
    return dict(block=block, input=itemsize * N * C, rest=rest, tangent=itemsize * N * (2 * C + 3 * F))


def forward_flops(config: TransformerConfig, tokens: int, condition: int) -> float:
    """Operations of a sample's forward: products, convolutions and attention."""
    C, F, N, M = config.channels, int(config.mlp_ratio * config.channels), tokens, condition
    linear = 2 * (N * (4 * C * C + 2 * C * C + 3 * C * F) + M * 2 * C * C)
    mixing = 4 * N * M * C + 4 * N * C * (config.attention_head_dim + 1) + 2 * 9 * N * 2 * F
    ends = 2 * N * C * config.patch_size**2 * (config.in_channels + config.out_channels)
    ends += 2 * M * (config.caption_channels * C + C * C) + 2 * 2 * (256 * C + 7 * C * C)
    return config.num_layers * (linear + mixing) + ends


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel does it: q, k, v and the output are kept, and not the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = q @ k.transpose(-1, -2) @ v
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("counted only")


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def counted(module: nn.Module, call: Callable[[], Any]) -> tuple[int, int]:
    """(operations of a call, bytes that it keeps for backward) of a module of torch's on the meta device; each storage
    counts once, weights do not. Attention is taken for a fused kernel."""
    kept: dict[int, Any] = {}
    weights = {x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers())}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other takes its place
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with FlopCounterMode(display=False) as counter, _FusedAttention(), hooks, torch.device("meta"):
        held = call()
    del held
    return counter.get_total_flops(), sum(s.nbytes() for at, s in kept.items() if at not in weights)
