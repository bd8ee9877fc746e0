"""How images are sampled: one dataclass for every caller, and the guidance of each world."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from emf.limits import Within, check_limits
from emf.model.sizes import TransformerConfig

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
Pixels = tuple[int, int]
"""(width, height) of a picture."""
LONGEST_SIDE = 65_536
Ar = Literal["vllm"] | None
"""What draws image tokens in this process, instead of the language model here."""
PerTag = Annotated[int, Within(1, 10_000)]
"""Prompts of each of the digits' tasks."""


def default_guidance(kind: str | None) -> float:
    """Where nothing else is said, by the kind of the text encoder."""
    return GUIDANCE if kind == "small" else GUIDANCE_PRETRAINED


def read_size(text: str) -> Pixels:
    """The size that WIDTHxHEIGHT says, as 1152x896. Raises ValueError on another text."""
    if not (found := re.fullmatch(r"([1-9]\d{0,4})[xX\u00d7]([1-9]\d{0,4})", text.strip())):
        raise ValueError(f"sample: size {text!r}; expected WIDTHxHEIGHT in pixels, as 1152x896")
    if max(size := (int(found[1]), int(found[2]))) > LONGEST_SIDE:
        raise ValueError(f"sample: size {text!r}; expected sides of at most {LONGEST_SIDE} pixels")
    return size


def latent_shape(
    model: TransformerConfig, scale: int, size: Pixels | None = None, who: str = "sample"
) -> tuple[int, int, int]:
    """[C, h, w] of the latents of a picture of (width, height) pixels; None: the square that the transformer was made
    for. scale: pixels along a side to a latent. who: begins the error. Raises ValueError on pixels that make no whole
    number of patches."""
    side, patch = model.sample_size * scale, model.patch_size * scale
    width, height = size or (side, side)
    if min(width, height) < 1 or width % patch or height % patch:
        near = (max(patch, round(n / patch) * patch) for n in (width, height))
        as_near = "x".join(map(str, near))
        raise ValueError(f"{who}: size {width}x{height} (width x height); expected multiples of {patch}, as {as_near}")
    return model.in_channels, height // scale, width // scale


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
    size: Annotated[Pixels | None, Within(1, LONGEST_SIDE)] = None
    """(width, height) in pixels; None: the square that the transformer was made for."""

    def __post_init__(self) -> None:
        check_limits(self, "sample: ")
