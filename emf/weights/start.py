"""Where a run starts: random weights, a file, weights that are shipped, a converted folder, or its own checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf.config import Config
from emf.files import filled, parse_json
from emf.idle import chosen
from emf.model.sizes import EncoderConfig, TransformerConfig
from emf.model.state import read_state
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.network.build import adapt, assemble, build
from emf.recipes import from_file
from emf.weights import checkpoints
from emf.weights.adapter_settings import merged
from emf.weights.branches import PREFIX, SCALES, add_time_branches, has_time_branches, scales
from emf.weights.checkpoints import MADE, SETTINGS, WEIGHTS, saved_names
from emf.weights.converted import is_base, load_converted, read_converted
from emf.weights.diffusers_folder import exported_sizes, load_exported_transformer
from emf.weights.layouts import read_settings
from emf.weights.tensors import PICKLES, Weights, load_weights, read_metadata

RELEASED = "emf"
"""Under which name the header of a released file has what it says of its run."""
ASSETS = Path(__file__).parents[1] / "assets"
FREE = ("checkpointing", "sample_size", "dual_time")
"""Sizes that a run may choose otherwise than the folder that it starts from."""


@dataclass(frozen=True)
class Said:
    """What a released file says of its run: the sizes of the parts, the geometry of the digits' pictures."""

    transformer: dict[str, Any]
    encoder: dict[str, Any]
    world: dict[str, Any]
    kind: str
    """Of the text encoder."""

    @classmethod
    def of(cls, config: Config) -> Said:
        """What would be said of the run of a config."""
        return cls(asdict(config.transformer), asdict(config.encoder), asdict(config.world), config.condition.kind)


def started(config: Config, dtype: torch.dtype = torch.float32) -> TextToImage:
    """The network of a run that begins, in a dtype on the CPU: at the weights that config.init names, with the two time
    embedders of EMF where the config asks for them and the weights have none; at random weights where it names none.

    Raises ValueError where the weights are missing, broken, or of another network than the config's.
    """
    source = config.init
    if source is None:
        if config.objective == "meanflow" and config.condition.kind != "small":
            raise ValueError("config: init names no weights to adapt; give --init, a folder from emf convert")
        return build(config, dtype)
    if is_base(source):
        network = assemble(config, _converted(config, source, dtype))
    else:
        with torch.device("meta"):
            transformer = Transformer(config.transformer).to(dtype)
        network = assemble(config, transformer)
        state = _read_folder(source, config) if source.is_dir() else _read_file(source, config)
        if not config.transformer.dual_time:  # as of a converted folder: they are made anew from what is trained now
            state = {k: v for k, v in state.items() if not k.startswith((f"{PREFIX}_t.", f"{PREFIX}_r."))}
        else:
            if has_time_branches(state):
                _refuse_embedder_init(source, config)
            # the second embedder is fitted in float32, whatever the file is in
            state = {k: v.float() if k.startswith(PREFIX) else v for k, v in state.items()}
            state = add_time_branches(state, config.transformer, config.embedder_init)
        _take(network, config, state, source)
    adapt(network, config)
    return network


def resumed(config: Config, checkpoint: Path, dtype: torch.dtype = torch.float32) -> TextToImage:
    """The network of a config with a checkpoint's averaged weights, in a dtype on the CPU. Raises ValueError where the
    checkpoint is broken or of another network."""
    with torch.device("meta"):
        transformer = Transformer(config.transformer).to(dtype)
    network = assemble(config, transformer)
    adapt(network, config)
    _take(network, config, checkpoints.read(checkpoint), checkpoint)
    return network


def sizes_of(source: Path, config: Config) -> dict[str, Any]:
    """The settings, by section of a config, that the folder or file to start from knows: the transformer's sizes, and
    the scale of its times where it has EMF's two time embedders; of the digits also the text encoder's sizes, and of a
    run on them the geometry of its pictures, for a config that has those. Of a file that says nothing, none. Raises
    ValueError where a folder holds nothing to start from."""
    told, small = dict[str, Any](), config.condition.kind == "small"
    if is_base(source):
        theirs = read_converted(source).transformer
    elif (source / "model_index.json").is_file():
        theirs = exported_sizes(source / "transformer")
        if small and (sizes := source / "text_encoder" / "config.json").is_file():
            told |= {"encoder": asdict(filled(EncoderConfig, read_settings(sizes), f"weights: {sizes}"))}
    else:
        said = said_by(source) if source.is_file() else Said.of(_run_at(source))
        if said is None:
            return {}
        theirs = filled(TransformerConfig, said.transformer, f"weights: {source}: transformer")
        if said.kind == "small" and small:
            told |= {"encoder": said.encoder, "world": said.world}
    own = ("checkpointing", "dual_time") if theirs.dual_time else ("checkpointing", "dual_time", "time_scale")
    return told | {"transformer": {k: v for k, v in asdict(theirs).items() if k not in own}}


def with_encoder(config: Config) -> Config:
    """The config with the folder of the pretrained text encoder, where what config.init names has it, be it a converted
    folder, an export or a run: a run does not hold what it did not train."""
    source, c = config.init, config.condition
    if source is None or c.kind == "small" or c.folder is not None or not source.is_dir():
        return config
    folder: Path | None = source
    if is_base(source):
        folder = source if c.kind == "blip3o" else None
    elif not (source / "model_index.json").is_file():
        theirs = _config_at(source)
        folder = theirs.text_folder if theirs.condition.kind == c.kind else None
    return replace(config, condition=replace(c, folder=folder))


def _read_folder(source: Path, config: Config) -> dict[str, Tensor]:
    """The weights of a run, a checkpoint or an export that a run starts from, low-rank adapters merged; of an export on
    the digits with its text encoder. Raises ValueError where the folder is none of them, or has other sizes than the
    config's."""
    if (source / "model_index.json").is_file():
        transformer = load_exported_transformer(source / "transformer")
        _check_sizes(source, transformer.config, config)
        state = {f"transformer.{k}": v for k, v in transformer.state_dict().items()}
        if config.condition.kind == "small" and (encoder := source / "text_encoder" / WEIGHTS).is_file():
            state |= {f"encoder.{k}": v for k, v in read_state(encoder).items()}
        return state
    _run_at(source)
    theirs, state = checkpoints.at_newest(source, read_merged)
    _check_sizes(source, theirs.transformer, config)
    return state


def read_merged(checkpoint: Path) -> tuple[Config, dict[str, Tensor]]:
    """(config, averaged weights) of a checkpoint, low-rank adapters merged. Raises ValueError where it is broken."""
    config = from_file(checkpoint / SETTINGS)
    return config, merged(read_state(checkpoint / WEIGHTS), config.lora.scale)


def said_of(config: Config) -> dict[str, str]:
    """The header of a released file: its time scales, and what it says of its run."""
    return scales(config.transformer) | {RELEASED: json.dumps(asdict(Said.of(config)))}


def said_by(file: Path) -> Said | None:
    """What a file of weights says of its run: a checkpoint's by the config beside it, a released one by its header.
    None where nothing does. Raises ValueError where that cannot be used."""
    if _of_checkpoint(file):
        return Said.of(from_file(file.parent / SETTINGS))
    header = {} if file.suffix in PICKLES else read_metadata(file)
    where = f"weights: {RELEASED} in the header of {file}"
    return filled(Said, parse_json(header[RELEASED], where), where) if RELEASED in header else None


def for_few_steps(source: Path) -> bool:
    """Whether what a run starts from, a folder or a file, was trained for few steps before: its time embedders are
    EMF's."""
    if source.is_file():
        return any(f"{PREFIX}_t." in name for name in Weights([source]).entries)
    if is_base(source):
        return read_converted(source).made is None
    if (source / "model_index.json").is_file():
        return exported_sizes(source / "transformer").dual_time
    return _run_at(source).objective == "meanflow"


def check_base(config: Config) -> None:
    """Raises ValueError where the distribution-matching term would ask a start that was trained for few steps; one that
    is not here is no fault yet."""
    if not config.match.weight or config.init is None:
        return
    source = shipped(config.init)
    if source.exists() and for_few_steps(source):
        raise ValueError(f"config: match.weight needs an init of flow matching; {config.init} is one of few steps")


def _of_checkpoint(file: Path) -> bool:
    """Whether a file of weights lies in a checkpoint, beside its config."""
    return file.name == WEIGHTS and (file.parent / MADE).is_file()


def _read_file(source: Path, config: Config) -> dict[str, Tensor]:
    """The weights of a file that a run starts from, low-rank adapters merged. Raises ValueError where it is missing or
    broken, has adapters of which nothing says how they are merged, and where a checkpoint's config.json beside it, or
    the file's own header, tells of other sizes or time scales."""
    if _of_checkpoint(source):
        theirs, state = read_merged(source.parent)
        _check_sizes(source, theirs.transformer, config)
        return state
    state = read_init(source)
    if source.is_file() and (said := said_by(source)) is not None:
        _check_sizes(source, filled(TransformerConfig, said.transformer, f"weights: {source}: transformer"), config)
        return state
    if lone := next((name for name in state if ".lora_" in name), None):
        raise ValueError(
            f"config: init {source} holds adapters, {lone} the first, and not their scale; give the run's folder, or "
            "release it again"
        )
    if source.is_file() and has_time_branches(state):
        scale = {k: float(v) for k, v in read_metadata(source).items() if k in SCALES}
        _check_sizes(source, replace(config.transformer, **scale), config)  # type: ignore[arg-type]
    return state


def _refuse_embedder_init(source: Path, config: Config) -> None:
    """Raises ValueError where a way to make time embedders was chosen for weights that have trained ones."""
    if "embedder_init" in chosen(config):
        raise ValueError(
            f"config: embedder_init {config.embedder_init} has no effect: init {source} has its time embedders "
            "already; leave it out"
        )


def _run_at(source: Path) -> Config:
    """The config of a run, or of one of its checkpoints. Raises ValueError where the folder is neither."""
    if not (source / WEIGHTS).is_file() and not checkpoints.checkpoints(source):
        raise ValueError(
            f"weights: {source} is neither a run with a checkpoint, nor from emf convert or emf export; give one of "
            "these, or a file of weights"
        )
    return _config_at(source)


def _config_at(run: Path) -> Config:
    return checkpoints.at_newest(run, lambda checkpoint: from_file(checkpoint / SETTINGS))


def read_init(source: Path) -> dict[str, Tensor]:
    """The file of weights that config.init names, as they are in it. Raises ValueError where it is missing or
    broken."""
    return read_state(shipped(source))


def shipped(source: Path) -> Path:
    """What config.init names: a bare name that is no file here means the one shipped in emf/assets."""
    ours = ASSETS / source
    return ours if not source.exists() and ours.is_file() else source


def _take(network: TextToImage, config: Config, state: dict[str, Tensor], source: Path) -> None:
    # An encoder that was fine-tuned before is in the file, whether it is frozen now or not. From now on its weights are
    # no longer those of its folder, and checkpoints hold them.
    network.own_encoder = {name for name in state if name.startswith("encoder.")}
    load_weights(network, state, str(source), saved_names(network, config))


def _converted(config: Config, folder: Path, dtype: torch.dtype) -> Transformer:
    """The transformer of a folder from emf convert. Raises ValueError where it is not the config's."""
    network, converted = load_converted(folder, dtype)
    _check_sizes(folder, converted.transformer, config)
    if not config.transformer.dual_time:  # the branches are made anew from what will have been trained
        del network.time_embed_t, network.time_embed_r
    elif converted.made is None:
        _refuse_embedder_init(folder, config)
    elif converted.made != config.embedder_init:
        raise ValueError(
            f"config: embedder_init {config.embedder_init}, but those of init {folder} were made by {converted.made}; "
            f"say --embedder-init {converted.made}, or convert with --embedder-init {config.embedder_init}"
        )
    network.config = config.transformer
    return network


def _check_sizes(source: Path, theirs: TransformerConfig, config: Config) -> None:
    """Raises ValueError where weights are of other sizes than the config's, or of other time scales."""
    there, here = asdict(theirs), asdict(config.transformer)
    free = FREE if theirs.dual_time and config.transformer.dual_time else (*FREE, "time_scale")
    if differ := [k for k in here if here[k] != there[k] and k not in free]:
        names = ", ".join(f"--transformer.{k.replace('_', '-')} {there[k]}" for k in differ)
        raise ValueError(f"config: init {source} is of other sizes than the config's; say {names}")
