"""Training: `deepspeed --module emf.train RECIPE --out DIR [--field value ...]`, `emf train`, or from Python
`emf.train(config, out)`: the package can be called."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from emf.config import Config


class _Callable(ModuleType):
    """A package that can be called, whether or not its modules have been imported before."""

    def __call__(self, config: Config, out: Path | str, resume: bool = False) -> None:
        """Train in the folder `out`; see emf.train.loop.train."""
        from emf.train.loop import train

        train(config, out, resume)


sys.modules[__name__].__class__ = _Callable
