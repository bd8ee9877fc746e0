"""A network with the config that made it, from a folder on disk: a run's, one of its checkpoints, an export, or what
`emf convert` wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from emf.conditioning.load import TEXT_MODELS
from emf.config import ConditionConfig, Config, LoraConfig
from emf.data.batches import DataConfig
from emf.files import filled
from emf.flow_config import FlowConfig
from emf.model.sizes import EncoderConfig, TransformerConfig
from emf.model.text_to_image import TextToImage
from emf.network.build import encoder
from emf.recipes import from_file
from emf.weights.checkpoints import SETTINGS, WEIGHTS, Read, at_newest, checkpoints, newest, while_there
from emf.weights.converted import is_base, load_converted
from emf.weights.diffusers_folder import load_exported_transformer
from emf.weights.hub import AUTOENCODER, ENCODER, hub_name, named
from emf.weights.layouts import part_of, read_settings
from emf.weights.start import for_few_steps, resumed, shipped, started
from emf.weights.tensors import load_weights, read_weights

KINDS = {model: kind for kind, model in TEXT_MODELS.items()}
KINDS |= {"Gemma2ForCausalLM": "gemma", "SmallEncoder": "small"}
"""Kinds of text encoders by their classes."""


def load(folder: Path | str, text: Path | None = None) -> tuple[Config, TextToImage]:
    """(config, network) of a run, a checkpoint, an export or a converted folder, on the CPU, in eval mode.

    text: where the pretrained text encoder lies; None: in the folder, or where the folder says. Raises ValueError where
    the folder is none of them, or a part is missing or broken."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return load_export(folder, text)
    return load_base(folder, text) if is_base(folder) else load_run(folder, text)


def weights_folder(folder: Path) -> Path:
    """Where the weights of a network lie: an export's and a converted folder's in it, else those of the newest
    checkpoint. Raises ValueError where there are none."""
    return folder if (folder / "model_index.json").is_file() or is_base(folder) else newest(folder)


def at_weights(folder: Path, read: Callable[[Path], Read]) -> Read:
    """What `read` makes of the folder where the weights of a network lie; where that is a run in training, whose
    checkpoint goes while it is read, of the next one. See weights_folder."""
    return while_there(lambda: weights_folder(folder), read)


@dataclass(frozen=True)
class Velocity:
    """A network whose instantaneous velocity is sampled: flow matching, the baseline of few-step sampling."""

    config: Config
    network: TextToImage
    source: Path
    """Where its weights lie: a folder, or a file."""
    note: str
    """Whose velocity it is, where that is not plainly the folder's that was asked for."""


def load_velocity(
    folder: Path | str, text: Path | None = None, own: tuple[Config, TextToImage, Path] | None = None
) -> Velocity:
    """What --flow-matching samples of a folder that `load` reads, on the CPU, in eval mode; text: see load. own: what
    was loaded of the folder already, and where its weights lie; it is taken where the velocity is the folder's own.

    Of a run that was trained for few steps it is the start of the run: training has moved the weights that the run's
    own velocity shares with u. Where its start is not there any more, and of a trained export, which does not know its
    own, it is what it has, and the note says so. Raises ValueError as `load` does.
    """
    folder = Path(folder)
    reason = "its start is not known"
    if not (folder / "model_index.json").is_file() and not is_base(folder):
        config = _run_config(folder, text)
        if config.objective == "meanflow":
            try:
                found = load_start(config)
                return replace(found, note=found.note or f"flow matching samples the start of {folder}, {config.init}")
            except ValueError as error:
                reason = f"its start cannot be had: {error}"
    config, network, source = own or at_weights(folder, lambda place: (*load(place, text), place))
    trained = config.objective == "meanflow"
    note = f"flow matching samples {folder}'s own velocity, which training for few steps has moved; {reason}"
    return Velocity(config, network, source, note * trained)


def load_start(config: Config) -> Velocity:
    """The flow-matching network that a run with this config, trained for few steps, started from. Raises ValueError
    where it started from random weights, or the start is not there."""
    if config.init is None:
        raise ValueError("the run started from random weights, so there is no base to compare with")
    is_run = (config.init / WEIGHTS).is_file() or checkpoints(config.init)
    if is_run and _run_config(config.init, None).objective == "meanflow":
        return load_velocity(config.init)
    sizes = replace(config.transformer, dual_time=False)
    base = replace(config, objective="flow_matching", transformer=sizes, trained=(), lora=LoraConfig())
    where = shipped(config.init)
    note = f"the start of the run, {config.init}, was trained for few steps itself, which has moved its velocity"
    source = weights_folder(where) if where.is_dir() else where
    return Velocity(base, started(base).eval(), source, note * for_few_steps(where))


def _run_config(run: Path, text: Path | None) -> Config:
    """The config of a run or a checkpoint, with its text encoder's folder where another is named."""
    config = at_newest(run, lambda checkpoint: from_file(checkpoint / SETTINGS))
    return config if text is None else replace(config, condition=replace(config.condition, folder=text))


def load_run(run: Path, text: Path | None = None) -> tuple[Config, TextToImage]:
    """(config, network with the averaged weights) of a run's folder or one of its checkpoints; text: see load."""

    def read(checkpoint: Path) -> tuple[Config, TextToImage]:
        config = _run_config(checkpoint, text)
        return config, resumed(config, checkpoint).eval()

    return at_newest(run, read)


def load_export(folder: Path, text: Path | None = None) -> tuple[Config, TextToImage]:
    """(config, network) of a folder in diffusers' layout with text parts: emf export's, or of a published SANA
    pipeline, which has no time embedders of EMF's; text: see load. Raises ValueError where a part is missing."""
    if text_parts(folder)["kind"] is None:
        raise ValueError(f"{folder} holds no text parts known here; export with --text, or from a base that has some")
    transformer = load_exported_transformer(folder / "transformer")
    config = export_config(folder, transformer.config)
    if text is not None and config.condition.kind != "small":
        config = replace(config, condition=replace(config.condition, folder=text))
    return config, TextToImage(export_encoder(folder, config), transformer).eval()


def export_config(folder: Path, transformer: TransformerConfig) -> Config:
    """The config of an export with text parts, around a transformer of these sizes. Raises ValueError where what it
    says of itself cannot be used."""
    how, file = text_parts(folder), folder / "model_index.json"
    small, told = how["kind"] == "small", read_settings(file).get("settings") or {}
    built_in = told.get("built_in", 1.0) if isinstance(told, dict) else told
    sizes = folder / "text_encoder" / "config.json"
    return Config(
        recipe="export",
        objective="meanflow" if transformer.dual_time else "flow_matching",
        transformer=transformer,
        condition=ConditionConfig(folder=None if small else folder, **how),
        encoder=filled(EncoderConfig, read_settings(sizes), f"weights: {sizes}") if small else EncoderConfig(),
        flow=filled(FlowConfig, {"guidance": built_in}, f"weights: {file}: settings.built_in"),
        data=DataConfig(vae=folder if (folder / "vae").is_dir() else None),
    )


def export_encoder(folder: Path, config: Config) -> nn.Module:
    """The text encoder of an export with this config."""
    made = encoder(config)
    if config.condition.kind == "small":
        file = folder / "text_encoder" / WEIGHTS
        load_weights(made, read_weights(file), str(file))
    return made


def text_parts(folder: Path) -> dict[str, Any]:
    """The settings of the condition that a folder in diffusers' layout has; its `kind` is None where the folder holds
    no text encoder."""
    file = folder / "model_index.json"
    index = read_settings(file)
    _, named = part_of(index, "text_encoder", file)
    how = {"kind": "blip3o" if (folder / "language_model").is_dir() else KINDS.get(str(named))}
    told = index.get("_condition") or {}
    if told:  # which names the kind too
        filled(ConditionConfig, told, f"weights: {file}: _condition")
    how |= told
    if not any((folder / name).is_dir() for name in ("text_encoder", "language_model")):
        how["kind"] = None  # an export tells of the run's, which need not go with it
    return how


def load_base(folder: Path, text: Path | None = None) -> tuple[Config, TextToImage]:
    """(config, network) of a folder from `emf convert`: the published model as it was, without time embedders that were
    made to be trained. A SANA's text encoder and autoencoder are those of the folder that it was made of, unless `text`
    names the encoder's.

    Raises ValueError where that holds none any more, or a part is missing."""
    transformer, converted = load_converted(folder)
    transformer = converted.without_made(transformer)
    origin = Path(str(converted.source.get("path", "")))
    origin = origin.parent if (origin.parent / "model_index.json").is_file() else origin
    if converted.language_model:
        condition = ConditionConfig("blip3o", text or folder)
    else:
        if there := hub_name(origin):  # of a snapshot emf convert has fetched what it needed itself
            origin = named(there, [*AUTOENCODER, *ENCODER * (text is None)], "weights")
        place = text or origin
        kind = text_parts(place)["kind"] if (place / "model_index.json").is_file() else None
        if kind is None:
            raise ValueError(
                f"{folder} holds no text encoder, and neither does {place}"
                f"{', of which it was made' * (text is None)}; convert it of the whole diffusers folder, with "
                "text_encoder and tokenizer, or name one that has them: --text"
            )
        condition = ConditionConfig(kind, place)
    config = Config(
        recipe="converted",
        objective="meanflow" if transformer.config.dual_time else "flow_matching",
        transformer=transformer.config,
        condition=condition,
        data=DataConfig(vae=origin if (origin / "vae" / "config.json").is_file() else None),
    )
    return config, TextToImage(encoder(config), transformer).eval()
