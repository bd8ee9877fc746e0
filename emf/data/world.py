"""The geometry of the digits' scenes, without what draws them: a config and its help need no torch."""

from __future__ import annotations

from dataclasses import dataclass

GLYPH = 8  # scans are 8 x 8


@dataclass(frozen=True)
class World:
    """Geometry of a scene: glyphs keep at least pitch - 8 - jitter pixels distance."""

    size: int = 18
    """Pixels along a side of a picture."""
    pitch: int = 10
    """Distance of the two cells along a side."""
    shift: int = 0
    """The whole scene is moved by 0..shift pixels down and right."""
    jitter: int = 0
    """Each glyph is moved by 0..jitter pixels down and right on its own."""

    def __post_init__(self) -> None:
        needed = self.pitch + GLYPH + self.shift + self.jitter
        if min(self.shift, self.jitter) < 0 or self.pitch < GLYPH + self.jitter or needed > self.size:
            raise ValueError(
                f"world: size {self.size}, pitch {self.pitch}, shift {self.shift}, jitter {self.jitter} do not fit; "
                f"shift and jitter are at least 0, pitch at least {GLYPH} + jitter, size here at least {needed}"
            )
