"""The runs on a world of named pictures are trained and scored, and their text encoders measured. What was stopped is
gone on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emf.analyze.discriminability import discriminability
from emf.analyze.disentanglement import disentanglement
from emf.analyze.encoders import embed_texts
from emf.data.gallery import Caption, Gallery
from emf.evaluate.picture_retrieval import Retrieval, features
from emf.files import whole_file, write_json
from emf.paper.openmoji_parts import EMF_STEPS, FM_STEPS, Budget, TextEncoder, prepare
from emf.paper.openmoji_record import by_name, held_out, study
from emf.paper.parts import Part
from emf.paper.record import ENCODER, SCORES
from emf.paper.runs import at_work, run_parts, train_whole
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import GUIDANCE_PRETRAINED, Settings
from emf.weights.checkpoints import WEIGHTS, checkpoints
from emf.weights.folders import load_run

SHOWN = 12
"""Captions whose images are kept for the page."""


def run_openmoji(
    out: Path, gallery: Gallery, budget: Budget, jobs: int, encoders: Mapping[str, TextEncoder] | None = None
) -> None:
    """Train and score every part that has no scores yet, `jobs` of them at once. Raises ValueError as `at_work` does,
    and where a package is missing, or a part fails."""
    with at_work(out, study(out, gallery, budget, encoders)) as left:
        if left:
            prepare(out, gallery, budget, encoders)
        run_parts(out, left, partial(run_part, out=out, gallery=gallery, budget=budget), jobs, who="openmoji")


def run_part(part: Part, out: Path, gallery: Gallery, budget: Budget) -> None:
    """Train a part in the folder out/<name>, or go on with it, and score it. Of a base the text encoder is measured
    too."""
    folder, config = out / part.name, part.config
    if part.base is not None:
        config = replace(config, init=checkpoints(out / part.base)[-1] / WEIGHTS)
    train_whole(config, folder)
    result = score(folder, gallery, budget)
    if part.base is None:
        write_json(folder / ENCODER, measure(load_run(folder)[1].encoder, gallery))
    write_json(folder / SCORES, result)


def score(run: Path, gallery: Gallery, budget: Budget) -> dict[str, list[int]]:
    """{steps: the rank of the picture asked for, of each held-out caption} of a run's averaged weights; the same noise
    for every part. Keeps samples.npy, images of the first of SHOWN pictures at each number of steps."""
    config, network = load_run(run)
    few, asked = config.objective == "meanflow", held_out(gallery, budget)
    known, rows, shown = Retrieval.of(gallery), {}, []
    kept = shown_of(asked)
    for steps in EMF_STEPS if few else FM_STEPS:
        how = Settings(steps, GUIDANCE_PRETRAINED, average=few, batch=64)
        images = to_uint8(Sampler(config, network, source=run).images([c.text for c in asked], how))
        rows[str(steps)] = known.ranks(images, np.array([c.picture for c in asked])).tolist()
        shown.append(images[kept])
    with whole_file(run / "samples.npy") as part, part.open("wb") as file:
        np.save(file, np.stack(shown))  # [steps, captions, H, W, 3]
    return rows


def shown_of(asked: Sequence[Caption]) -> list[int]:
    """Which of the captions that are drawn are shown: aliases where there are any, spread over the pictures."""
    some = [i for i, c in enumerate(asked) if c.kind == "alias"] or list(range(len(asked)))
    return [some[i] for i in np.unique(np.linspace(0, len(some) - 1, SHOWN).round().astype(int))]


@torch.no_grad()
def measure(encoder: Any, gallery: Gallery) -> dict[str, list[float]]:
    """Discriminability and disentanglement of a text encoder (the paper's Tables 1 and 2) by caption, on names and
    aliases; smoothed pixels, less the mean picture's, in the place of DINO features."""
    named = by_name(gallery)
    texts, picture = [c.text for c in named], np.array([c.picture for c in named])
    real = features(np.stack([gallery.plain(i) for i in range(len(gallery))]))
    own = torch.cat([embed_texts(encoder, texts[i : i + 32]) for i in range(0, len(texts), 32)]).numpy()
    found: dict[str, list[float]] = {}
    for name, centred in (("discriminability", False), ("discriminability, centred", True)):
        made = discriminability(own, picture, real - real.mean(0), np.arange(len(texts)), centred=centred)
        found[name] = made.each.tolist()
    apart = disentanglement(encoder, texts)
    found["disentanglement"] = apart.each.mean(1).tolist()
    found["disentanglement, centred"] = apart.each_centred.mean(1).tolist()
    return found
