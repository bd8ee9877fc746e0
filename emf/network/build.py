"""From a config to the network, and from files to its weights."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emf.config import Config
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.weights.branches import add_time_branches

ASSETS = Path(__file__).parents[1] / "assets"
FREE = ("checkpointing", "sample_size", "dual_time")
"""Sizes that a run may choose otherwise than the folder that it starts from."""


def build(config: Config, from_scratch: bool = False, weights: Path | None = None) -> TextToImage:
    """The network of a config, float32 on CPU. from_scratch: with config.init's weights, time branches added where
    the config asks for them. weights: a checkpoint's model.safetensors instead.

    MeanFlow trains all but the pretrained time embedding and, with freeze_encoder, the encoder; config.trained names
    less; config.lora trains adapters alone.
    """
    start = config.init if from_scratch and weights is None else None
    if from_scratch and not (start or weights) and config.objective == "meanflow" and config.condition.kind != "small":
        raise ValueError("config: init names no weights to adapt; give --init, a folder from emf convert")
    converted = start is not None and start.is_dir() and (start / "config.json").is_file()
    transformer = _converted(config, start) if converted and start else Transformer(config.transformer)
    network = TextToImage(encoder(config), transformer)
    _freeze(network, config)
    if start is not None and not converted:
        state = read_weights(start)
        if config.transformer.dual_time:
            state = add_time_branches(state, config.transformer, config.embedder_init)
        _take(network, config, state, start)
    if config.lora.rank:
        from emf.network.adapters import add_lora

        add_lora(network.transformer, config.lora)
        _freeze(network, config)
    if weights is not None:
        try:
            state = read_weights(weights)
        except ValueError as error:
            raise ValueError(
                f"checkpoint: {weights.parent} is broken ({error}); delete it to resume from one before"
            ) from None
        _take(network, config, state, weights.parent)
    return network


def _take(network: TextToImage, config: Config, state: dict[str, Tensor], source: Path) -> None:
    # an encoder that was fine-tuned before is in the file, frozen now or not, and from now on no longer its folder's
    network.own_encoder = {name for name in state if name.startswith("encoder.")}
    load_weights(network, state, str(source), saved_names(network, config))


def encoder(config: Config) -> nn.Module:
    """The text encoder of a config: the digits' own, or a pretrained one from its folder, frozen. Raises ValueError
    where its states have another width than the transformer takes."""
    c = config.condition
    if c.kind == "small":
        from emf.conditioning.small import SmallEncoder
        from emf.data.digits import WORDS

        return SmallEncoder(config.encoder, WORDS)
    from emf.conditioning.load import load

    folder = c.folder or (config.init if c.kind == "blip3o" else None)
    if folder is None:
        raise ValueError(f"config: condition.kind {c.kind} needs --condition.folder, where the encoder lies")
    further: dict[str, Any] = {"window": c.window, "scale": c.scale} if c.kind == "blip3o" else {}
    made = load(c.kind, folder, freeze=not _trains(config, "encoder."), **further)
    if made.channels != config.transformer.caption_channels:
        raise ValueError(
            f"config: {folder} gives states of {made.channels} channels, the transformer takes "
            f"{config.transformer.caption_channels} (transformer.caption_channels)"
        )
    return made


def _trains(config: Config, part: str) -> bool:
    return any(name.startswith(part) or part.startswith(name) for name in config.trained if name)


def _converted(config: Config, folder: Path) -> Transformer:
    """The transformer of a folder from emf convert. Raises ValueError where it is not the config's."""
    from emf.weights.folders import load_transformer

    network, checkpoint = load_transformer(folder)
    there, here = asdict(checkpoint.transformer), asdict(config.transformer)
    if differ := [k for k in here if here[k] != there[k] and k not in FREE]:
        names = ", ".join(f"--transformer.{k.replace('_', '-')} {there[k]}" for k in differ)
        raise ValueError(f"config: init {folder} is of other sizes than the recipe's; say {names}")
    if not config.transformer.dual_time:  # the branches are made anew from what will have been trained
        del network.time_embed_t, network.time_embed_r
    network.config = config.transformer
    return network


def _freeze(network: TextToImage, config: Config) -> None:
    if config.lora.rank:
        for name, p in network.named_parameters():
            p.requires_grad_(".lora_" in name)
        return
    if config.trained:
        names = [name for name, _ in network.named_parameters()]
        if idle := [start for start in config.trained if not any(name.startswith(start) for name in names)]:
            raise ValueError(f"config: no weight's name begins with {idle[0]} (trained); the first is {names[0]}")
        for name, p in network.named_parameters():
            p.requires_grad_(name.startswith(config.trained))
    elif config.condition.kind != "small" or config.freeze_encoder:
        network.encoder.requires_grad_(False)
    unused = ["time_embed"] if config.objective == "meanflow" else ["time_embed_t", "time_embed_r"]
    for name in unused:
        if hasattr(network.transformer, name):
            getattr(network.transformer, name).requires_grad_(False)


def saved_names(network: TextToImage, config: Config) -> set[str]:
    """The weights that a checkpoint holds: all but those of a pretrained encoder that stay as its folder has them."""
    pretrained = config.condition.kind != "small"
    return {
        name
        for name, p in network.named_parameters()
        if p.requires_grad or name in network.own_encoder or not (pretrained and name.startswith("encoder."))
    }


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first. One that is being written or removed has another name, and so
    has a copy that somebody keeps."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{7}", p.name) and p.is_dir())


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file in float32; a bare name that is no file here means the one shipped in emf/assets. Raises
    ValueError where it is missing or broken."""
    shipped = ASSETS / path
    try:
        return {
            k: v.float() for k, v in load_file(shipped if not path.exists() and shipped.is_file() else path).items()
        }
    except FileNotFoundError:
        raise ValueError(f"weights: no file {path}") from None
    except OSError as error:
        raise ValueError(f"weights: {path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is not a safetensors file: {error}") from None


def load_weights(network: nn.Module, state: dict[str, Tensor], source: str, names: set[str] | None = None) -> None:
    """Strictly: every key and shape must agree. names: of the weights that are there; None: all. Raises ValueError
    naming the first that does not."""
    own = network.state_dict() if names is None else {k: p for k, p in network.named_parameters() if k in names}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        first = f"missing {missing[0]}" if missing else f"unexpected {extra[0]}" if extra else f"shape of {shapes[0]}"
        raise ValueError(
            f"weights: {source} is of another model: {len(missing)} missing, {len(extra)} extra, "
            f"{len(shapes)} misshaped keys; {first}"
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
