"""Layers whose `forward` takes the place of another model's, by `kernelize` of Hugging Face's package of kernels.

As that asks they have no state, no constructor and no method but `forward`, whose arguments are those of the layer that
they replace. They take plain tensors, and have tangents under torch.func.jvp and torch.autograd.forward_ad.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops.rmsnorm import rmsnorm
from .sdpa import scaled_dot_product_attention


class RMSNorm(nn.Module):
    """torch.nn.RMSNorm over the last dimension: x [..., C], weight [C] or none. Raises ValueError where the kernel has
    no such shape or dtype."""

    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        y: Tensor = rmsnorm(x.reshape(1, -1, x.shape[-1]), weight, eps)
        return y.view(x.shape)


class LlamaRMSNorm(nn.Module):
    """The norm of transformers' Llama and of all that are written like it (Qwen2, Qwen3, Mistral): hidden_states
    [..., C], weight [C]."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        y: Tensor = rmsnorm(hidden_states.reshape(1, -1, hidden_states.shape[-1]), self.weight, self.variance_epsilon)
        return y.view(hidden_states.shape)


class ScaledDotProductAttention(nn.Module):
    """A layer that does nothing but torch.nn.functional.scaled_dot_product_attention, in its arguments; see
    emf_kernels.scaled_dot_product_attention for what is refused."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        o: Tensor = scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return o
