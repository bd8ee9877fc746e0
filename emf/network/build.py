"""From a config to the network: its architecture, its text encoder, its adapters, and what of it is trained. No weights
are read here but those of a pretrained text encoder; emf.weights.start reads the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from emf.config import Config, LoraConfig
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.recipes import EMF_TRAINS


def build(config: Config, dtype: torch.dtype = torch.float32, empty: bool = False) -> TextToImage:
    """The network of a config in a dtype on the CPU, its transformer at random weights.

    empty: pretrained weights and the transformer's, whose values come from elsewhere, are on the meta device.
    MeanFlow trains all but the pretrained time embedding and, with freeze_encoder, the encoder; config.trained names
    less; with config.lora adapters are trained in the place of the blocks' weights, see choose_trained.
    """
    with torch.device("meta" if empty else "cpu"):
        transformer = Transformer(config.transformer).to(dtype)
    network = assemble(config, transformer, empty)
    adapt(network, config)
    return network


def assemble(config: Config, transformer: Transformer, empty: bool = False) -> TextToImage:
    """The network of a config around a transformer that there is already, whose dtype its text encoder gets; empty: see
    build. It has no adapters yet: they come on top of whatever weights it starts from, see adapt."""
    network = TextToImage(encoder(config, transformer.proj_out.weight.dtype, empty), transformer)
    choose_trained(network, replace(config, lora=LoraConfig()))
    return network


def adapt(network: TextToImage, config: Config) -> None:
    """Low-rank adapters in place, where the config asks for some; from then on they are trained, and what
    choose_trained leaves beside them."""
    if config.lora.rank:
        from emf.network.adapters import add_lora

        add_lora(network.transformer, config.lora)
        choose_trained(network, config)


def encoder(config: Config, dtype: torch.dtype = torch.float32, empty: bool = False) -> nn.Module:
    """The text encoder of a config: the digits' own, or a pretrained one from its folder, frozen. Raises ValueError
    where its states have another width than the transformer takes."""
    c = config.condition
    if c.kind == "small":
        from emf.conditioning.small import SmallEncoder
        from emf.data.digits import WORDS

        return SmallEncoder(config.encoder, WORDS).to(dtype)
    from emf.conditioning.load import load

    folder = config.text_folder
    if folder is None:
        raise ValueError(f"config: condition.kind {c.kind} needs --condition.folder, where the encoder lies")
    if not folder.is_dir():
        raise ValueError(
            f"config: no folder {folder}, where the {c.kind} text encoder should lie; if it was moved, say where to: "
            "--condition.folder for emf train, --text for the other commands"
        )
    further: dict[str, Any] = {"window": c.window, "scale": c.scale} if c.kind == "blip3o" else {}
    frozen = not _trains(config, "encoder.")
    made = load(c.kind, folder, dtype=dtype, freeze=frozen, empty=empty, **further)
    if made.channels != config.transformer.caption_channels:
        raise ValueError(
            f"config: {folder} gives states of {made.channels} channels, the transformer takes "
            f"{config.transformer.caption_channels} (transformer.caption_channels)"
        )
    return made


def _trains(config: Config, part: str) -> bool:
    return any(name.startswith(part) or part.startswith(name) for name in config.trained if name)


def choose_trained(network: TextToImage, config: Config) -> None:
    """Mark what the config trains by requires_grad.

    Adapters are trained in the place of the blocks' weights. What else config.trained names is trained in full, and
    where it names nothing what EMF trains: a base whose time embedders stay copies cannot become a flow map. Raises
    ValueError where config.trained names no weight, or none that is trained in full beside adapters.
    """
    lora, trained = config.lora.rank > 0, config.trained
    names = [n for n, _ in network.named_parameters() if not (lora and _left_to_adapters(n))]
    if idle := [start for start in trained if not any(name.startswith(start) for name in names)]:
        beside = " beside adapters" if lora else ""
        raise ValueError(f"config: no weight's name begins with {idle[0]} (trained{beside}); the first is {names[0]}")
    if lora or trained:
        full = {name for name in names if name.startswith(trained or EMF_TRAINS)}
        for name, p in network.named_parameters():
            p.requires_grad_(name in full or ".lora_" in name)
    elif config.condition.kind != "small" or config.freeze_encoder:
        network.encoder.requires_grad_(False)
    unused = ["time_embed"] if config.objective == "meanflow" else ["time_embed_t", "time_embed_r"]
    for name in unused:
        if hasattr(network.transformer, name):
            getattr(network.transformer, name).requires_grad_(False)


def _left_to_adapters(name: str) -> bool:
    """Whether a weight is not trained itself where there are adapters: one that has an adapter, and of a block all but
    its table, which is no layer and can have none."""
    block = name.startswith("transformer.transformer_blocks.") and not name.endswith(".scale_shift_table")
    return block or ".base_layer." in name
