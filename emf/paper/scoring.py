"""What is measured of a run: its scores, and what its text encoder is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from emf.analyze.discriminability import chance, discriminability
from emf.analyze.disentanglement import disentanglement
from emf.analyze.encoders import embed_texts
from emf.data.digits import BACKGROUND, TAGS, prompts, render, sample_spec
from emf.evaluate.digits_scorer import Scorer
from emf.files import whole_file
from emf.paper.parts import EMF_STEPS, FM_STEPS, Budget
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import GUIDANCE, Settings
from emf.weights.folders import load_run


def score(run: Path, budget: Budget) -> dict[str, Any]:
    """{steps: {overall, by_tag}} of a run's averaged weights; the same prompts and noise for every part. EMF's own
    sampler, or Euler's for a base. Keeps samples.npy, one image of each task at each number of steps."""
    config, network = load_run(run)
    few = config.objective == "meanflow"
    specs, scorer, rows, shown = prompts(budget.per_tag), Scorer.fit(), {}, []
    texts = [s["prompt"] for s in specs]
    for steps in EMF_STEPS if few else FM_STEPS:
        how = Settings(steps, GUIDANCE, average=few, batch=150)
        images = Sampler(config, network, source=run).images(texts, how).numpy()
        result = scorer.score(images, specs)
        rows[str(steps)] = {"overall": result["overall"], "by_tag": result["by_tag"]}
        shown.append(to_uint8(images[:: budget.per_tag][: len(TAGS)]))
    with whole_file(run / "samples.npy") as part, part.open("wb") as file:
        np.save(file, np.stack(shown))  # [steps, tasks, H, W, 3]
    return rows


@torch.no_grad()
def measure(run: Path, budget: Budget) -> dict[str, Any]:
    """Discriminability and disentanglement of a base's text encoder (the paper's Tables 1 and 2), with pixels in the
    place of DINO features."""
    encoder = load_run(run)[1].encoder
    captions, features = scenes(budget.texts)
    number = np.arange(len(captions))
    own = embed_texts(encoder, captions).numpy()
    near, centred = (discriminability(own, number, features, number, centred=c).score.mean for c in (False, True))
    apart = disentanglement(encoder, captions)
    return {
        "discriminability": near,
        "discriminability, centred": centred,
        "chance": chance(features, number),
        "disentanglement": apart.plain.mean,
        "disentanglement, centred": apart.centred.mean,
    }


def scenes(n: int, seed: int = 5) -> tuple[list[str], np.ndarray]:
    """(n different captions, features [n, 3 H W] of a held-out scene of each): pixels less background, smoothed, so
    that their cosine says whether colours and places agree."""

    rng, specs = np.random.default_rng(seed), dict[str, Any]()
    while len(specs) < n:
        spec = sample_spec(rng)
        specs.setdefault(spec["prompt"], spec)
    images = np.stack([render(spec, rng, "held_out") for spec in specs.values()])
    smooth = gaussian_filter(images - (BACKGROUND / 127.5 - 1), (0, 0, 1, 1))
    return list(specs), smooth.reshape(n, -1)
