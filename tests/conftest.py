"""First of all: without a GPU, kernels are made for Triton's interpreter, so emf_kernels comes before triton."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# workers side by side: threads of small products that wait for each other make a test ten times slower
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

import emf_kernels  # noqa: F401

# torch remembers, at the first `with torch.device(...)` of a process, which functions make tensors. Were that in a test
# that has put another in the place of torch.empty, then `with torch.device("meta")` would fill gigabytes in later ones.
with torch.device("cpu"):
    torch.empty(0)

# the same examples every time: a fault is found where the code was changed, and not by chance somewhere else
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
settings.load_profile("same")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freshly allocated memory is full of NaN: an element that a kernel does not write shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """Interpreted kernels compute as on a GPU, and take bfloat16: bench/interpreter.py."""
    from bench.interpreter import as_on_a_gpu

    with as_on_a_gpu():
        yield


@pytest.fixture(autouse=True)
def given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU's tests run in many processes at once; each gives back what it took, so that the others find memory."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are deselected, not skipped: a skip says that something here could have run."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


# of a worker, not of a module: many modules train from the one and compare with the other, and none writes there
@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow-matching run's weights."""
    from training import TINY, train

    folder = tmp_path_factory.mktemp("base")
    result = train(folder, "digits-base", "--out", str(folder / "run"), *TINY)
    assert result.code == 0, result.text
    return folder / "run" / "checkpoints" / "step_0000006" / "model.safetensors"


@pytest.fixture(scope="session")
def recipe(base: Path) -> list[str]:
    """What a tiny MeanFlow run is called with."""
    from training import TINY

    return ["digits", "--init", str(base), *TINY]


@pytest.fixture(scope="session")
def straight(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to compare with: one rank, no ZeRO, six steps without a stop."""
    from training import train

    folder = tmp_path_factory.mktemp("straight")
    result = train(folder, *recipe, "--out", str(folder / "run"))
    assert result.code == 0, result.text
    return folder / "run"
