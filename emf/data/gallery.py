"""A world of pictures that each have a name: a few hundred real pictures, several captions of each, some held out.

A picture is shown at any of a few places and on any plain ground, which no caption tells: so a caption means many
images, as a photograph's does, and few steps are harder than many. Everything is a function of the gallery and a seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from emf.files import open_image, read_text, whole_folder

SIDE, DRAWN, STRIDE, PLACES = 24, 20, 2, 5
"""Pixels along a side of an image, and of the picture in it, of which the outermost two are margin; it stands at any of
PLACES by PLACES places that are STRIDE pixels apart."""
GROUNDS = ((255, 255, 255), (255, 205, 205), (200, 225, 255), (190, 190, 190))
"""Plain colours behind a picture."""
SMALL_WORDS = {"a", "an", "and", "at", "in", "of", "on", "the", "with"}
WORDED = ("a picture of {}", "{} emoji")
"""A name as captions for training have it."""
HELD_OUT_WORDING = "an icon that shows {}"
"""A name as a held-out caption has it, in words around it that training has not."""

Kind = Literal["name", "alias", "shortened", "reworded"]


@dataclass(frozen=True)
class Caption:
    """A text, and the number of the one picture that it means."""

    text: str
    picture: int
    kind: Kind


@dataclass(frozen=True)
class Gallery:
    """Pictures with names. Raises ValueError where two have one name."""

    world: str
    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]
    """Other names of each picture; the last is held out."""
    drawn: np.ndarray
    """[n, DRAWN, DRAWN, 4] uint8: colour, not multiplied by the fourth, the coverage."""
    source: str = ""
    """Who made them, and their licence: shown wherever a picture is."""

    def __post_init__(self) -> None:
        if twice := [name for name, n in Counter(self.names).items() if n > 1]:
            raise ValueError(f"{self.world}: two pictures are called {twice[0]!r}; give each a name of its own")

    def __len__(self) -> int:
        return len(self.names)

    def shown(self, picture: int, place: tuple[int, int], ground: int) -> np.ndarray:
        """[SIDE, SIDE, 3] uint8: a picture at a place (down, right), each below PLACES, on one of GROUNDS."""
        edge = (STRIDE * (PLACES - 1) + DRAWN - SIDE) // 2  # of margin lies outside at the first and the last place
        whole = np.zeros((SIDE + 2 * edge, SIDE + 2 * edge, 4))
        y, x = (STRIDE * n for n in place)
        whole[y : y + DRAWN, x : x + DRAWN] = self.drawn[picture]
        cut = whole[edge : edge + SIDE, edge : edge + SIDE]
        cover = cut[..., 3:] / 255
        mixed = cut[..., :3] * cover + np.array(GROUNDS[ground]) * (1 - cover)
        return mixed.round().astype(np.uint8)

    def plain(self, picture: int) -> np.ndarray:
        """[SIDE, SIDE, 3] uint8: a picture in the middle of white."""
        return self.shown(picture, (PLACES // 2, PLACES // 2), 0)

    def every(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number, image) of every picture at every place on every ground: all the real images there are."""
        for picture in range(len(self)):
            for place in np.ndindex(PLACES, PLACES):
                for ground in range(len(GROUNDS)):
                    yield picture, self.shown(picture, place, ground)

    def captions(self) -> tuple[list[Caption], list[Caption]]:
        """(of training, held out), each text the caption of one picture alone and on one side alone.

        Training: the name, other names but the last, the name without small words, and in WORDED. Held out: the last
        of the other names, and the name in HELD_OUT_WORDING.
        """
        train, held_out = list[Caption](), list[Caption]()
        for i, (name, others) in enumerate(zip(self.names, self.aliases, strict=True)):
            others = tuple(dict.fromkeys(other for other in others if other != name))
            short = " ".join(word for word in name.split() if word not in SMALL_WORDS)
            train.append(Caption(name, i, "name"))
            train += [Caption(other, i, "alias") for other in others[:-1]]
            train += [Caption(short, i, "shortened")] if short not in ("", name) else []
            train += [Caption(worded.format(name), i, "reworded") for worded in WORDED]
            held_out += [Caption(other, i, "alias") for other in others[-1:]]
            held_out.append(Caption(HELD_OUT_WORDING.format(name), i, "reworded"))
        texts = Counter(c.text for c in (*train, *held_out))
        alone = lambda c: texts[c.text] == 1 or c.kind == "name"  # noqa: E731
        known = {c.text for c in train if c.kind == "name"}
        return [c for c in train if alone(c)], [c for c in held_out if alone(c) and c.text not in known]


def write_gallery(folder: Path, gallery: Gallery, variants: int, seed: int = 0) -> None:
    """Write `variants` images of each training caption, at random places and grounds, as N.png with N.txt: a source
    that `emf train --data.sources` reads."""
    rng = np.random.default_rng(seed)
    with whole_folder(folder) as part:
        part.mkdir(exist_ok=True)
        for i, caption in enumerate(c for c in gallery.captions()[0] for _ in range(variants)):
            down, right = rng.integers(PLACES, size=2).tolist()
            image = gallery.shown(caption.picture, (down, right), int(rng.integers(len(GROUNDS))))
            Image.fromarray(image).save(part / f"{i:05d}.png")
            (part / f"{i:05d}.txt").write_text(caption.text, encoding="utf-8")


def check_gallery(folder: Path, gallery: Gallery, variants: int, who: str) -> None:
    """Raises ValueError, naming the first file, where something is missing, torn or another in a folder that
    write_gallery wrote. who: how the error begins."""
    captions = (c.text for c in gallery.captions()[0] for _ in range(variants))
    for i, caption in enumerate(captions):
        image, text = (folder / f"{i:05d}{kind}" for kind in (".png", ".txt"))
        try:
            fault = "" if open_image(image).size == (SIDE, SIDE) else f"{image} is of another size"
            fault = fault or ("" if read_text(text) == caption else f"{text} is not the caption {caption!r}")
        except ValueError as error:
            fault = str(error)
        if fault:
            raise ValueError(f"{who}: {fault}; move {folder} away, and it is made anew")
