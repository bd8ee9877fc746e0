"""Which device a command computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device(name: str | None = None) -> torch.device:
    """The device of this name: cpu, cuda, cuda:1, mps; of none, or "auto", the GPU where there is one, else the CPU.
    Raises ValueError where it is not there."""
    import torch

    if name in (None, "", "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: {name!r} is none; expected one of {', '.join(_there())}") from None
    there = _there()
    if found.type not in {n.split(":")[0] for n in there} or (found.index and str(found) not in there):
        raise ValueError(f"device: {name} is not there; expected one of {', '.join(there)}")
    return found


def _there() -> list[str]:
    """The names of the devices of this machine."""
    import torch

    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names
