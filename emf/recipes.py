"""Recipes: functions that return a complete config. `emf train <recipe> --field value` overrides single fields."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from pathlib import Path

from emf import config as configs
from emf.arguments import parse, to_arguments
from emf.config import ConditionConfig, Config, OptimConfig, RunConfig, ZeroConfig
from emf.data.batches import DataConfig
from emf.flow_config import FlowConfig, MatchConfig
from emf.model.sizes import TransformerConfig

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
        optim=OptimConfig(lr=2e-3, condition_lr=0.1, warmup=0.025, betas=(0.9, 0.99), ema=0.998),
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
        optim=OptimConfig(lr=1e-3, warmup=0.06, betas=(0.9, 0.99), ema=0.99),
        run=RunConfig(save_every=100, eval_every=100),
    )


def digits_full() -> Config:
    """Stage 2 for longer: the figures under profiles/digits-full."""
    config = digits()
    return replace(
        config,
        recipe="digits-full",
        steps=3000,
        optim=replace(config.optim, warmup=1 / 30, ema=0.998),
        run=replace(config.run, save_every=200, eval_every=200),
    )


def digits_one_step() -> Config:
    """Stage 2 for one step and few: guidance inside the target, the tangent along the network's own velocity, and in
    the second half of the run distribution matching of pictures of 1, 2 and 4 steps."""
    config = digits()
    return replace(
        config,
        recipe="digits-one-step",
        steps=1000,
        flow=replace(config.flow, guidance=1.25, along="network"),
        match=MatchConfig(weight=1.0, share=0.375, steps=(1, 2, 4), begin=0.5),
        optim=replace(config.optim, ema=0.995),
        run=replace(config.run, save_every=100, eval_every=200),
    )


def openmoji_base() -> Config:
    """Flow matching from scratch on a world of named pictures; needs --condition.folder and --data.sources. `emf
    openmoji` makes both, and trains it on several text encoders."""
    return Config(
        recipe="openmoji-base",
        objective="flow_matching",
        steps=1000,
        batch_size=64,
        # pixels, as the digits: 3 channels of 24 x 24, patches of 4
        transformer=replace(
            _digits_transformer(dual_time=False), num_layers=4, caption_channels=384, patch_size=4, sample_size=24
        ),
        condition=ConditionConfig(kind="text"),
        data=DataConfig(size=24),
        flow=FlowConfig(mean=(0.2, 0.2), spread=(1.2, 1.2), share=(0.0, 0.0)),
        optim=OptimConfig(lr=2e-3, warmup=0.05, betas=(0.9, 0.99), ema=0.99),
        run=RunConfig(save_every=200),
    )


def openmoji() -> Config:
    """The paper's adaptation of openmoji-base, its text encoder frozen; needs --init, a run of that, and what that
    needs."""
    config = openmoji_base()
    return replace(
        config,
        recipe="openmoji",
        objective="meanflow",
        embedder_init="preserve",
        steps=300,
        transformer=replace(config.transformer, dual_time=True, time_scale=10.0),
        flow=FlowConfig(),
        optim=replace(config.optim, lr=1e-3, warmup=0.06),
        run=RunConfig(save_every=100),
    )


EMF_TRAINS = ("transformer.transformer_blocks.", "transformer.time_embed_", "transformer.scale_shift_table")
"""Beginnings of the names of what EMF trains: the blocks, the two time embedders, the output's table."""
SAMPLES = 170_000
"""Of EMF's training set (arXiv 2604.18168)."""
BATCH = 128
"""Samples a step of EMF: 8 GPUs x 1 x 16."""


def sana_1600m() -> Config:
    """EMF: SANA-1.5 1.6B on a frozen BLIP3o-NEXT, as the released script has it; needs --init and --data.sources."""
    return Config(
        recipe="sana-1.5-1.6b",
        trained=EMF_TRAINS,
        steps=30 * SAMPLES // BATCH,
        batch_size=BATCH,
        transformer=TransformerConfig(dual_time=True),
        condition=ConditionConfig(kind="blip3o"),
        # the release averages no weights
        optim=OptimConfig(lr=5e-5, warmup=0.03, ema=0.0),
        zero=ZeroConfig(stage=2, dtype="bfloat16", accumulation=16),
        run=RunConfig(save_every=1000),
    )


def sana_1600m_paper() -> Config:
    """The same with what is told of the paper, learning rate 1e-5, 150 epochs; needs --init and --data.sources."""
    config = sana_1600m()
    optim = replace(config.optim, lr=1e-5)
    return replace(config, recipe="sana-1.5-1.6b-paper", steps=150 * SAMPLES // BATCH, optim=optim)


def blip3o_next_3b() -> Config:
    """BLIP3o-NEXT's language model and connector tuned too, with its own loss; needs --init and --data.sources."""
    config = sana_1600m()
    return replace(
        config,
        recipe="blip3o-next-3b",
        trained=(*EMF_TRAINS, "encoder."),
        condition=ConditionConfig(kind="blip3o", ar_weight=1.0),
        optim=replace(config.optim, condition_lr=0.1),
        zero=replace(config.zero, stage=3),
    )


def sana_gemma() -> Config:
    """SANA-1.5 with its own Gemma-2, frozen (Table 5); needs --init, --condition.folder and --data.sources.

    Table 5's rows: `--objective flow_matching --transformer.no-dual-time --trained transformer.` fine-tunes the
    base on the same data; with `--trained transformer. encoder.` Gemma too. From the weights of either
    (--init .../model.safetensors) this recipe then adapts to MeanFlow, Gemma frozen.
    """
    return replace(sana_1600m(), recipe="sana-1.5-gemma", condition=ConditionConfig(kind="gemma"))


RECIPES = {
    "digits-base": digits_base,
    "digits": digits,
    "digits-full": digits_full,
    "digits-one-step": digits_one_step,
    "openmoji-base": openmoji_base,
    "openmoji": openmoji,
    "sana-1.5-1.6b": sana_1600m,
    "sana-1.5-1.6b-paper": sana_1600m_paper,
    "blip3o-next-3b": blip3o_next_3b,
    "sana-1.5-gemma": sana_gemma,
}


def from_file(path: Path) -> Config:
    """The config in a config.json. Raises ValueError where there is no such file, and on fields that it does not
    know."""
    tree = configs.read(path)
    if not isinstance(tree.get("recipe"), str) or tree["recipe"] not in RECIPES:
        raise ValueError(f"config: {path}: recipe is {tree.get('recipe')!r}; expected one of {', '.join(RECIPES)}")
    default = RECIPES[tree["recipe"]]()
    sections = [("", tree, default)]
    sections += [
        (f"{k}.", v, getattr(default, k)) for k, v in tree.items() if isinstance(v, dict) and hasattr(default, k)
    ]
    for start, section, known in sections:
        if strange := [key for key in section if not hasattr(known, key)]:
            raise ValueError(f"config: {path}: {start}{strange[0]} is not known; remove it")
    if odd := [
        key for key, value in tree.items() if is_dataclass(getattr(default, key)) and not isinstance(value, dict)
    ]:
        raise ValueError(f"config: {path}: {odd[0]} is {tree[odd[0]]!r}; expected a section, an object")
    if helped := [key for key, value in tree.items() if "--help" in str(value)]:
        raise ValueError(f"config: {path}: {helped[0]} holds --help, which is no value")
    try:  # as arguments, so that the one parser checks names, types and values
        config: Config = parse(Config, to_arguments(tree), "emf train RECIPE", default=default)
        return config
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from None
