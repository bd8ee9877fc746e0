"""What a run is planned for and measured on, without torch: a command's help needs none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 operations a second, by data sheet."""


def peak_flops(device: str) -> float | None:
    """Peak of a device by the name that CUDA gives it; None where it is not in PEAK_FLOPS."""
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in device), None)


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for. Raises ValueError on what cannot be."""

    gpus: int = 1
    """How many GPUs the run has, over all machines: its ranks."""
    memory: float = 80.0
    """GiB of memory that each GPU has."""
    gpu: Literal["A100", "H100", "H200", "B200"] = "H100"
    """Kind of GPU, for the expected time."""
    mfu: float = 0.4
    """Share of the data sheet's operations a second that the run is assumed to reach."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"plan: gpus {self.gpus}; expected at least 1")
        if not (math.isfinite(self.memory) and self.memory > 0):
            raise ValueError(f"plan: memory {self.memory}; expected GiB above 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan: mfu {self.mfu}; expected a share above 0, at most 1")
        if self.gpu not in PEAK_FLOPS:
            raise ValueError(f"plan: no GPU {self.gpu!r}; there are {', '.join(PEAK_FLOPS)}")
