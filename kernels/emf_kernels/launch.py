"""How kernels are launched: tile sizes, warps and stages, from data and not by trial at a user's first call.

configs/<chip>.json is a list of objects: kernel, the shape class that it is for, config, and how it was found: "sweep"
(timed on that chip) or "static" (the compiler's figures: nothing spills). A chip is a device's own name, or its
architecture (sm_90), in that order; where neither has a row for a call, the op file's default stands. `make tune`
writes the files. Triton's interpreter takes the defaults.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CONFIGS = Path(__file__).parent / "configs"
Key = tuple[str, str, str]


def key(chip: str, kernel: str, shape: dict[str, int]) -> Key:
    return chip, kernel, " ".join(f"{k}={v}" for k, v in sorted(shape.items()))


# read at import: a file is nothing that torch.compile could trace
CONFIGURATIONS: dict[Key, dict[str, int]] = {
    key(file.stem, row["kernel"], row["shape"]): row["config"]
    for file in sorted(CONFIGS.glob("*.json"))
    for row in json.loads(file.read_text())
}


@torch.compiler.assume_constant_result
@cache
def chips(index: int | None) -> tuple[str, ...]:
    """The names under which a CUDA device's rows stand, the best first: ("nvidia-h100-80gb-hbm3", "sm_90")."""
    major, minor = torch.cuda.get_device_capability(index)
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(index)).lower(), f"sm_{major}{minor}"


def configuration(kernel: str, x: Tensor, default: dict[str, int], **shape: int) -> dict[str, int]:
    """The free parameters of a launch.

    kernel:  "<op>.<function>".
    x:       a tensor of the call, for its device and its element size, which is part of the shape class.
    default: every free parameter, where the data have nothing for this call.
    shape:   the shape class: the sizes on which the best choice depends, rounded so that a class holds many shapes.
    """
    for chip in chips(x.device.index) if x.is_cuda else ():
        found = CONFIGURATIONS.get(key(chip, kernel, shape | {"bytes": x.element_size()}))
        if found is not None:
            return found
    return default
