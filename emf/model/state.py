"""One file of weights, read whole; and which of a folder's files are its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from emf.errors import Torn
from emf.files import check_readable, files_in, why


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU, in their own dtypes. Raises ValueError where it is missing
    or may not be read, and Torn where it is broken."""
    check_weights(path)
    try:
        return load_file(path)
    except OSError as error:
        raise ValueError(f"weights: {path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise Torn(f"weights: {path} is not a safetensors file: {error}") from None


def read_pickle(path: Path, known: Sequence[Any] = ()) -> Any:
    """What torch.save wrote, on the CPU, without running code of its own. The file is mapped, but for the format before
    torch 1.6, which must be read whole. known: further classes that may be in it, see torch.serialization.safe_globals.
    Raises ValueError where it is missing or may not be read, and Torn where it is broken, or holds other classes."""
    check_weights(path)
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        with torch.serialization.safe_globals([*known]):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle raises whatever its noise stands for
        raise Torn(f"weights: {path} cannot be read as tensors: {why(error)}") from error


STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers begin the names of weights."""


def variant(folder: Path) -> str | None:
    """The variant, such as "bf16", in which alone a folder of diffusers' or transformers' holds its weights: in files
    STEM.bf16.safetensors, or shards that STEM.safetensors.index.bf16.json names. None where weights without one are
    there, or no weights of these names. Raises ValueError where there are several variants to choose from."""
    found: set[str] = set()
    for stem in STEMS:
        if any((folder / f"{stem}{end}").is_file() for end in (".safetensors", ".safetensors.index.json")):
            return None
        for file in files_in(folder, f"{stem}.*"):
            named = re.fullmatch(rf"{stem}(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)", file.name)
            found |= {v for v in named.groups() if v} if named else set()
    if len(found) > 1:
        raise ValueError(f"weights: {folder} holds them as {' and as '.join(sorted(found))}; keep one of these")
    return next(iter(found), None)


def check_weights(path: Path) -> None:
    """Raises ValueError where there is no such file, or it may not be read; safetensors says of either that it is not
    there."""
    if not path.exists():
        raise ValueError(f"weights: no file {path}")
    try:
        check_readable(path)
    except ValueError as error:
        raise ValueError(f"weights: {error}") from None
