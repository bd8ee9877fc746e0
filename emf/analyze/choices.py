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
    """COCO's, train2017 in the paper."""
    k: int = 1
    """Captions retrieved by query."""
    queries: int = 5000
    """One caption each of so many random images; 0: of every image."""
    captions: Choice = "first"
    """Of an image's several: the first, a random one, or all are retrieved from."""
    image_pooling: ImagePooling = "cls"
    """Cls token, the model's pooler output, or the mean over patches."""
    resamples: int = RESAMPLES
    """Of the bootstrap."""
    seed: int = 0
    """Of queries, random captions and bootstrap."""

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
    """Of a prompt's units that are removed, rounded; one is removed and one is left at least."""
    repeats: int = 4
    """Random removals of each prompt."""
    seed: int = 0
    """Of removals and bootstrap."""

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
    """Of the text states: mean over the tokens that are no padding, or the last of them."""
    states: States = "prompt"
    """prompt: of the caption in the encoder's own prompt; caption: of the bare caption; condition: those that the
    transformer's condition is made of (BLIP3o-NEXT: of image tokens, drawn first: slow); connector: after the
    connector, where there is one."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(TextPooling) or self.states not in get_args(States):
            kinds = f"{', '.join(get_args(TextPooling))} of {', '.join(get_args(States))}"
            raise ValueError(f"analyze: pooling {self.pooling!r} of states {self.states!r}; expected one of {kinds}")


@dataclass(frozen=True)
class Sampling:
    """Few steps: what is the same for every backbone. Raises ValueError on what cannot be."""

    steps: tuple[int, ...] = (1, 2, 4, 8, 30)
    """Of Euler's method."""
    guidance: float | None = None
    """Classifier-free, 1 is none; default: 1.25 for the digits, else 2."""
    seed: int = 0
    """Of the noise."""
    per_tag: int = 50
    """Digits: prompts of each of the six tasks."""
    batch: int = 4
    """Images at once."""

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
    """Of the text encoder."""
    device: str = "cpu"
    """cpu or cuda."""
    batch: int = 32
    """Captions, prompts or images at once."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.dtype not in get_args(DType):
            raise ValueError(f"analyze: batch {self.batch}, {self.dtype!r}; expected at least 1, {get_args(DType)}")
