"""What a run is planned for and measured on, without torch: a command's help needs none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from emf.limits import Within, check_limits

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 operations a second, by data sheet."""


def peak_flops(device: str) -> float | None:
    """Peak of a device by the name that CUDA gives it; None where it is not in PEAK_FLOPS."""
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in device), None)


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for. Raises ValueError on what cannot be."""

    gpus: Annotated[int, Within(1, 1_000_000)] = 1
    """How many GPUs the run has, over all machines: its ranks."""
    memory: Annotated[float, Within(above=0, most=1e6)] = 80.0
    """GiB of memory that each GPU has."""
    gpu: Literal["A100", "H100", "H200", "B200"] = "H100"
    """Kind of GPU, for the expected time."""
    mfu: Annotated[float, Within(above=0, most=1)] = 0.4
    """Share of the data sheet's operations a second that the run is assumed to reach."""

    def __post_init__(self) -> None:
        check_limits(self, "plan: --")
        if self.gpu not in PEAK_FLOPS:
            raise ValueError(f"plan: no GPU {self.gpu!r}; there are {', '.join(PEAK_FLOPS)}")
