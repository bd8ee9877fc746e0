"""The geometry of the digits' scenes, without what draws them: a config and its help need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from emf.limits import Within, check_limits

GLYPH = 8  # scans are 8 x 8
Pixels = Annotated[int, Within(0, 4096)]


@dataclass(frozen=True)
class World:
    """Geometry of a scene: glyphs keep at least pitch - 8 - jitter pixels distance."""

    size: Pixels = 18
    """Pixels along a side of a picture."""
    pitch: Pixels = 10
    """Distance of the two cells along a side."""
    shift: Pixels = 0
    """The whole scene is moved by 0..shift pixels down and right."""
    jitter: Pixels = 0
    """Each glyph is moved by 0..jitter pixels down and right on its own."""

    def __post_init__(self) -> None:
        check_limits(self, "config: world.")
        needed = self.pitch + GLYPH + self.shift + self.jitter
        if self.pitch < GLYPH + self.jitter or needed > self.size:
            raise ValueError(
                f"config: world: size {self.size}, pitch {self.pitch}, shift {self.shift}, jitter {self.jitter} do not "
                f"fit: pitch is at least {GLYPH} + jitter, size here at least {needed}"
            )
