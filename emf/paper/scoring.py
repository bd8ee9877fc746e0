"""What is measured of a run: its scores, and what its text encoder is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emf.analyze.digit_pairs import scene_features, scenes
from emf.analyze.discriminability import chance, discriminability
from emf.analyze.disentanglement import disentanglement
from emf.analyze.encoders import embed_texts
from emf.data.digits import TAGS, prompts
from emf.evaluate.digits_scorer import Scorer
from emf.files import whole_file
from emf.paper.parts import EMF_STEPS, FM_STEPS, Budget
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import GUIDANCE, Settings
from emf.weights.folders import load_run


def score(run: Path, per_tag: int, counts: Sequence[int] | None = None) -> dict[str, Any]:
    """{steps: {overall, by_tag}} of a run's averaged weights; the same prompts and noise for every part. EMF's own
    sampler, or Euler's for a base. Keeps samples.npy, one image of each task at each number of steps. counts: the
    numbers of steps; None is those of the paper in miniature."""
    config, network = load_run(run)
    few = config.objective == "meanflow"
    specs, scorer, rows, shown = prompts(per_tag), Scorer.fit(), {}, []
    texts = [s["prompt"] for s in specs]
    for steps in counts or (EMF_STEPS if few else FM_STEPS):
        how = Settings(steps, GUIDANCE, average=few, batch=150)
        images = Sampler(config, network, source=run).images(texts, how).numpy()
        result = scorer.score(images, specs)
        rows[str(steps)] = {"overall": result["overall"], "by_tag": result["by_tag"]}
        shown.append(to_uint8(images[::per_tag][: len(TAGS)]))
    with whole_file(run / "samples.npy") as part, part.open("wb") as file:
        np.save(file, np.stack(shown))  # [steps, tasks, H, W, 3]
    return rows


@torch.no_grad()
def measure(run: Path, budget: Budget) -> dict[str, Any]:
    """Discriminability and disentanglement of a base's text encoder (the paper's Tables 1 and 2), with pixels in the
    place of DINO features."""
    encoder = load_run(run)[1].encoder
    captions, images = scenes(budget.texts)
    features = scene_features(images)
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
