"""The digits' world for analyses of text encoders: scenes with captions, and what stands for an image in the place of
DINO's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from emf.data.digits import BACKGROUND, render, sample_spec

SCENES = 1000
"""Captions, each with a scene, that an analysis reads where no data is given."""
DIGITS, PIXELS = "the digits' scenes", "smoothed pixels"


def scenes(n: int, seed: int = 5) -> tuple[list[str], np.ndarray]:
    """(n different captions, a held-out scene of each, [n, H, W, 3] uint8)."""
    rng, specs = np.random.default_rng(seed), dict[str, Any]()
    while len(specs) < n:
        spec = sample_spec(rng)
        specs.setdefault(spec["prompt"], spec)
    images = np.stack([render(spec, rng, "held_out") for spec in specs.values()])
    return list(specs), ((images + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)


def scene_features(images: np.ndarray) -> np.ndarray:
    """Scenes [n, H, W, 3] uint8 -> [n, H W 3] float64: pixels less background, smoothed, so that their cosine says
    whether colours and places agree."""
    away = (images.astype(np.float64) - BACKGROUND) / 127.5
    return np.asarray(gaussian_filter(away, (0, 1, 1, 0)).reshape(len(images), -1))


class Pixels:
    """scene_features with the face of Dino."""

    pooling = PIXELS

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Scenes, all of one size -> [n, D] float32."""
        return torch.from_numpy(scene_features(np.stack([np.asarray(image) for image in images]))).float()
