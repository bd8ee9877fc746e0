"""Captions to what an encoder reads. BLIP3o-NEXT reads image tokens too, which it draws itself before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tokenize(
    encoder: Any, captions: Sequence[str], seeds: Sequence[int], progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] of captions, on the CPU.

    seeds: one for each caption. An encoder that draws image tokens draws those of a caption by the caption's own seed,
           so that they do not depend on the batch; other encoders have no use for it.
    progress: show how far the drawing is, which is worth it from about a hundred image tokens on.
    Raises ValueError on a caption that the encoder cannot read.
    """
    tokens = None
    if hasattr(encoder, "generate"):
        generators = [torch.Generator().manual_seed(n) for n in seeds]
        tokens = encoder.generate(captions, generators, progress=progress and encoder.image_tokens > 100).cpu()
    ids, mask = encoder.tokenize(captions) if tokens is None else encoder.tokenize(captions, tokens)
    return ids, mask
