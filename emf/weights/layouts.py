"""The layouts of a SANA transformer's weights: diffusers' names, the original .pth names, BLIP3o-NEXT's prefix.

Sources: diffusers v0.34.0 models/transformers/sana_transformer.py and scripts/convert_sana_to_diffusers.py for names
and sizes; JiuhaiChen/BLIP3o (BLIP3o-NEXT) and AMAP-ML/EMF for the prefix and the two further time embedders.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emf.files import filled, read_object
from emf.model.sizes import TransformerConfig

SANA = "model.sana."
DUAL = "time_embed_dual/diffusion_pytorch_model.safetensors"
"""EMF's two time embedders, in an export beside diffusers' own file. Diffusers looks in no folder of a model's folder;
from the Hub it fetches what has this name, wherever it lies."""
QK_NORM = "rms_norm_across_heads"
HEAD = 32  # size of a linear-attention head in every published SANA
CROSS_HEADS = {1152: 16, 2240: 20}  # by width: SANA 0.6B; 1.6B and 4.8B

ORIGINAL = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
}
ORIGINAL_BLOCK = {
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
    "scale_shift_table": "scale_shift_table",
}
ORIGINAL_STACKED = {
    "attn1.to_q": ("attn.qkv", 0, 3),
    "attn1.to_k": ("attn.qkv", 1, 3),
    "attn1.to_v": ("attn.qkv", 2, 3),
    "attn2.to_k": ("cross_attn.kv_linear", 0, 2),
    "attn2.to_v": ("cross_attn.kv_linear", 1, 2),
}
"""Module -> (module, part, of how many parts stacked along the rows)."""
UNUSED = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")
"""What an original .pth holds that is not read: the null caption, fixed positions, weights of its training."""


@dataclass(frozen=True)
class Piece:
    """Where a tensor of ours is found: part `part` of `parts` equal ones along the rows of `key`."""

    key: str
    part: int = 0
    parts: int = 1

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part. Where the whole cannot be divided it is the whole's, which then fits nothing."""
        if self.parts == 1 or not whole or whole[0] % self.parts:
            return whole
        return (whole[0] // self.parts, *whole[1:])


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names a transformer's weights."""

    prefix: str = ""
    """What stands before diffusers' names."""
    original: bool = False
    """The names are those of an original .pth."""

    def find(self, name: str) -> Piece:
        """Where our tensor `name`, which is diffusers' name, lies."""
        if not self.original:
            return Piece(self.prefix + name)
        module, dot, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            module, dot, leaf = name, "", ""
        if not (block := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)):
            return Piece(ORIGINAL.get(module, module) + dot + leaf)
        start, module = f"blocks.{block[1]}.", block[2]
        if module in ORIGINAL_STACKED:
            stacked, part, parts = ORIGINAL_STACKED[module]
            return Piece(start + stacked + dot + leaf, part, parts)
        return Piece(start + ORIGINAL_BLOCK.get(module, module) + dot + leaf)

    def layers(self, keys: Collection[str]) -> int:
        start = "blocks." if self.original else self.prefix + "transformer_blocks."
        found = (re.match(re.escape(start) + r"(\d+)\.", k) for k in keys)
        return 1 + max((int(m[1]) for m in found if m), default=-1)


def detect(keys: Collection[str], where: Path) -> Layout:
    """The layout of a set of names. Raises ValueError where it is none of the three."""
    for layout in (Layout(SANA), Layout(), Layout(original=True)):
        # a lone missing key must not hide the layout, so any of its first modules will do
        if any(layout.find(f"{m}.weight").key in keys for m in ("patch_embed.proj", "proj_out", "caption_norm")):
            return layout
    raise ValueError(
        f"convert: {where} is no SANA transformer (first of {len(keys)} names: {min(keys, default='none')}); expected "
        "diffusers' names, those of an original .pth, or BLIP3o-NEXT's model.sana.*"
    )


def infer(shapes: Mapping[str, tuple[int, ...]], layout: Layout, where: Path) -> TransformerConfig:
    """A transformer's sizes from the shapes of its weights. What they do not tell, positions and sample size, is SANA's
    at 1024 pixels.

    Raises ValueError where a tensor that they are read from is missing, or the width is of no published SANA, whose
    number of heads is then unknown.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        piece = layout.find(name)
        if piece.key not in shapes:
            raise ValueError(f"convert: {where} has no {piece.key}, from which sizes are read; give a config.json")
        found = piece.shape(shapes[piece.key])
        if len(found) != dimensions:
            raise ValueError(f"convert: {piece.key} in {where} is {found}; expected {dimensions} dimensions")
        return found

    channels, in_channels, patch, _ = shape("patch_embed.proj.weight", 4)
    if channels not in CROSS_HEADS:
        raise ValueError(
            f"convert: {where} is {channels} wide, which tells no number of heads (known: "
            f"{', '.join(map(str, CROSS_HEADS))}); give diffusers' config.json of the transformer"
        )
    hidden = shape("transformer_blocks.0.ff.conv_point.weight", 4)[1]
    ratio = hidden / channels
    return TransformerConfig(
        in_channels=in_channels,
        out_channels=shape("proj_out.weight", 2)[0] // patch**2,
        num_attention_heads=channels // HEAD,
        attention_head_dim=HEAD,
        num_layers=layout.layers(shapes.keys()),
        num_cross_attention_heads=CROSS_HEADS[channels],
        cross_attention_head_dim=channels // CROSS_HEADS[channels],
        caption_channels=shape("caption_projection.linear_1.weight", 2)[1],
        mlp_ratio=ratio if int(ratio * channels) == hidden else (hidden + 0.5) / channels,
        patch_size=patch,
        qk_norm=layout.find("transformer_blocks.0.attn1.norm_q.weight").key in shapes,
    )


SIZES = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "caption_channels",
    "patch_size",
    "sample_size",
)
FIXED = dict(
    dropout=0.0,
    attention_bias=False,
    norm_elementwise_affine=False,
    guidance_embeds=False,
    timestep_scale=1.0,
)
"""What diffusers' class can do and this model cannot; all published SANA but Sprint have these values."""


def read_config(path: Path) -> TransformerConfig:
    """A diffusers transformer/config.json (SanaTransformer2DModel). Raises ValueError for what is not known here."""
    tree = read_settings(path)
    if (name := tree.get("_class_name", "SanaTransformer2DModel")) != "SanaTransformer2DModel":
        raise ValueError(f"convert: {path} is of {name}; expected SanaTransformer2DModel")
    known = {*SIZES, *FIXED, "out_channels", "cross_attention_dim", "mlp_ratio", "interpolation_scale", "qk_norm"}
    known |= {"guidance_embeds_scale", "norm_eps"}
    if unknown := sorted(k for k in tree if k not in known and not k.startswith("_")):
        raise ValueError(f"convert: {path}: {unknown[0]} is not known here; expected {', '.join(sorted(known))}")
    for key, value in FIXED.items():
        if tree.get(key, value) != value:
            raise ValueError(f"convert: {path}: {key} {tree[key]} is not supported; expected {value}")
    if tree.get("qk_norm") not in (None, QK_NORM):
        raise ValueError(f"convert: {path}: qk_norm {tree['qk_norm']!r} is not known; expected null or {QK_NORM!r}")
    further = ("out_channels", "mlp_ratio", "norm_eps", "interpolation_scale")
    sizes = {k: tree[k] for k in (*SIZES, *further) if k in tree}
    if sizes.get("out_channels") is None:
        sizes["out_channels"] = tree.get("in_channels", 32)
    config = filled(TransformerConfig, sizes | {"qk_norm": tree.get("qk_norm") is not None}, f"convert: {path}")
    if tree.get("cross_attention_dim", config.channels) != config.channels:
        raise ValueError(
            f"convert: {path}: cross_attention_dim {tree['cross_attention_dim']} is not the width {config.channels}"
        )
    return config


def to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """The config.json with which SanaTransformer2DModel reads the same transformer (without EMF's two embedders)."""
    return {
        "_class_name": "SanaTransformer2DModel",
        **{key: getattr(config, key) for key in SIZES},
        **FIXED,
        "out_channels": config.out_channels,
        "cross_attention_dim": config.channels,
        "mlp_ratio": config.mlp_ratio,
        "norm_eps": config.norm_eps,
        "interpolation_scale": config.interpolation_scale,
        "qk_norm": QK_NORM if config.qk_norm else None,
    }


def part_of(index: Mapping[str, Any], name: str, where: Path) -> tuple[str | None, str | None]:
    """(library, class) of a part of a pipeline, by its model_index.json; nulls where it has none. Raises ValueError
    where that is something else."""
    found = index.get(name) or [None, None]
    if not (isinstance(found, list) and len(found) == 2 and all(isinstance(x, str | None) for x in found)):
        raise ValueError(f"weights: {where}: {name} is {str(found)[:40]!r}; expected a library and a class")
    return found[0], found[1]


def dual_file(folder: Path) -> Path:
    """Where a transformer's folder has, or would have, EMF's two time embedders."""
    before = folder / "time_embed_dual.safetensors"  # exports of before 2026-11-26
    return before if before.is_file() else folder / DUAL


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of weights' settings. Raises ValueError where there is none."""
    return read_object(path, "convert")
