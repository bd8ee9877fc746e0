"""First of all: without a GPU, Triton's kernels are interpreted, which is decided before triton is first imported."""

from typing import Any

import pytest
import torch
from torch import Tensor

import emf_kernels  # noqa: F401


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freshly allocated memory is full of NaN: an element that a kernel does not write shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)
