"""What an analysis is asked to do: frozen dataclasses that check themselves, whose fields are flags of `emf analyze`.

The first line below a field is its help. Nothing heavy is imported here, so that help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from emf.limits import Within, check_limits
from emf.sample.sampling_settings import AtOnce, Guidance, PerTag, Seed, Steps

TextPooling = Literal["mean", "last"]
States = Literal["prompt", "caption", "condition", "connector"]
ImagePooling = Literal["cls", "pooler", "mean"]
Choice = Literal["first", "random", "all"]
Unit = Literal["word", "phrase", "sentence"]
DType = Literal["float32", "bfloat16"]

DINO = "facebook/dinov3-vitb16-pretrain-lvd1689m"
RESAMPLES = 2000
Resamples = Annotated[int, Within(1, 10_000_000)]
DrawSeed = Annotated[int, Within(0, below=2**32)]
"""Of numpy's generator."""


@dataclass(frozen=True)
class Protocol:
    """Discriminability: what the paper leaves open, and its value here. Raises ValueError on what cannot be."""

    split: str = "train2017"
    """Which of COCO's splits is read; the paper reads train2017."""
    k: Annotated[int, Within(1, 1_000_000)] = 1
    """How many captions are retrieved for each query."""
    queries: Annotated[int, Within(0, 10_000_000)] = 5000
    """How many random images to query for, by one caption each; 0 queries for every image."""
    captions: Choice = "first"
    """Which captions to retrieve from where an image has several: its first, a random one, or all."""
    image_pooling: ImagePooling = "cls"
    """What stands for an image: the cls token, the model's pooler output, or the mean over patches."""
    resamples: Resamples = RESAMPLES
    """How often the bootstrap draws anew, for the intervals."""
    seed: DrawSeed = 0
    """Seed of the random queries, the random captions and the bootstrap."""

    def __post_init__(self) -> None:
        check_limits(self, "analyze: --")


@dataclass(frozen=True)
class Shortening:
    """How parts are removed from a prompt. Raises ValueError on what cannot be."""

    unit: Unit = "word"
    """What is removed: words, phrases (between commas, semicolons, colons, sentence ends) or sentences."""
    fraction: Annotated[float, Within(above=0, below=1)] = 0.5
    """Share of a prompt's units that is removed, rounded; at least one is removed and one is left."""
    repeats: Annotated[int, Within(1, 100_000)] = 4
    """How often units are removed at random from each prompt."""
    seed: DrawSeed = 0
    """Seed of the random removals and the bootstrap."""

    def __post_init__(self) -> None:
        check_limits(self, "analyze: --")
        if self.unit not in (units := get_args(Unit)):
            raise ValueError(f"analyze: --unit {self.unit!r}; expected {', '.join(units)}")


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

    steps: tuple[Steps, ...] = (1, 2, 4, 8, 30)
    """Numbers of steps of Euler's method that are compared."""
    guidance: Guidance | None = None
    """Classifier-free guidance, 1 is none; default: 1.25 for the digits, else 2."""
    seed: Seed = 0
    """Seed of the noise."""
    per_tag: PerTag = 50
    """How many prompts of each of the six tasks are drawn, for runs on the digits."""
    batch: AtOnce = 4
    """How many images are computed at once."""

    def __post_init__(self) -> None:
        check_limits(self, "analyze: --")
        if len({*self.steps}) < 2:
            raise ValueError(f"analyze: --steps {self.steps}; expected two different numbers of steps")


@dataclass(frozen=True)
class Computing:
    """Where and how a text encoder is run. Raises ValueError on what cannot be."""

    dtype: DType = "float32"
    """Number format that the text encoder computes in."""
    device: str = "auto"
    """Where the text encoder is run: cpu, cuda, cuda:1; auto: the GPU where there is one."""
    batch: AtOnce = 32
    """How many captions, prompts or images are computed at once."""

    def __post_init__(self) -> None:
        check_limits(self, "analyze: --")
        if self.dtype not in get_args(DType):
            raise ValueError(f"analyze: --dtype {self.dtype!r}; expected {', '.join(get_args(DType))}")
