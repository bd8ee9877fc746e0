"""How a benchmark's images are drawn from a checkpoint: what the command line asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from emf.config import Scale
from emf.limits import Within, check_limits
from emf.sample.sampling_settings import Ar, AtOnce, Guidance, Seed, Steps, one_engine


@dataclass(frozen=True)
class Drawing:
    """Images from a checkpoint first, instead of a folder of images."""

    checkpoint: Path | None = None
    """What to draw the images with: a run's folder, one of its checkpoints, an export, or a folder from emf
    convert."""
    steps: tuple[Steps, ...] = (1, 2, 4, 8)
    """Numbers of steps to draw with; with a folder of images the number that the table says."""
    flow_matching: bool = False
    """Sample the instantaneous velocity with Euler's method, of a trained run that of its start: the baseline's rows,
    at 30, 4, 1."""
    guidance: Guidance | None = None
    """Classifier-free guidance, 1 is none; default: 1.25 for the digits, else 2."""
    seed: Seed = 0
    """Seed of the noise."""
    vae: Path | None = None
    """A diffusers folder with the autoencoder, or its OWNER/NAME on the Hugging Face Hub; default: that of the run's
    data, or of the export."""
    text: Path | None = None
    """The folder or Hub name of the text encoder, where it was moved; default: the run's."""
    ar: Ar = None
    """Who draws BLIP3o-NEXT's image tokens, instead of its language model here: vllm, in this process; its random
    numbers are its own, so a seed gives another picture."""
    ar_server: str | None = None
    """The same by a server's completions endpoint, as vLLM and SGLang have one, for example http://127.0.0.1:8000."""
    scale: Scale | None = None
    """BLIP3o-NEXT's image tokens pooled s x s into one, see emf generate; default: the run's condition.scale."""
    batch: AtOnce = 4
    """How many images are computed at once."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format that the transformer computes in; default: float32 on a CPU, bfloat16 on a GPU."""
    images_only: bool = False
    """Draw the images and do not score them."""
    limit: Annotated[int | None, Within(1, 10_000_000)] = None
    """Draw the first so many prompts only, to try it."""

    def __post_init__(self) -> None:
        """Raises ValueError on what cannot be."""
        check_limits(self, "evaluate: --")
        if not self.steps:
            raise ValueError("evaluate: --steps is empty; expected numbers as in 1 2 4 8")
        one_engine(self.ar, self.ar_server)

    def refuse(self, further: Sequence[str] = ()) -> None:
        """Raises ValueError where something is said of drawing, though images are there. further: options of the
        command that are of drawing too, and were given."""
        own = [f.name for f in fields(self) if f.name != "steps" and getattr(self, f.name) != f.default]
        if said := [*own, *further]:
            raise ValueError(
                f"evaluate: --{said[0].replace('_', '-')} is of images that are drawn from --checkpoint; leave it out "
                "where a folder of images is given"
            )

    @property
    def engine(self) -> str | None:
        """Who draws the image tokens, for Sampler.load."""
        return one_engine(self.ar, self.ar_server)

    @property
    def counts(self) -> list[int]:
        """Numbers of steps, from low to high."""
        return sorted({*self.steps})

    @property
    def step(self) -> int | None:
        """The number of steps of images that are there, where one alone is said."""
        return self.steps[0] if len({*self.steps}) == 1 else None
