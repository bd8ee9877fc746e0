"""Text encoders on named pictures as a study: what a row of its results.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from emf.analyze.choices import Shortening
from emf.analyze.disentanglement import usable
from emf.data.gallery import Caption, Gallery
from emf.evaluate.picture_retrieval import Retrieval
from emf.files import fits, misfit
from emf.paper.found import MEASURES
from emf.paper.openmoji_parts import EMF_STEPS, FM_STEPS, Budget, TextEncoder, parts
from emf.paper.record import ENCODER, SCORES, Column, Study


def study(out: Path, gallery: Gallery, budget: Budget, encoders: Mapping[str, TextEncoder] | None = None) -> Study:
    """Its rows have scores, {steps: the rank of the picture asked for, by caption}, and of a base its encoder,
    {measure: values by caption}."""
    asked, values = held_out(gallery, budget), {name: len(of) for name, of in measured(gallery).items()}
    columns = {
        "scores": Column(SCORES, partial(odd_ranks, captions=len(asked), pictures=len(gallery))),
        "encoder": Column(ENCODER, partial(odd_measures, values=values)),
    }
    steps = {"base": FM_STEPS, "emf": EMF_STEPS}
    fixed = {"captions": [asdict(caption) for caption in asked]}
    return Study("openmoji", budget, parts(out, budget, encoders), columns, steps, fixed)


def held_out(gallery: Gallery, budget: Budget) -> list[Caption]:
    """The captions that are drawn and scored: as many, of each kind alike, as the budget allows."""
    every = sorted(gallery.captions()[1], key=lambda c: (c.picture, c.kind))
    places = np.linspace(0, len(every) - 1, min(len(every), budget.prompts)).round().astype(int)
    return [every[i] for i in places]


def by_name(gallery: Gallery) -> list[Caption]:
    """The captions on which a text encoder is measured: names and other names."""
    train, rest = gallery.captions()
    return [c for c in (*train, *rest) if c.kind in ("name", "alias")]


def measured(gallery: Gallery) -> dict[str, list[int]]:
    """By measure of a text encoder, the picture of each caption that it has a value of."""
    named = by_name(gallery)
    every = [c.picture for c in named]
    shortened = [every[i] for i in usable([c.text for c in named], Shortening())[0]]
    return {name: shortened if name.startswith("disentanglement") else every for name in MEASURES}


def odd_ranks(scores: Any, captions: int, pictures: int) -> str | None:
    """What is wrong with a part's ranks by number of steps."""
    if not fits(scores, dict[str, list[int]]) or not all(steps.isdecimal() for steps in scores):
        return "is no object of ranks by number of steps"
    for steps, ranks in scores.items():
        if len(ranks) != captions:
            return f"has {len(ranks)} ranks at {steps} steps; expected {captions}, one a caption"
        if odd := [rank for rank in ranks if not 0 <= rank < pictures]:
            return f"has the rank {odd[0]} at {steps} steps; expected 0 to {pictures - 1}"
    return None


def odd_measures(encoder: Any, values: Mapping[str, int]) -> str | None:
    """What is wrong with the measures of a text encoder. values: how many there are of each."""
    if said := misfit(encoder, dict.fromkeys(values, list[float])):
        return said
    odd = [(name, len(encoder[name]), n) for name, n in values.items() if len(encoder[name]) != n]
    return f"has {odd[0][1]} values of {odd[0][0]}; expected {odd[0][2]}, one a caption" if odd else None


def ceiling(gallery: Gallery, seed: int = 0) -> dict[str, float]:
    """Top-1 of what retrieval must and must not find: real images under noise, and noise alone."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(len(gallery))
    real = np.stack([gallery.plain(i) for i in range(len(gallery))]).astype(float)
    known = Retrieval.of(gallery)

    def top(images: np.ndarray) -> float:
        return float((known.ranks(images.round().clip(0, 255).astype(np.uint8), numbers) == 0).mean())

    return {
        "real under noise": top(real + rng.normal(0, 40, real.shape)),
        "noise": top(rng.normal(128, 60, real.shape)),
    }
