"""One token through a Qwen3 language model, in as few operations as it takes.

transformers' modules take about sixty operations and ten calls of modules a layer, and make a mask at every token: at
one token a row that is most of the time, on a GPU's host as on a CPU. Here a layer is about thirty operations on its
weights as they lie there, of fixed shapes at fixed addresses and without a wait for the device, so that a CUDA graph
can hold a whole step. What is computed is what transformers computes; the tests hold them together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_plain(decoder: Any) -> bool:
    """Whether a language model's layers are Qwen3's own: Linear without biases, attention over all that came before,
    and weights that are there, on one device: of a sharded or offloaded model they are not, between its calls."""
    from transformers import Qwen3Model

    return (
        type(decoder) is Qwen3Model
        and not (decoder.config.attention_bias or decoder.has_sliding_layers)
        and all(type(m) is nn.Linear for name, m in decoder.named_modules() if name.endswith("_proj"))
        and all(p.numel() and not p.is_meta for p in decoder.parameters())
        and len({p.device for p in decoder.parameters()}) == 1
    )


class Qwen3Step:
    """step(token [B]) -> last hidden states [B, hidden] after the final norm; each call reads the next position.

    decoder: transformers' Qwen3Model, for which `is_plain` holds. past: its cache after the prompts. mask [B, M] bool:
    which of the M places of the cache a row attends to. position [B]: the next token's of each row. room: how many
    tokens may follow.
    """

    def __init__(self, decoder: Any, past: Any, mask: Tensor, position: Tensor, room: int) -> None:
        sizes, weight, filled = decoder.config, decoder.embed_tokens.weight, mask.shape[1]
        self.heads, self.kept, self.width = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        self.embedding, self.final = weight, decoder.norm.weight
        self.eps, self.act = sizes.rms_norm_eps, decoder.layers[0].mlp.act_fn
        self.floor = torch.tensor(self.eps, device=weight.device)
        # a multiple of 64: kernels read keys and mask in aligned pieces
        places = -(-(filled + room) // 64) * 64
        self.mask = torch.full((len(mask), 1, 1, places), torch.finfo(weight.dtype).min).to(weight)
        self.mask[..., :filled].masked_fill_(mask[:, None, None], 0)
        self.place = torch.tensor([filled], device=weight.device)
        self.position = position.clone()
        every = torch.arange(int(position.max()) + room, device=weight.device)
        cos, sin = (table[0] for table in decoder.rotary_emb(weight[:1], every[None]))
        # rotate_half turns the halves around and negates what comes first
        half = self.width // 2
        self.cos, self.sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], 1)
        self.layers = [
            self._layer(layer, cached, places) for layer, cached in zip(decoder.layers, past.layers, strict=True)
        ]

    def _layer(self, layer: Any, cached: Any, places: int) -> tuple[Tensor, ...]:
        """A layer's weights, products' transposed, and its keys and values [B, heads, places, width]."""
        a, mlp = layer.self_attn, layer.mlp
        norm = torch.cat([a.q_norm.weight.expand(self.heads, -1), a.k_norm.weight.expand(self.kept, -1)])[:, None]
        held = []
        for x in (cached.keys, cached.values):
            y = x.new_zeros(*x.shape[:2], places, x.shape[3])
            y[:, :, : x.shape[2]] = x
            held.append(y)
        projected = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        products = (p.weight.t() for p in projected)
        return (layer.input_layernorm.weight, layer.post_attention_layernorm.weight, norm, *products, *held)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension; float32 within, rounded before the weight as transformers rounds."""
        if x.is_cuda:  # one kernel; on a CPU it is ten operations, and these are fewer
            return F.rms_norm(x, x.shape[-1:], eps=self.eps) * weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        y = x * torch.addcmul(self.floor, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (y if y.dtype == x.dtype else y.to(x.dtype)) * weight

    def __call__(self, token: Tensor) -> Tensor:
        heads, kept, width, n = self.heads, self.kept, self.width, len(token)
        self.mask.index_fill_(3, self.place, 0)
        cos, sin = (table.index_select(0, self.position)[:, None, None] for table in (self.cos, self.sin))
        x = F.embedding(token, self.embedding)
        for before, after, norm, q, k, v, o, gate, up, down, keys, values in self.layers:
            y = self.norm(x, before)
            both = self.norm(torch.cat([y @ q, y @ k], 1).view(n, heads + kept, 1, width), norm)
            both = torch.addcmul(both * cos, both.roll(width // 2, -1), sin)
            keys.index_copy_(2, self.place, both.narrow(1, heads, kept))
            values.index_copy_(2, self.place, (y @ v).view(n, kept, 1, width))
            # the queries that share a key head are its rows, so that no key is copied
            grouped = both.narrow(1, 0, heads).reshape(n, kept, heads // kept, width)
            x = torch.addmm(x, F.scaled_dot_product_attention(grouped, keys, values, self.mask).reshape(n, -1), o)
            y = self.norm(x, after)
            x = torch.addmm(x, self.act(y @ gate).mul_(y @ up), down)
        self.place.add_(1)
        self.position.add_(1)
        return self.norm(x, self.final)
