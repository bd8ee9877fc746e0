"""Scenes of the digits' world, drawn from descriptions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emf.data.digits import BACKGROUND, Spec, render
from emf.data.world import World

GREY = BACKGROUND / 127.5 - 1


def scenes(specs: Sequence[Spec], seed: int = 0, world: World | None = None) -> np.ndarray:
    """Held-out scans drawn as described: [n, 3, H, W]."""
    rng = np.random.default_rng(seed)
    return np.stack([render(spec, rng, "held_out", world) for spec in specs])
