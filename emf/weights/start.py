"""Where a run starts: random weights, a file, weights that are shipped, a converted folder, or its own checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from emf.config import Config
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.network.build import adapt, assemble, build
from emf.weights import checkpoints
from emf.weights.branches import add_time_branches
from emf.weights.checkpoints import saved_names
from emf.weights.converted import load_converted
from emf.weights.tensors import load_weights, read_weights

ASSETS = Path(__file__).parents[1] / "assets"
FREE = ("checkpointing", "sample_size", "dual_time")
"""Sizes that a run may choose otherwise than the folder that it starts from."""


def started(config: Config) -> TextToImage:
    """The network of a run that begins, float32 on the CPU: at the weights that config.init names, with the two time
    embedders of EMF where the config asks for them and the weights have none; at random weights where it names none.

    Raises ValueError where the weights are missing, broken, or of another network than the config's.
    """
    source = config.init
    if source is None:
        if config.objective == "meanflow" and config.condition.kind != "small":
            raise ValueError("config: init names no weights to adapt; give --init, a folder from emf convert")
        return build(config)
    if source.is_dir() and (source / "config.json").is_file():
        network = assemble(config, _converted(config, source))
    else:
        network = assemble(config, Transformer(config.transformer))
        state = read_init(source)
        if config.transformer.dual_time:
            state = add_time_branches(state, config.transformer, config.embedder_init)
        _take(network, config, state, source)
    adapt(network, config)
    return network


def resumed(config: Config, checkpoint: Path) -> TextToImage:
    """The network of a config with a checkpoint's averaged weights, float32 on the CPU. Raises ValueError where the
    checkpoint is broken or of another network."""
    network = build(config)
    _take(network, config, checkpoints.read(checkpoint), checkpoint)
    return network


def read_init(source: Path) -> dict[str, Tensor]:
    """The file of weights that config.init names, in float32. A bare name that is no file here means the one shipped in
    emf/assets. Raises ValueError where it is missing or broken."""
    shipped = ASSETS / source
    return read_weights(shipped if not source.exists() and shipped.is_file() else source)


def _take(network: TextToImage, config: Config, state: dict[str, Tensor], source: Path) -> None:
    # An encoder that was fine-tuned before is in the file, whether it is frozen now or not. From now on its weights are
    # no longer those of its folder, and checkpoints hold them.
    network.own_encoder = {name for name in state if name.startswith("encoder.")}
    load_weights(network, state, str(source), saved_names(network, config))


def _converted(config: Config, folder: Path) -> Transformer:
    """The transformer of a folder from emf convert. Raises ValueError where it is not the config's."""
    network, converted = load_converted(folder)
    there, here = asdict(converted.transformer), asdict(config.transformer)
    if differ := [k for k in here if here[k] != there[k] and k not in FREE]:
        names = ", ".join(f"--transformer.{k.replace('_', '-')} {there[k]}" for k in differ)
        raise ValueError(f"config: init {folder} is of other sizes than the recipe's; say {names}")
    if not config.transformer.dual_time:  # the branches are made anew from what will have been trained
        del network.time_embed_t, network.time_embed_r
    network.config = config.transformer
    return network
