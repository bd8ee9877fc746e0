"""A caption's one vector."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emf.analyze.choices import Embedding, TextPooling
from emf.analyze.names import EncoderName
from emf.analyze.vectors import Gathered, VectorCache
from emf.conditioning.encoder import Encoder, mean_pool
from emf.conditioning.load import LENGTHS
from emf.sample.image_tokens import tokenize

CUT = f"longer texts are cut: {', '.join(f'{kind} reads {n} tokens' for kind, n in LENGTHS.items())}"
"""A note below a table."""


@torch.no_grad()
def embed_texts(encoder: Encoder, captions: Sequence[str], how: Embedding | None = None) -> Tensor:
    """One batch of captions -> [n, C] float32 on the CPU.

    Of a BLIP3o-NEXT whose states are those of the image tokens, each caption's tokens are drawn by a seed of its own
    text, so that they depend on nothing else."""
    how = how or Embedding()
    states: Tensor
    mask: Tensor | None
    if how.states in ("prompt", "caption"):
        states, mask = encoder.text_states(captions, template=how.states == "prompt")
    else:
        seeds = [zlib.crc32(c.encode()) for c in captions]
        ids, keep = (x.to(encoder.device) for x in tokenize(encoder, captions, seeds))
        states, mask = encoder.states(ids, keep) if how.states == "condition" else encoder(ids, keep)
    return pool(states, mask, how.pooling).cpu()


def pool(states: Tensor, mask: Tensor | None, pooling: TextPooling) -> Tensor:
    """States [B, L, C], mask [B, L] bool -> [B, C] float32: the mean over the kept tokens, or the last of them."""
    if pooling == "mean":
        return mean_pool(states, mask)
    if mask is None:
        return states[:, -1].float()
    kept = mask.to(states.device).long()
    last = (kept * torch.arange(kept.shape[1], device=kept.device)).argmax(1)
    return states[torch.arange(len(states), device=states.device), last].float()


class TextVectors:
    """The vectors of an encoder's captions, kept in a folder; the encoder is loaded when one is missing."""

    def __init__(
        self, encoder: EncoderName, how: Embedding, out: Path, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        self.encoder, self.how, self.dtype, self.device = encoder, how, dtype, device
        said = json.dumps([encoder.stamp(), asdict(how), dtype], sort_keys=True)
        self.cache = VectorCache(out / "cache" / f"text-{hashlib.sha256(said.encode()).hexdigest()[:12]}")

    def __call__(self, captions: Sequence[str], batch: int = 32) -> Gathered:
        """[len(captions), C], not in memory. Raises ValueError where the encoder cannot be loaded."""
        encoder = None
        if self.cache.missing(captions):
            encoder = self.encoder.load(getattr(torch, self.dtype), self.device)

        def compute(part: list[int]) -> np.ndarray:
            assert encoder is not None
            return embed_texts(encoder, [captions[i] for i in part], self.how).numpy()

        return self.cache.fill(captions, compute, batch, f"embed, {self.encoder.name}")
