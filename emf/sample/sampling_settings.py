"""How images are sampled: one dataclass for every caller, and the guidance of each world."""

from __future__ import annotations

import math
from dataclasses import dataclass

GUIDANCE = 1.25
"""Of the digits' world, where it scores best (profiles/LOG.md)."""
GUIDANCE_PRETRAINED = 2.0
"""Of the other worlds: the one that EMF's released inference script samples with."""

SMALL_AT_ONCE = 64
"""Images of the digits' world that are computed at once where they are scored."""
SEEDS = 2**43
"""Seeds that can be: with the images' numbers they make up numbers of 64 bits."""


def default_guidance(kind: str | None) -> float:
    """Where nothing else is said, by the kind of the text encoder."""
    return GUIDANCE if kind == "small" else GUIDANCE_PRETRAINED


@dataclass(frozen=True)
class Settings:
    """How images are sampled. Raises ValueError on what cannot be."""

    steps: int = 1
    """Equal steps from noise to data."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; None: 1.25 for the digits, else 2. A network trained with guidance inside
    its target (config.flow.built_in) has that part already: at just this guidance it is evaluated once a step."""
    seed: int = 0
    """Of the noise, and of the image tokens that BLIP3o-NEXT draws before it."""
    average: bool = True
    """Few-step EMF sampling with u(z, r, t); else Euler's method on v(z, t) with the pretrained time embedding, which
    is the flow-matching baseline."""
    batch: int = 4
    """Images computed at once."""

    def __post_init__(self) -> None:
        wrong = []
        if self.steps < 1:
            wrong.append(f"{self.steps} steps (--steps); expected at least 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            wrong.append(f"guidance {self.guidance} (--guidance); expected a number")
        if not 0 <= self.seed < SEEDS:
            wrong.append(f"seed {self.seed} (--seed); expected 0 to {SEEDS - 1}, less than 2^43")
        if self.batch < 1:
            wrong.append(f"batch {self.batch} (--batch); expected at least 1 image at once")
        if wrong:
            raise ValueError(f"sample: {', and '.join(wrong)}")
