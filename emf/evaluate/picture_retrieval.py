"""Retrieval in a world of named pictures: is the nearest real picture to a drawn one the one that was asked for?

Nearest by smoothed pixels among all real images, every picture at every place on every ground. No network is asked, so
none can be good at pleasing it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from emf.data.gallery import Gallery

BLUR = 1.0  # pixels: a line that is drawn one pixel beside its place is near it
BLOCK = 64  # images compared at once


@dataclass(frozen=True)
class Retrieval:
    """The real images of a gallery, to be compared with."""

    features: np.ndarray
    """[N, D] float32."""
    picture: np.ndarray
    """[N] int64: which picture each is of."""
    pictures: int

    @classmethod
    def of(cls, gallery: Gallery) -> Retrieval:
        numbers, images = zip(*gallery.every(), strict=True)
        return cls(features(np.stack(images)), np.array(numbers), len(gallery))

    def ranks(self, images: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """[n] int64: of images [n, H, W, 3] uint8 the place, from 0, of the picture asked for [n] among all pictures,
        each by its nearest real image."""
        found = []
        for start in range(0, len(images), BLOCK):
            own = features(images[start : start + BLOCK])
            far = (own**2).sum(1)[:, None] + (self.features**2).sum(1)[None] - 2 * own @ self.features.T
            by_picture = np.full((len(own), self.pictures), np.inf, far.dtype)
            for k in range(self.pictures):
                by_picture[:, k] = far[:, self.picture == k].min(1)
            mine = by_picture[np.arange(len(own)), asked[start : start + BLOCK]]
            found.append((by_picture < mine[:, None]).sum(1))
        return np.concatenate(found)


def features(images: np.ndarray) -> np.ndarray:
    """[n, D] float32 of images [n, H, W, 3] uint8: their pixels, smoothed."""
    pixels = images.astype(np.float32) / 255
    return gaussian_filter(pixels, (0, BLUR, BLUR, 0)).reshape(len(images), -1)


def hits(ranks: np.ndarray, top: int) -> np.ndarray:
    """[n] float64: 1 where the picture asked for is among the `top` nearest."""
    return (ranks < top).astype(np.float64)
