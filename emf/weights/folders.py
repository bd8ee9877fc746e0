"""A network with the config that made it, from a folder on disk: a run's, one of its checkpoints, an export, or what
`emf convert` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emf.config import ConditionConfig, Config
from emf.data.batches import DataConfig
from emf.files import filled
from emf.model.text_to_image import TextToImage
from emf.network.build import encoder
from emf.recipes import from_file
from emf.weights.checkpoints import SETTINGS, newest
from emf.weights.converted import is_base, load_converted
from emf.weights.diffusers_folder import load_exported_transformer
from emf.weights.layouts import part_of, read_settings
from emf.weights.start import resumed

KINDS = {"Gemma2Model": "gemma", "Gemma2ForCausalLM": "gemma", "CLIPTextModel": "clip", "T5EncoderModel": "t5"}
"""Kinds of text encoders by transformers' classes."""


def load(folder: Path | str) -> tuple[Config, TextToImage]:
    """(config, network) of a run, a checkpoint, an export or a converted folder, on the CPU, in eval mode. Raises
    ValueError where the folder is none of them, or a part is missing or broken."""
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return load_export(folder)
    return load_base(folder) if is_base(folder) else load_run(folder)


def weights_folder(folder: Path) -> Path:
    """Where the weights of a network lie: an export's and a converted folder's in it, else those of the newest
    checkpoint. Raises ValueError where there are none."""
    return folder if (folder / "model_index.json").is_file() or is_base(folder) else newest(folder)


def load_run(run: Path) -> tuple[Config, TextToImage]:
    """(config, network with the averaged weights) of a run's folder or one of its checkpoints."""
    checkpoint = newest(run)
    config = from_file(checkpoint / SETTINGS)
    return config, resumed(config, checkpoint).eval()


def load_export(folder: Path) -> tuple[Config, TextToImage]:
    """(config, network) of a folder in diffusers' layout with text parts: emf export's, or of a published SANA
    pipeline, which has no time embedders of EMF's. Raises ValueError where a part is missing."""
    how = text_parts(folder)
    if how["kind"] in (None, "small"):
        raise ValueError(f"{folder} holds no text parts known here; export with --text, or from a base that has some")
    transformer = load_exported_transformer(folder / "transformer")
    config = Config(
        recipe="export",
        objective="meanflow" if transformer.config.dual_time else "flow_matching",
        transformer=transformer.config,
        condition=ConditionConfig(folder=folder, **how),  # type: ignore[arg-type]
        data=DataConfig(vae=folder if (folder / "vae").is_dir() else None),
    )
    return config, TextToImage(encoder(config), transformer).eval()


def text_parts(folder: Path) -> dict[str, Any]:
    """The settings of the condition that a folder in diffusers' layout has; its `kind` is None where there is none."""
    file = folder / "model_index.json"
    index = read_settings(file)
    _, named = part_of(index, "text_encoder", file)
    how = {"kind": "blip3o" if (folder / "language_model").is_dir() else KINDS.get(str(named))}
    told = index.get("_condition") or {}
    if told:  # which names the kind too
        filled(ConditionConfig, told, f"weights: {file}: _condition")
    return how | told


def load_base(folder: Path) -> tuple[Config, TextToImage]:
    """(config, network) of a folder from `emf convert`: the published model as it was, without time embedders that were
    made to be trained. A SANA's text encoder and autoencoder are those of the folder that it was made of.

    Raises ValueError where that holds none any more, or a part is missing."""
    transformer, converted = load_converted(folder)
    transformer = converted.without_made(transformer)
    origin = Path(str(converted.source.get("path", "")))
    origin = origin.parent if (origin.parent / "model_index.json").is_file() else origin
    if converted.language_model:
        condition = ConditionConfig("blip3o", folder)
    else:
        there = (origin / "model_index.json").is_file()
        kind = text_parts(origin)["kind"] if there else None
        if kind is None:
            raise ValueError(
                f"{folder} holds no text encoder, and neither does {origin}, of which it was made; convert it of the "
                "whole diffusers folder, with text_encoder and tokenizer"
            )
        condition = ConditionConfig(kind, origin)
    config = Config(
        recipe="converted",
        objective="meanflow" if transformer.config.dual_time else "flow_matching",
        transformer=transformer.config,
        condition=condition,
        data=DataConfig(vae=origin if (origin / "vae" / "config.json").is_file() else None),
    )
    return config, TextToImage(encoder(config), transformer).eval()
