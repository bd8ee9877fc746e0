"""Images as samples: every kind of picture becomes upright RGB, and its crop is the centre."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_files import encoded, noise
from PIL import Image

from emf.data.images import centre_crop
from emf.files import open_image


def test_a_crop_is_the_centre_at_full_scale() -> None:
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 48, 32))  # the centre square
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        crop = centre_crop(picture, 16)
        assert crop.shape == (3, 16, 16) and crop.dtype == torch.float32
        inner = crop[:, 2:-2, 2:-2]
        torch.testing.assert_close(inner, torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand_as(inner))


def test_a_crop_is_resizing_and_cutting() -> None:
    picture = noise(0, 48, 32)  # 3:2, so that the resized long side is a whole number of pixels
    crop = centre_crop(picture, 16)
    whole = np.asarray(picture.resize((24, 16), Image.Resampling.BICUBIC))[:, 4:20]
    assert np.abs(((crop.numpy() + 1) * 127.5).transpose(1, 2, 0) - whole).max() <= 1.01  # of 255
    same = centre_crop(noise(1, 16, 16), 16)  # nothing to do
    assert torch.equal(same, torch.tensor(np.asarray(noise(1, 16, 16))).permute(2, 0, 1).float() / 127.5 - 1)


def test_a_crop_is_antialiased_and_a_small_picture_enlarged() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert centre_crop(Image.fromarray(stripes), 16).abs().max() < 0.1  # grey, no aliases
    assert centre_crop(noise(0, 8, 12), 32).shape == (3, 32, 32)


def colours(image: Image.Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return image.getpixel((1, 1)), image.getpixel((image.width - 2, image.height - 2))


def two_halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def with_transparent_index() -> bytes:
    image = two_halves("P", 0, 1)
    image.putpalette([10, 200, 30, 250, 0, 0])
    return encoded(image, transparency=1)


KINDS = ["jpeg", "webp", "palette", "grey", "bilevel", "grey-alpha", "alpha", "half-alpha-webp", "transparent-index"]
KINDS += ["cmyk", "16-bit"]


@pytest.mark.parametrize(
    ("data", "first", "last"),
    [
        (encoded(two_halves("RGB", "red", "blue"), "jpeg", quality=95, subsampling=0), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("RGB", "red", "blue"), "webp", lossless=True), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("RGB", "red", "blue").convert("P")), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("L", 200, 50)), (200,) * 3, (50,) * 3),
        (encoded(two_halves("1", 1, 0)), (255,) * 3, (0,) * 3),
        (encoded(two_halves("LA", (200, 255), (200, 0))), (200,) * 3, (255,) * 3),
        (encoded(two_halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))), (255, 0, 0), (255,) * 3),
        (encoded(two_halves("RGBA", (0, 0, 0, 128), (0, 0, 0, 0)), "webp", lossless=True), (127,) * 3, (255,) * 3),
        (with_transparent_index(), (10, 200, 30), (255,) * 3),
        (encoded(two_halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "jpeg"), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("I;16", 200 * 257, 50 * 257)), (200,) * 3, (50,) * 3),
    ],
    ids=[
        "jpeg",
        "webp",
        "palette",
        "grey",
        "bilevel",
        "grey-alpha",
        "alpha",
        "half-alpha-webp",
        "transparent-index",
        "cmyk",
        "16-bit",
    ],
)
def test_every_kind_of_picture_becomes_rgb(data: bytes, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    image = open_image(data)
    assert image.mode == "RGB" and image.size == (16, 16)
    np.testing.assert_allclose(colours(image), (first, last), atol=3)


@pytest.mark.parametrize(("orientation", "back"), [(3, 2), (6, 4), (8, 3)])
def test_exif_orientation_is_obeyed(orientation: int, back: int) -> None:
    upright = two_halves("RGB", "red", "blue").resize((32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright.transpose({3: Image.Transpose.ROTATE_180, 6: 2, 8: 4}[orientation])
    image = open_image(encoded(turned, "jpeg", quality=95, subsampling=0, exif=exif))
    assert image.size == (32, 16)
    np.testing.assert_allclose(colours(image), [(255, 0, 0), (0, 0, 255)], atol=3)
