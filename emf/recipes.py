"""Recipes: functions that return a complete config. `emf train <recipe> --field value` overrides single fields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro

from emf import config as configs
from emf.config import Config, OptimConfig, RunConfig
from emf.flow import FlowConfig
from emf.model import TransformerConfig

BASE = Path("digits-base.safetensors")  # shipped in emf/assets; by name, so that config.json holds on any machine


def _digits_transformer(dual_time: bool) -> TransformerConfig:
    # Pixels, no autoencoder: 3 channels of 18 x 18, patches of 2 (a glyph is 4 x 4 patches).
    return TransformerConfig(
        in_channels=3,
        out_channels=3,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=5,
        num_cross_attention_heads=2,
        cross_attention_head_dim=64,
        caption_channels=128,
        patch_size=2,
        sample_size=18,
        interpolation_scale=1.0,
        dual_time=dual_time,
    )


def digits_base() -> Config:
    """Stage 1: flow matching from scratch, encoder and transformer together. Makes the shipped base."""
    return Config(
        recipe="digits-base",
        objective="flow_matching",
        steps=4000,
        batch_size=64,
        transformer=_digits_transformer(dual_time=False),
        flow=FlowConfig(mean=(0.2, 0.2), spread=(1.2, 1.2), share=(0.0, 0.0)),
        optim=OptimConfig(lr=2e-3, condition_lr=0.1, warmup=100, betas=(0.9, 0.99), ema=0.998),
        run=RunConfig(save_every=200),
    )


def digits() -> Config:
    """Stage 2: the paper's adaptation of the base, in minutes. What `make demo` runs."""
    return Config(
        recipe="digits",
        init=BASE,
        # not the paper's copy at scale 1: see profiles/LOG.md
        embedder_init="preserve",
        freeze_encoder=True,
        steps=500,
        batch_size=64,
        transformer=replace(_digits_transformer(dual_time=True), time_scale=10.0),
        optim=OptimConfig(lr=1e-3, warmup=30, betas=(0.9, 0.99), ema=0.99),
        run=RunConfig(save_every=100, eval_every=100),
    )


def digits_full() -> Config:
    """Stage 2 for longer: the figures under profiles/digits-full."""
    config = digits()
    return replace(
        config,
        recipe="digits-full",
        steps=3000,
        optim=replace(config.optim, warmup=100, ema=0.998),
        run=replace(config.run, save_every=200, eval_every=200),
    )


RECIPES = {"digits-base": digits_base, "digits": digits, "digits-full": digits_full}


def from_file(path: Path) -> Config:
    """The config in a config.json. Raises ValueError where there is no such file, and on fields that it does not
    know."""
    tree = configs.read(path)
    if tree.get("recipe") not in RECIPES:
        raise ValueError(f"config: {path}: recipe is {tree.get('recipe')!r}; expected one of {', '.join(RECIPES)}")
    default = RECIPES[tree["recipe"]]()
    # as arguments, so that the one parser checks names, types and values
    style = (tyro.conf.FlagConversionOff,)
    try:
        return configs.one_line(
            tyro.cli, Config, args=configs.to_arguments(tree), default=default, prog="emf train RECIPE", config=style
        )
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from None
