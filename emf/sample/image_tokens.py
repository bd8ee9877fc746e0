"""Captions to what an encoder reads. BLIP3o-NEXT reads image tokens too, which it draws itself before, or an engine."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emf.conditioning.blip3o import prompt_ids
from emf.conditioning.sampling import Sampling
from emf.sample.token_engine import Engine

ENGINE_SEEDS = 2**31
"""Seeds that an engine takes: some have no more bits. Of up to so many images by one seed each has another one."""


def tokenize(
    encoder: Any, captions: Sequence[str], seeds: Sequence[int], progress: bool = False, engine: Engine | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] of captions, on the CPU.

    seeds: one for each caption. An encoder that draws image tokens draws those of a caption by the caption's own seed,
           so that they do not depend on the batch; other encoders have no use for it.
    progress: show how far the drawing is, which is worth it from about a hundred image tokens on.
    engine: draws the image tokens instead of the encoder.
    Raises ValueError on a caption that the encoder cannot read, and where the engine gives no image tokens.
    """
    tokens = None
    if engine is not None:
        tokens = drawn_by(engine, encoder, captions, seeds)
    elif hasattr(encoder, "generate"):
        generators = [torch.Generator().manual_seed(n) for n in seeds]
        tokens = encoder.generate(captions, generators, progress=progress and encoder.image_tokens > 100).cpu()
    ids, mask = encoder.tokenize(captions) if tokens is None else encoder.tokenize(captions, tokens)
    return ids, mask


def drawn_by(engine: Engine, encoder: Any, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Image tokens [B, n] int64 of captions by an engine, as Blip3oNext.generate gives them. Raises ValueError where
    they are not n of the encoder's vocabulary."""
    n, words = encoder.image_tokens, encoder.decoder.config.vocab_size
    rows = [[*ids, *encoder.head] for ids in prompt_ids(encoder, captions)]
    drawn = engine.draw(rows, n, [seed % ENGINE_SEEDS for seed in seeds], Sampling())
    for caption, ids in zip(captions, drawn, strict=True):
        if len(ids) != n:
            raise ValueError(
                f"image tokens: the {engine.said} gives {len(ids)} tokens for {caption!r}; expected {n}, whatever they "
                "are (ignore_eos)"
            )
        if wrong := [i for i in ids if not 0 <= i < words]:
            raise ValueError(
                f"image tokens: the {engine.said} gives the token {reprlib.repr(wrong[0])} for {caption!r}; the run's "
                f"language model has {words}, so it is another one's"
            )
    return torch.tensor(drawn)
