"""Captions to images with a trained network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emf.config import Config
from emf.data import digits
from emf.flow import guided, sample
from emf.model import TextToImage


@torch.no_grad()
def generate(
    network: TextToImage,
    config: Config,
    captions: list[str],
    steps: int,
    *,
    average: bool = True,
    guidance: float = 1.5,
    seed: int = 0,
    batch: int = 256,
) -> Tensor:
    """Images [n, C, size, size] in about [-1, 1], float32. Image i depends on (seed, i, caption) and the settings, not on the batch.

    average: few-step EMF sampling with u(z, r, t); else Euler on v(z, t) with the pretrained time embedding (the flow-matching baseline).
    Raises ValueError on a caption the encoder cannot read.
    """
    model = config.transformer
    ids, mask = digits.encode(captions)
    shape = (model.in_channels, model.sample_size, model.sample_size)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in range(len(captions))])
    images = []
    for part in range(0, len(captions), batch):
        here = slice(part, part + batch)
        # The condition is the same at every step: encode it once, with and without.
        states = network.encoder(ids[here], mask[here])
        null = network.encoder(ids[here], mask[here], torch.ones(len(ids[here]), dtype=torch.bool))

        def velocity(c: tuple[Tensor, Tensor]) -> Any:
            return lambda z, t, r: network.transformer(z, t, r, *c)

        images.append(sample(guided(velocity(states), velocity(null), guidance), noise[here], steps, average))
    return torch.cat(images)
