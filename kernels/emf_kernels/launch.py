"""How kernels are launched: compiled or interpreted; tile sizes, warps and stages, from data and not by trial at a
user's first call.

configs/<chip>.json is a list of objects: kernel, the shape class that it is for, config, and how it was found: "sweep"
(timed on that chip) or "static" (the compiler's figures: nothing spills). A chip is a device's own name, or its
architecture (sm_90), in that order; where neither has a row for a call, the op file's default stands. `make tune`
writes the files. Triton's interpreter takes the defaults.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# without a GPU kernels can only be interpreted; but the user may have decided, or imported triton, before
_OURS = not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ and "triton" not in sys.modules


@contextmanager
def restoring() -> Iterator[None]:
    """Around imports: afterwards every environment variable is what it was before, so that a process which imports
    this package, and its children, see nothing of it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def decorating() -> Iterator[None]:
    """Around the import of triton and of kernels: decides whether they are compiled or interpreted.

    `triton.jit` reads the environment variable TRITON_INTERPRET when it decorates a kernel, and so do the functions of
    triton.language when triton is imported. It is set inside the block alone, and not where there is a GPU, the user
    has set it, or triton came first.
    """
    with restoring():
        if _OURS:
            os.environ["TRITON_INTERPRET"] = "1"
        yield


with decorating():
    from triton.language import sum as _of_the_language
    from triton.runtime.jit import JITFunction

    with suppress(ImportError):  # which a first launch in the interpreter would import, outside the block
        import triton.experimental.gluon  # noqa: F401
with restoring():
    import torch._dynamo  # noqa: F401 - which torch.compiler would import below; it sets TORCHINDUCTOR_CACHE_DIR
# Whether kernels run in the interpreter in this process, on CPU tensors; else they are compiled for a GPU.
INTERPRETED = not isinstance(_of_the_language, JITFunction)


def _mend_splat() -> None:
    """A comparison of scalars stays a truth where it is spread over a block. Triton's interpreter gives it the type of
    what was compared, so that it is spread as integers, and from 3.9 on it refuses integers as a mask."""
    from triton.language import int1
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, block: Any, x: Any) -> Any:
        return splat(self, block, TensorHandle(x.data, int1) if x.data.dtype == bool else x)

    InterpreterBuilder.create_splat = create_splat


if INTERPRETED:
    _mend_splat()

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
    if not x.is_cuda:
        return default
    return _found(kernel, x.device.index, (*shape.items(), ("bytes", x.element_size()))) or default


# torch.compile takes a constant from a plain function; through `cache` it would look, into the names of devices
@torch.compiler.assume_constant_result
def _found(kernel: str, index: int | None, shape: tuple[tuple[str, int], ...]) -> dict[str, int] | None:
    return _looked_up(kernel, index, shape)


@cache
def _looked_up(kernel: str, index: int | None, shape: tuple[tuple[str, int], ...]) -> dict[str, int] | None:
    keys = (key(chip, kernel, dict(shape)) for chip in chips(index))
    return next((CONFIGURATIONS[k] for k in keys if k in CONFIGURATIONS), None)


def attention_library(x: Tensor) -> str:
    """Whose backward of half-precision attention is the fastest on a tensor's GPU: "cudnn", "flash", or "": none."""
    return _attention_library(x.device.index, torch.backends.cuda.cudnn_sdp_enabled())


@torch.compiler.assume_constant_result
def _attention_library(index: int | None, cudnn: bool) -> str:
    major, _ = torch.cuda.get_device_capability(index)
    if cudnn and major in (9, 10) and torch.backends.cudnn.is_available():
        return "cudnn"  # 1.5 to 1.7 times as fast as flash on an H100: profiles/LOG.md
    return "flash" if major >= 8 else ""


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that one program may have on a tensor's device."""
    return _shared_memory(x.device.index) if x.is_cuda else 227 * 1024


@torch.compiler.assume_constant_result
def _shared_memory(index: int | None) -> int:
    return _asked(index)


@cache
def _asked(index: int | None) -> int:
    from triton.runtime import driver  # which finds the GPU

    device = torch.cuda.current_device() if index is None else index
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]
