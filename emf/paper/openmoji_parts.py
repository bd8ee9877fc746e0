"""What is trained on a world of named pictures: flow matching from scratch on each of several text encoders, and EMF on
each of those.

The encoders are real ones beside toys, so that the paper's claim is asked of both: the better an encoder tells captions
apart, the less do few steps lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from emf.conditioning import vocabulary
from emf.config import Config
from emf.data.batches import DataConfig
from emf.data.gallery import Gallery, check_gallery, write_gallery
from emf.paper.parts import Part
from emf.recipes import openmoji, openmoji_base

FM_STEPS, EMF_STEPS = (1, 4, 30), (1, 2, 4)
WORLD, TEXTS = "world", "encoders"
CENTRES = 24
"""Clusters of the blurred encoder's word vectors."""


@dataclass(frozen=True)
class TextEncoder:
    """One of those compared."""

    channels: int
    told: str
    trained: bool = False
    """With the flow-matching base; the others are frozen."""


ENCODERS = {
    "bag of words": TextEncoder(128, "word vectors of the training captions, trained with the base", True),
    "frozen random": TextEncoder(128, "two layers of T5 at random weights, which knows the same words"),
    "blurred": TextEncoder(256, f"WordLlama's vectors, each rounded to the nearest of {CENTRES} cluster centres"),
    "WordLlama": TextEncoder(256, "static word vectors out of a language model, frozen"),
    "MiniLM": TextEncoder(384, "all-MiniLM-L6-v2, a sentence transformer of 6 layers, frozen"),
}


@dataclass(frozen=True)
class Budget:
    """How much is trained and scored, which decides how long it takes."""

    pictures: int = 64
    variants: int = 8
    """Images of each training caption."""
    base_steps: int = 1200
    emf_steps: int = 250
    batch_size: int = 32
    seeds: tuple[int, ...] = (0,)
    prompts: int = 1000
    """Held-out captions that are drawn, at most."""


FULL = Budget()
QUICK = Budget(8, 2, base_steps=3, emf_steps=2, batch_size=4, prompts=6)


def prepare(out: Path, gallery: Gallery, budget: Budget, encoders: Mapping[str, TextEncoder] | None = None) -> None:
    """Write the images to train on, and the folders of the text encoders, where they are not there yet. Raises
    ValueError where a package is missing, and where the images are damaged."""
    texts = [c.text for c in gallery.captions()[0]]
    if (out / WORLD).is_dir():
        check_gallery(out / WORLD, gallery, budget.variants, "openmoji")
    else:
        write_gallery(out / WORLD, gallery, budget.variants)
    for name, encoder in (encoders or ENCODERS).items():
        folder = out / TEXTS / name
        if folder.is_dir():
            continue
        if name in ("bag of words", "frozen random"):
            layers = 2 if name == "frozen random" else 0
            vocabulary.write_words(folder, texts, encoder.channels, layers, seed=0)
        elif name == "MiniLM":
            vocabulary.write_minilm(folder)
        else:
            vocabulary.write_wordllama(folder, CENTRES if name == "blurred" else 0, texts)


def base(out: Path, name: str, encoder: TextEncoder, seed: int, budget: Budget) -> Part:
    """Flow matching from random weights."""
    config = openmoji_base()
    config = replace(
        config,
        seed=seed,
        steps=budget.base_steps,
        trained=("transformer.", "encoder.") if encoder.trained else (),
        optim=replace(config.optim, warmup=min(50, budget.base_steps // 4), condition_lr=1.0),
    )
    return Part(f"base/{name}/{seed}", _on(config, out, name, encoder, budget))


def emf(out: Path, start: Part, name: str, encoder: TextEncoder, budget: Budget) -> Part:
    """The paper's adaptation of a base, its encoder frozen."""
    config = openmoji()
    optim = replace(config.optim, warmup=min(30, budget.emf_steps // 4))
    config = replace(config, seed=start.config.seed, steps=budget.emf_steps, optim=optim)
    return Part(f"emf/{name}/{config.seed}", _on(config, out, name, encoder, budget), start.name)


def _on(config: Config, out: Path, name: str, encoder: TextEncoder, budget: Budget) -> Config:
    """The config with its world, its text encoder and its batch."""
    return replace(
        config,
        batch_size=budget.batch_size,
        transformer=replace(config.transformer, caption_channels=encoder.channels),
        condition=replace(config.condition, folder=out / TEXTS / name),
        data=DataConfig(sources=(str(out / WORLD),), size=config.data.size),
    )


def parts(out: Path, budget: Budget, encoders: Mapping[str, TextEncoder] | None = None) -> list[Part]:
    """All runs, seed by seed; a base before what starts from it."""
    every: list[Part] = []
    for seed in budget.seeds:
        for name, encoder in (encoders or ENCODERS).items():
            start = base(out, name, encoder, seed, budget)
            every += [start, emf(out, start, name, encoder, budget)]
    return every
