"""The transformer of a folder in diffusers' layout, read: emf.weights.export says what is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emf.model.sizes import TransformerConfig
from emf.model.transformer import Transformer
from emf.weights.adapter_settings import STAMP
from emf.weights.branches import SCALES
from emf.weights.layouts import dual_file, read_config
from emf.weights.tensors import Weights, find, load_weights, read_metadata


def exported_sizes(folder: Path) -> TransformerConfig:
    """The sizes of the transformer in such a folder, with the scales of its time embedders. Raises ValueError where
    they are not said."""
    dual, config = dual_file(folder), read_config(folder / "config.json")
    if not dual.is_file():
        return config
    said = read_metadata(dual)
    try:
        scales: dict[str, Any] = {k: float(said[k]) for k in SCALES}
    except (KeyError, ValueError):
        raise ValueError(f"{dual} does not say its time_scale and base_time_scale; export again") from None
    try:
        return replace(config, dual_time=True, **scales)
    except ValueError as error:
        raise ValueError(f"{dual}: {error}") from None


def load_exported_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The transformer folder that `emf export` wrote, with both time embedders where it has them. Raises ValueError
    where it is another."""
    config, names = exported_sizes(folder), find(folder)
    if not names:
        raise ValueError(f"weights: {folder} holds none; expected diffusion_pytorch_model.safetensors")
    dual = [dual_file(folder)] * config.dual_time
    weights, said = Weights([*names, *dual]), read_metadata(*dual) if dual else {}
    with torch.device("meta"):
        network = Transformer(config)
    network = network.to_empty(device="cpu").to(dtype)
    load_weights(network, {k: weights.read(k) for k in weights.entries}, str(folder))
    network.adapters = tuple(said.get(STAMP, "").split())
    return network.eval()
