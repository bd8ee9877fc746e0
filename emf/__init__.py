"""EMF: few-step text-to-image flow maps (arXiv 2604.18168).

What is called from Python, each imported at its first use:

    Config, RECIPES     a run's settings, and the functions that return complete ones by name
    train               emf.train(config, out): train in this process
    load                emf.load(folder) -> (config, network): a run, a checkpoint or an export
    Sampler             captions -> images
    export              a run as a folder in diffusers' layout
    EMFPipeline         that folder as diffusers' pipeline
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emf import recipes
    from emf.config import Config
    from emf.pipeline import EMFPipeline
    from emf.recipes import RECIPES
    from emf.sample.sampler import Sampler
    from emf.train.loop import train
    from emf.weights.export import export
    from emf.weights.folders import load

__version__ = "0.1.0"
__all__ = ["RECIPES", "Config", "EMFPipeline", "Sampler", "__version__", "export", "load", "recipes", "train"]

_PLACES = {
    "Config": "emf.config:Config",
    "EMFPipeline": "emf.pipeline:EMFPipeline",
    "RECIPES": "emf.recipes:RECIPES",
    "Sampler": "emf.sample.sampler:Sampler",
    "export": "emf.weights.export:export",
    "load": "emf.weights.folders:load",
    "recipes": "emf.recipes",
    "train": "emf.train",  # a package that can be called
}


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'emf' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    value: Any = import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
