"""How a benchmark's images are drawn from a checkpoint: what the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Drawing:
    """Images from a checkpoint first, instead of a folder of images."""

    checkpoint: Path | None = None
    """What to draw the images with: a run's folder, one of its checkpoints, an export, or a folder from emf
    convert."""
    steps: str = "1,2,4,8"
    """Numbers of steps to draw with, separated by commas; with a folder of images the number that the table says."""
    flow_matching: bool = False
    """Sample the instantaneous velocity with Euler's method: the baseline's rows, at 30, 4, 1."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; default: 1.25 for the digits, else 2."""
    seed: int = 0
    """Seed of the noise."""
    vae: Path | None = None
    """A diffusers folder with the autoencoder; default: that of the run's data, or of the export."""
    batch: int = 4
    """How many images are computed at once."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format that the transformer computes in; default: float32 on a CPU, bfloat16 on a GPU."""
    images_only: bool = False
    """Draw the images and do not score them."""
    limit: int | None = None
    """Draw the first so many prompts only, to try it."""

    @property
    def counts(self) -> list[int]:
        """Raises ValueError on what is no list of numbers."""
        try:
            counts = sorted({int(part) for part in self.steps.split(",")})
        except ValueError:
            counts = []
        if not counts or counts[0] < 1:
            raise ValueError(f"evaluate: --steps {self.steps!r}; expected numbers from 1 on, as in 1,2,4,8")
        return counts
