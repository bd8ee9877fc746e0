"""Which device a command computes on, and which of the processes that a launcher started it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from emf.errors import Unlaunched

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""The GPU where there is one, else the CPU: what every command takes unless it is told."""


def device(name: str | None = None) -> torch.device:
    """The device of this name: cpu, cuda, cuda:1, mps; of none, or "auto", the GPU where there is one, else the CPU.
    A GPU without a number is that of this process, where a launcher started several. Raises ValueError where it is not
    there."""
    import torch

    if name in (None, "", AUTO):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = _there()
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: {name!r} is none; expected {AUTO} or one of {', '.join(there)}") from None
    if str(found) == "cuda" and "cuda" in there and (own := os.environ.get("LOCAL_RANK")):
        name = f"cuda:{own}"
        found = torch.device("cuda", int(own)) if own.isdecimal() else found
    if found.type not in {n.split(":")[0] for n in there} or (found.index and str(found) not in there):
        raise ValueError(f"device: {name} is not there; expected {AUTO} or one of {', '.join(there)}")
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


def launched() -> tuple[int, int]:
    """(rank, number of processes) as torchrun and the deepspeed launcher set them, (0, 1) where neither did. Raises
    Unlaunched on half of it, and on what is no such number."""
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if not said["RANK"] and said["WORLD_SIZE"] in (None, "", "1"):
        return 0, 1
    told = " and ".join(f"{name} {value or 'not set'}" for name, value in said.items())
    try:
        rank, world = (int(value or "") for value in said.values())
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world:
        raise Unlaunched(f"launch: {told} in the environment; start with deepspeed or torchrun, or unset both")
    return rank, world
