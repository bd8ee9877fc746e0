"""A tiny network of the digits' world with random weights, and a folder that holds it as a run saves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from emf import config as configs
from emf.config import Config
from emf.model.text_to_image import TextToImage
from emf.network.build import build
from emf.recipes import digits


def small_config() -> Config:
    config = digits()
    sizes: dict[str, Any] = dict(num_layers=1, num_attention_heads=1, num_cross_attention_heads=1)
    sizes |= dict(cross_attention_head_dim=32, patch_size=6)
    return replace(config, transformer=replace(config.transformer, **sizes))


def small_network(config: Config, seed: int = 0) -> TextToImage:
    torch.manual_seed(seed)
    network = build(replace(config, init=None))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network.eval()


def small_run(folder: Path, seed: int = 0) -> Path:
    config = small_config()
    network = small_network(config, seed)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(configs.to_json(config))
    return folder
