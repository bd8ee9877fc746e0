"""A network with the config that made it, from a folder on disk: a run's, one of its checkpoints, or an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emf.config import ConditionConfig, Config
from emf.data.batches import DataConfig
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.network.build import encoder
from emf.recipes import from_file
from emf.weights.checkpoints import SETTINGS, newest
from emf.weights.layouts import DUAL, read_config, read_settings
from emf.weights.start import resumed
from emf.weights.tensors import Weights, find, load_weights, read_metadata


def load(folder: Path | str) -> tuple[Config, TextToImage]:
    """(config, network) of a run, a checkpoint or an export, on the CPU, in eval mode. Raises ValueError where the
    folder is none of them, or a part is missing or broken."""
    folder = Path(folder)
    return load_export(folder) if (folder / "model_index.json").is_file() else load_run(folder)


def load_run(run: Path) -> tuple[Config, TextToImage]:
    """(config, network with the averaged weights) of a run's folder or one of its checkpoints."""
    checkpoint = newest(run)
    config = from_file(checkpoint / SETTINGS)
    return config, resumed(config, checkpoint).eval()


def load_export(folder: Path) -> tuple[Config, TextToImage]:
    """(config, network) of a folder in diffusers' layout with text parts: emf export's, or of a published SANA
    pipeline, which has no time embedders of EMF's. Raises ValueError where a part is missing."""
    index = read_settings(folder / "model_index.json")
    kinds = {"Gemma2Model": "gemma", "Gemma2ForCausalLM": "gemma", "CLIPTextModel": "clip", "T5EncoderModel": "t5"}
    named = (index.get("text_encoder") or [None, None])[1]
    how = {"kind": "blip3o" if (folder / "language_model").is_dir() else kinds.get(named)}
    how |= index.get("_condition", {})
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


def load_exported_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The transformer folder that `emf export` wrote, with both time embedders where it has them. Raises ValueError
    where it is another."""
    dual, config = folder / DUAL, read_config(folder / "config.json")
    names = find(folder)
    if not names:
        raise ValueError(f"weights: {folder} holds none; expected diffusion_pytorch_model.safetensors")
    if dual.is_file():
        said = read_metadata(dual)
        try:
            scales: dict[str, Any] = {k: float(said[k]) for k in ("time_scale", "base_time_scale")}
        except (KeyError, ValueError):
            raise ValueError(f"{dual} does not say its time_scale and base_time_scale; export again") from None
        config = replace(config, dual_time=True, **scales)
        names.append(dual)
    weights = Weights(names)
    with torch.device("meta"):
        network = Transformer(config)
    network = network.to_empty(device="cpu").to(dtype)
    load_weights(network, {k: weights.read(k) for k in weights.entries}, str(folder))
    return network.eval()
