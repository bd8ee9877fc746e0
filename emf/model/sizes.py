"""Sizes of the networks, without what computes: a config and its help need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from emf.limits import Within, check_limits

LARGEST_SIZE = 65_536
"""Of any dimension of a network: a matrix of two such is 17 GB."""
Size = Annotated[int, Within(1, LARGEST_SIZE)]
Layers = Annotated[int, Within(1, 1024)]
Scale = Annotated[float, Within(above=0, most=1e6)]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes under diffusers' names. The defaults are SANA-1.5 1.6B."""

    in_channels: Size = 32
    """Channels of what the flow works on: pixels, or latents."""
    out_channels: Size = 32
    """Channels of the velocity; equal to in_channels."""
    num_attention_heads: Size = 70
    attention_head_dim: Size = 32
    num_layers: Layers = 20
    num_cross_attention_heads: Size = 20
    cross_attention_head_dim: Size = 112
    caption_channels: Size = 2304
    """Channels of the states that the text encoder gives."""
    mlp_ratio: Annotated[float, Within(above=0, most=1024)] = 2.5
    patch_size: Size = 1
    """Pixels, or latents, along a side of one token."""
    sample_size: Size = 32
    """Pixels, or latents, along a side of a sample."""
    norm_eps: Annotated[float, Within(above=0, most=1)] = 1e-6
    """The small number in the blocks' layer norms. In the last norm it is 1e-6, whatever this is."""
    interpolation_scale: Annotated[float | None, Within(above=0, most=1e6)] = None
    """Fixed 2-D sinusoidal positions added to the patches, at this scale (SANA at 2048 and 4096 px: 1 and 2; none
    below)."""
    qk_norm: bool = True
    """RMS norm of queries and keys across heads (SANA-1.5: yes; SANA-1.0: no)."""
    dual_time: bool = False
    """Have EMF's two further time embedders, for t and for t - r."""
    base_time_scale: Scale = 1000.0
    """What the pretrained embedder multiplies t in [0, 1] with."""
    time_scale: Scale = 1.0
    """What the two EMF embedders multiply t and t - r with (the paper's code: 1)."""
    checkpointing: bool = False
    """Recompute each block's primal in backward instead of keeping its activations."""

    def __post_init__(self) -> None:
        check_limits(self, "config: transformer.")
        cross = self.num_cross_attention_heads * self.cross_attention_head_dim
        if cross != self.channels:
            raise ValueError(
                f"config: transformer: cross-attention heads x size = {cross} but self-attention's = {self.channels}; "
                "make them equal"
            )
        if int(self.mlp_ratio * self.channels) < 1:
            raise ValueError(f"config: transformer.mlp_ratio {self.mlp_ratio} leaves no channel of {self.channels}")
        if self.interpolation_scale is not None and self.channels % 4:
            raise ValueError(
                f"config: transformer: {self.channels} channels (heads x size) are no multiple of 4, which positions "
                "(interpolation_scale) need"
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"config: transformer.sample_size {self.sample_size} is no multiple of patch_size {self.patch_size}"
            )

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes under transformers' names."""

    hidden_size: Size = 128
    intermediate_size: Size = 256
    num_hidden_layers: Annotated[int, Within(0, 1024)] = 2
    """Layers of the text encoder; 0: a bag of words, their embeddings without order or context."""
    num_attention_heads: Size = 4
    num_key_value_heads: Size = 2
    head_dim: Size = 32
    out_channels: Size = 128
    """Channels of the states that condition the transformer; equal to transformer.caption_channels."""
    blurred: bool = False
    """Words of a pair are read as one: colours two by two, left and right, above and below. For the study of what a
    worse encoder does (emf.paper)."""

    def __post_init__(self) -> None:
        check_limits(self, "config: encoder.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: encoder.num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}, which share keys and values"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: encoder.head_dim {self.head_dim} must be even: positions turn its halves")
