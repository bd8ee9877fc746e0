"""Plans of small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from emf.config import Config
from emf.recipes import RECIPES
from emf.train.hardware import Hardware
from emf.train.plan import Plan, plan


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A config with fields, or the fields of sections, changed."""
    return replace(
        config, **{k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    )


def small_plans(root: Path) -> Callable[..., Plan]:
    """Plans of a recipe with two blocks and, from its folder, a small language model: they take no second each."""
    folder = root / "encoder" / "language_model"
    folder.mkdir(parents=True)
    sizes = dict(model_type="qwen3", vocab_size=50, hidden_size=256, intermediate_size=768, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(sizes))

    def made(recipe: str, **changes: Any) -> Plan:
        config = RECIPES[recipe]()
        own: dict[str, Any] = dict(transformer=dict(num_layers=2), condition=dict(folder=root / "encoder"))
        return plan(changed(changed(config, own), changes), Hardware(gpus=8))

    return made
