"""One file of weights, read whole."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU, in their own dtypes. Raises ValueError where it is missing
    or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"weights: no file {path}") from None
    except OSError as error:
        raise ValueError(f"weights: {path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is not a safetensors file: {error}") from None
