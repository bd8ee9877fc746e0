"""How images are sampled: one dataclass for every caller, and the guidance of each world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from emf.limits import Within, check_limits

GUIDANCE = 1.25
"""Of the digits' world, where it scores best (profiles/LOG.md)."""
GUIDANCE_PRETRAINED = 2.0
"""Of the other worlds: the one that EMF's released inference script samples with."""

SMALL_AT_ONCE = 16
"""Images of the digits' world that are computed at once where they are scored: so few that what a core works on stays
in its cache (profiles/LOG.md)."""
SEEDS = 2**43
"""Seeds that can be: with the images' numbers they make up numbers of 64 bits."""
Seed = Annotated[int, Within(0, below=SEEDS)]
Steps = Annotated[int, Within(1, 10_000)]
Guidance = Annotated[float, Within(-1000, 1000)]
AtOnce = Annotated[int, Within(1, 65_535)]
"""Images that are computed at once: a kernel takes no larger batch."""
Ar = Literal["vllm"] | None
"""What draws image tokens in this process, instead of the language model here."""
PerTag = Annotated[int, Within(1, 10_000)]
"""Prompts of each of the digits' tasks."""


def default_guidance(kind: str | None) -> float:
    """Where nothing else is said, by the kind of the text encoder."""
    return GUIDANCE if kind == "small" else GUIDANCE_PRETRAINED


def one_engine(ar: Ar, ar_server: str | None) -> str | None:
    """What --ar and --ar-server say together, for Sampler.load. Raises ValueError where both are given."""
    if ar is not None and ar_server is not None:
        raise ValueError("image tokens: --ar and --ar-server both say who draws them; give one of the two")
    return ar if ar_server is None else ar_server


@dataclass(frozen=True)
class Settings:
    """How images are sampled. Raises ValueError on what cannot be."""

    steps: Steps = 1
    """Equal steps from noise to data."""
    guidance: Guidance | None = None
    """Classifier-free guidance, 1 is none; None: 1.25 for the digits, else 2. A network trained with guidance inside
    its target (config.flow.built_in) has that part already: at just this guidance it is evaluated once a step."""
    seed: Seed = 0
    """Of the noise, and of the image tokens that BLIP3o-NEXT draws before it."""
    average: bool = True
    """Few-step EMF sampling with u(z, r, t); else Euler's method on v(z, t) with the pretrained time embedding, which
    is the flow-matching baseline."""
    batch: AtOnce = 4
    """Images computed at once."""

    def __post_init__(self) -> None:
        check_limits(self, "sample: ")
