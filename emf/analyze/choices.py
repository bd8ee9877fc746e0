"""What an analysis is asked to do: frozen dataclasses that check themselves, whose fields are flags of `emf analyze`.

The first line below a field is its help. Nothing heavy is imported here, so that help is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

TextPooling = Literal["mean", "last"]
States = Literal["prompt", "caption", "condition", "connector"]
ImagePooling = Literal["cls", "pooler", "mean"]
Choice = Literal["first", "random", "all"]
Unit = Literal["word", "phrase", "sentence"]
DType = Literal["float32", "bfloat16"]

DINO = "facebook/dinov3-vitb16-pretrain-lvd1689m"
RESAMPLES = 2000


@dataclass(frozen=True)
class Protocol:
    """Discriminability: what the paper leaves open, and its value here. Raises ValueError on what cannot be."""

    split: str = "train2017"
    """Which of COCO's splits is read; the paper reads train2017."""
    k: int = 1
    """How many captions are retrieved for each query."""
    queries: int = 5000
    """How many random images to query for, by one caption each; 0 queries for every image."""
    captions: Choice = "first"
    """Which captions to retrieve from where an image has several: its first, a random one, or all."""
    image_pooling: ImagePooling = "cls"
    """What stands for an image: the cls token, the model's pooler output, or the mean over patches."""
    resamples: int = RESAMPLES
    """How often the bootstrap draws anew, for the intervals."""
    seed: int = 0
    """Seed of the random queries, the random captions and the bootstrap."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.queries < 0 or self.resamples < 1 or self.seed < 0:
            raise ValueError(
                f"analyze: k {self.k}, {self.queries} queries, {self.resamples} resamples, seed {self.seed}; expected "
                "at least 1, 0, 1 and 0"
            )


@dataclass(frozen=True)
class Shortening:
    """How parts are removed from a prompt. Raises ValueError on what cannot be."""

    unit: Unit = "word"
    """What is removed: words, phrases (between commas, semicolons, colons, sentence ends) or sentences."""
    fraction: float = 0.5
    """Share of a prompt's units that is removed, rounded; at least one is removed and one is left."""
    repeats: int = 4
    """How often units are removed at random from each prompt."""
    seed: int = 0
    """Seed of the random removals and the bootstrap."""

    def __post_init__(self) -> None:
        units = get_args(Unit)
        if self.unit not in units or not 0 < self.fraction < 1 or self.repeats < 1 or self.seed < 0:
            raise ValueError(
                f"analyze: unit {self.unit!r}, fraction {self.fraction}, {self.repeats} repeats, seed {self.seed}; "
                f"expected {', '.join(units)}; above 0 and below 1; at least 1; at least 0"
            )


@dataclass(frozen=True)
class Embedding:
    """How a caption becomes one vector. Raises ValueError on what cannot be."""

    pooling: TextPooling = "mean"
    """How text states become one vector: the mean over the tokens that are no padding, or the last of them."""
    states: States = "prompt"
    """Which states are compared. prompt: those of the caption within the encoder's own prompt; caption: those of the
    bare caption; condition: those that the transformer's condition is made of (BLIP3o-NEXT draws image tokens for
    them first, which is slow); connector: those after the connector, where there is one."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(TextPooling) or self.states not in get_args(States):
            kinds = f"{', '.join(get_args(TextPooling))} of {', '.join(get_args(States))}"
            raise ValueError(f"analyze: pooling {self.pooling!r} of states {self.states!r}; expected one of {kinds}")


@dataclass(frozen=True)
class Sampling:
    """Few steps: what is the same for every backbone. Raises ValueError on what cannot be."""

    steps: tuple[int, ...] = (1, 2, 4, 8, 30)
    """Numbers of steps of Euler's method that are compared."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; default: 1.25 for the digits, else 2."""
    seed: int = 0
    """Seed of the noise."""
    per_tag: int = 50
    """How many prompts of each of the six tasks are drawn, for runs on the digits."""
    batch: int = 4
    """How many images are computed at once."""

    def __post_init__(self) -> None:
        good = self.guidance is None or math.isfinite(self.guidance)
        if len({*self.steps}) < 2 or min(*self.steps, self.per_tag, self.batch) < 1 or self.seed < 0 or not good:
            raise ValueError(
                f"analyze: steps {self.steps}, guidance {self.guidance}, seed {self.seed}, per_tag {self.per_tag}, "
                f"batch {self.batch}; expected two different numbers of steps, a number, at least 0, 1 and 1"
            )


@dataclass(frozen=True)
class Computing:
    """Where and how a text encoder is run. Raises ValueError on what cannot be."""

    dtype: DType = "float32"
    """Number format that the text encoder computes in."""
    device: str = "auto"
    """Where the text encoder is run: cpu, cuda, cuda:1; auto: the GPU where there is one."""
    batch: int = 32
    """How many captions, prompts or images are computed at once."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.dtype not in get_args(DType):
            raise ValueError(f"analyze: batch {self.batch}, {self.dtype!r}; expected at least 1, {get_args(DType)}")
