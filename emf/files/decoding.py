"""A user's images, opened in one way."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from emf.files.reading import read_bytes, why

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112
"""EXIF's tag of it."""
ORIENTED = b"eXIf", b"exif", b"tiff:Orientation", b"XML:com.adobe.xmp"
"""One of these is in a PNG file that says how it is turned, the last where it says so compressed."""


class BrokenImage(ValueError):
    """An image that cannot be used: `reason` is one of a few, `detail` says more, and the text names the image."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name} cannot be read as an image: {reason}{f' ({detail})' if detail else ''}")
        self.reason, self.detail = reason, detail


def open_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """An image file, or its bytes, as upright RGB: EXIF orientation obeyed, transparency on white, greyscale, palettes,
    CMYK and 16 bits converted; of an animation the first frame. Colour profiles are not applied.

    name: for the error; default: the file's. Raises ValueError where there is no such file or it may not be read, and
    BrokenImage, a ValueError, where it is empty, cut short, damaged, too large or of none of FORMATS.
    """
    name = name or (str(source) if isinstance(source, Path) else "an image")
    return _opened(read_bytes(source) if isinstance(source, Path) else source, name, _upright)


def image_size(data: bytes, name: str = "an image") -> tuple[int, int]:
    """(width, height) of an image file's bytes, upright, without decoding it where its header tells. Raises BrokenImage
    as open_image does, as far as the header shows it."""
    return _opened(data, name, lambda image: _upright_size(image, data))


T = TypeVar("T")


def _opened(data: bytes, name: str, made: Callable[[Image.Image], T]) -> T:
    """made(image) of an image file's bytes, whatever goes wrong as BrokenImage."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BrokenImage(name, "empty image file", "")
    try:
        return made(Image.open(io.BytesIO(data), formats=FORMATS))
    except UnidentifiedImageError:
        raise BrokenImage(name, "corrupt image", f"no {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BrokenImage(name, "image too large", why(error)) from None
    except Exception as error:  # Pillow's readers meet broken bytes with many kinds, struct.error to SyntaxError
        raise BrokenImage(name, "corrupt image", f"{type(error).__name__}: {why(error)[:80]}") from None


def _upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    if image.format == "PNG" and not any(mark in data for mark in ORIENTED):
        return image.size  # whose orientation may stand behind the pixels, so Pillow would decode all to look for it
    turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _upright(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
