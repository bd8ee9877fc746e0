"""Sizes of a transformer, from the shapes of its weights and from diffusers' config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
import sana

from emf.model.transformer import Transformer, TransformerConfig
from emf.weights.layouts import SANA, Layout, infer, read_config


@pytest.fixture(scope="module")
def theirs() -> Any:
    return sana.diffusers_model()


PUBLISHED = {
    "0.6B": dict(num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72),
    "1.6B": dict(num_layers=20),
    "4.8B": dict(num_layers=60),
}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kind", ["diffusers", "blip3o", "pth"])
def test_published_sizes_are_read_from_shapes(size: str, qk_norm: bool, kind: str) -> None:
    config = TransformerConfig(**PUBLISHED[size], qk_norm=qk_norm)
    layout = {"diffusers": Layout(), "blip3o": Layout(SANA), "pth": Layout(original=True)}[kind]
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    if kind == "pth":
        model = type("Model", (), {"state_dict": lambda self: state, "config": config})()
        shapes = {k: tuple(v.shape) for k, v in sana.original_state(model).items()}
    else:
        shapes = {layout.prefix + k: tuple(v.shape) for k, v in state.items()}
    assert infer(shapes, layout, Path("x")) == config


def test_read_config_and_its_inverse(tmp_path: Path, theirs: Any) -> None:
    theirs.save_config(tmp_path)
    config = read_config(tmp_path / "config.json")
    assert config == TransformerConfig(**sana.OURS)
