"""Sizes of the networks, without what computes: a config and its help need no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes under diffusers' names. The defaults are SANA-1.5 1.6B."""

    in_channels: int = 32
    """Channels of what the flow works on: pixels, or latents."""
    out_channels: int = 32
    """Channels of the velocity; equal to in_channels."""
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    """Channels of the states that the text encoder gives."""
    mlp_ratio: float = 2.5
    patch_size: int = 1
    """Pixels, or latents, along a side of one token."""
    sample_size: int = 32
    """Pixels, or latents, along a side of a sample."""
    norm_eps: float = 1e-6
    """The small number in the blocks' layer norms. In the last norm it is 1e-6, whatever this is."""
    interpolation_scale: float | None = None
    """Fixed 2-D sinusoidal positions added to the patches, at this scale (SANA at 2048 and 4096 px: 1 and 2; none
    below)."""
    qk_norm: bool = True
    """RMS norm of queries and keys across heads (SANA-1.5: yes; SANA-1.0: no)."""
    dual_time: bool = False
    """Have EMF's two further time embedders, for t and for t - r."""
    base_time_scale: float = 1000.0
    """What the pretrained embedder multiplies t in [0, 1] with."""
    time_scale: float = 1.0
    """What the two EMF embedders multiply t and t - r with (the paper's code: 1)."""
    checkpointing: bool = False
    """Recompute each block's primal in backward instead of keeping its activations."""

    def __post_init__(self) -> None:
        cross = self.num_cross_attention_heads * self.cross_attention_head_dim
        if cross != self.channels:
            raise ValueError(
                f"model: cross-attention heads x size = {cross} but self-attention's = {self.channels}; make them equal"
            )
        sizes = dict(vars(self))
        if low := [k for k, v in sizes.items() if type(v) is int and v < 1]:
            raise ValueError(f"model: {low[0]} {sizes[low[0]]} must be at least 1")
        if low := [k for k, v in sizes.items() if type(v) is float and not 0 < v < math.inf]:
            raise ValueError(f"model: {low[0]} {sizes[low[0]]} must be a positive number")
        if self.sample_size % self.patch_size:
            raise ValueError(f"model: sample_size {self.sample_size} is no multiple of patch_size {self.patch_size}")

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes under transformers' names."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    """Layers of the text encoder; 0: a bag of words, their embeddings without order or context."""
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    out_channels: int = 128
    """Channels of the states that condition the transformer; equal to transformer.caption_channels."""
    blurred: bool = False
    """Words of a pair are read as one: colours two by two, left and right, above and below. For the study of what a
    worse encoder does (emf.paper)."""
