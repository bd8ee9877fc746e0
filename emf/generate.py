"""Captions to images with a trained network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from emf.config import Config
from emf.data import digits
from emf.flow import guided, sample
from emf.model import TextToImage

GUIDANCE = 1.25  # suits the digits (profiles/LOG.md); EMF's released code samples with 1.5 and 2


@torch.no_grad()
def generate(
    network: TextToImage,
    config: Config,
    captions: list[str],
    steps: int,
    *,
    average: bool = True,
    guidance: float = GUIDANCE,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Images [n, C, size, size] in about [-1, 1], float32. Image i depends on (seed, i, caption) and the settings,
    not on the batch.

    average: few-step EMF sampling with u(z, r, t); else Euler on v(z, t) with the pretrained time embedding (the
             flow-matching baseline).
    guidance: classifier-free; 1 is none. A network trained with guidance inside its target (config.flow.guidance) has
              that part already: at just this guidance it is evaluated once a step.
    Raises ValueError on a caption the encoder cannot read.
    """
    if not captions or not math.isfinite(guidance) or seed < 0:
        raise ValueError(
            f"generate: {len(captions)} images, guidance {guidance}, seed {seed}; expected at least one, a number, and "
            "at least 0"
        )
    model = config.transformer
    ids, mask = digits.encode(captions)
    shape = (model.in_channels, model.sample_size, model.sample_size)
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
            for i in range(len(captions))
        ]
    )
    w = guidance / config.flow.guidance if average else guidance
    images = []
    for part in range(0, len(captions), batch):
        here = slice(part, part + batch)
        # The condition is the same at every step: encode it once, with and without.
        states = network.encoder(ids[here], mask[here])
        null = network.encoder(ids[here], mask[here], torch.ones(len(ids[here]), dtype=torch.bool))

        def velocity(c: tuple[Tensor, Tensor]) -> Any:
            return lambda z, t, r: network.transformer(z, t, r, *c)

        images.append(sample(guided(velocity(states), velocity(null), w), noise[here], steps, average))
    return torch.cat(images)


def to_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """Images [n, C, H, W] in about [-1, 1] -> [n, H, W, C] uint8."""
    return ((np.asarray(images) + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def write_images(images: Tensor, captions: list[str], out: Path, settings: dict[str, Any], zoom: int = 8) -> list[Path]:
    """PNG files, enlarged `zoom` times, with caption and settings in their metadata. A name that is taken gets the
    next number."""
    out.mkdir(parents=True, exist_ok=True)
    taken, paths = len(list(out.glob("*.png"))), []
    for image, caption in zip(to_uint8(images), captions, strict=True):
        while (path := out / f"{taken:05d}.png").exists():
            taken += 1
        note = PngInfo()
        for key, value in {"caption": caption, **settings}.items():
            note.add_text(key, str(value))
        picture = Image.fromarray(image)
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path, pnginfo=note)
        paths.append(path)
    return paths
