"""An index of image-text samples -> decoded samples: captions as text, images as centre crops.

Images are cropped as EMF's data are (arXiv 2604.18168, released code): the short side resized, the centre cut out, to
[-1, 1].
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emf.data.buckets import LIST, UNREAD, nearest
from emf.data.buckets import sizes as bucket_sizes
from emf.data.drops import Dropped, Drops
from emf.data.sources import Index, Source, read_part, scan
from emf.files import BrokenImage, check_text, decode_text, image_size, open_image, parse_json
from emf.show.progress import track

JSON_KEYS = ("caption", "text")
JPEG = b"\xff\xd8"
"""What a JPEG file begins with."""
HEAD = 65_536
"""Bytes of its beginning in which its size nearly always stands."""
T = TypeVar("T")
R = TypeVar("R")
ENDS = 2048
"""Bytes at either end of an image by which it is known again: a picture that was encoded anew has others."""


@dataclass(frozen=True)
class Sample:
    """An image with its caption: pixels, or what an encoder made of them, or both."""

    key: str
    source: str
    caption: str
    image: Tensor | None = None
    """[3, height, width] float32 in [-1, 1]: a square of one size for all, or of its bucket's size."""
    small: Tensor | None = None
    """[3, token_size, token_size] float32 in [-1, 1]: the square in the centre, for an image tokenizer."""
    width: int = 0
    """Of the image before the crop, upright; 0 where unknown (a cached sample)."""
    height: int = 0
    mean: Tensor | None = None
    """[C, h, w]: the latent; of an autoencoder with a posterior, its mean."""
    std: Tensor | None = None
    """[C, h, w]: the posterior's standard deviation; none where the autoencoder is deterministic."""
    ids: Tensor | None = None
    """[n] int32: image tokens."""
    captions: tuple[str, ...] = ()
    """All of them, where the image has several, of which `caption` is one."""


class Store(Protocol):
    """Samples by (source, index): decoded from images (Images) or read from a cache (emf.data.cache.Cache)."""

    names: list[str]
    counts: list[int]
    weights: list[float]
    runs: list[list[int] | None]
    """Of each source how many samples are read together, from the first to the last; none: each by itself."""
    buckets: list[np.ndarray] | None
    """Of each source the bucket of every sample (emf.data.buckets), [n] int16; UNREAD where its size cannot be read;
    none: all samples have one size."""
    drops: Drops

    def get(self, source: int, index: int, turn: int = 0) -> Sample:
        """The sample, at the turn'th time that its source is gone through: of several captions another one each time
        (turned). Raises Dropped on a sample that cannot be used."""
        ...


def count_buckets(buckets: Sequence[np.ndarray]) -> list[int]:
    """How many samples each bucket has, of all sources together. buckets: of the samples of each source."""
    every = np.concatenate(buckets)
    counts: list[int] = np.bincount(every[every != UNREAD], minlength=len(LIST)).tolist()
    return counts


def check_sizes(store: Store) -> None:
    """Raises ValueError on a source of which no sample has a bucket."""
    for name, buckets in zip(store.names, store.buckets or [], strict=False):
        if not (buckets != UNREAD).any():
            raise ValueError(
                f"data: {name}: none of {len(buckets)} samples has a size that can be read; emf data inspect names "
                "them; leave that source out"
            )


def stamps(store: Store) -> list[str]:
    """Of each source a digest of all that its order hangs on besides weights and seed: how many samples it has, which
    are read together, and the bucket of each. Who has another one trains on other samples at the same step."""
    found = []
    for source, (count, runs) in enumerate(zip(store.counts, store.runs, strict=True)):
        digest = hashlib.sha256(f"{count} {None if runs is None else list(runs)} ".encode())
        if store.buckets is not None:
            digest.update(store.buckets[source].astype("<i2").tobytes())
        found.append(digest.hexdigest()[:16])
    return found


def turned(captions: Sequence[str], index: int, turn: int) -> str:
    """Which of a sample's captions it has at the turn'th time: one after the other, and not the first of all samples in
    the same turn."""
    return captions[(index + turn) % len(captions)]


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """An RGB image -> [3, height, width] float32 in [-1, 1]: the largest part of that ratio, cut out of the centre to a
    fraction of a pixel, resized (bicubic, antialiased; a smaller image is enlarged). size: (width, height), or a
    square's side."""
    width, height = (size, size) if isinstance(size, int) else size
    across, down = part_of(image.size, (width, height))
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = left, top, left + across, top + down
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


def part_of(image: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """(width, height) of the largest part of an image that has the ratio of a size."""
    across, down = image
    width, height = size
    return (across, across * height / width) if across * height <= down * width else (down * width / height, down)


def read_caption(data: bytes, is_json: bool, key: str | None) -> str:
    """A caption file's text, stripped. Raises ValueError("reason: detail"), its reason one of a few, where there is
    none."""
    try:
        text = decode_text(data, "the caption")
    except ValueError as error:
        raise ValueError(f"caption not UTF-8: {error}") from None
    if is_json:
        try:
            tree = parse_json(text, "the caption")
        except ValueError as error:
            raise ValueError(f"caption not JSON: {error}") from None
        keys = JSON_KEYS if key is None else (key,)
        # null is absent: so data sets write a key that only other samples have
        found = [tree[k] for k in keys if tree.get(k) is not None] if isinstance(tree, dict) else []
        if not found or not isinstance(found[0], str):
            raise ValueError(f"no caption in JSON: no text under {' or '.join(map(repr, keys))}")
        text = found[0]
        try:
            check_text(text, "the caption")
        except ValueError as error:
            raise ValueError(f"broken letter in caption: {error}") from None
    if not text.strip():
        raise ValueError("empty caption:")
    return text.strip()


def image_of(index: Index, row: int) -> bytes:
    """The bytes of a sample's image. Raises ValueError("reason: detail"), its reason one of a few, where there is
    none."""
    if index.table is not None:
        return index.table.image(*index.image[row].tolist())
    return read_part(index, index.image[row])


def size_of(index: Index, row: int) -> tuple[int, int]:
    """(width, height) of a sample's image, upright, of which no more is read than is needed: of a JPEG its beginning.
    Raises ValueError where it cannot be read."""
    if index.table is None and int(index.image[row][2]) > HEAD:
        number, offset, _ = index.image[row]
        head = read_part(index, np.array([number, offset, HEAD]))
        if head.startswith(JPEG):
            with suppress(ValueError):  # more stands before its size than is usual
                return image_size(head)
    return image_size(image_of(index, row))


def captions_of(index: Index, row: int) -> list[str]:
    """A sample's captions, the unusable left out. Raises ValueError("reason: detail"), its reason one of a few, where
    none is left."""
    if index.table is None:
        return [read_caption(read_part(index, index.caption[row]), bool(index.is_json[row]), index.source.caption)]
    texts, first = list[str](), ValueError("no caption: the row has none")
    for number, told in enumerate(index.table.captions(*index.caption[row].tolist())):
        try:
            texts.append(read_caption(told, False, None))
        except ValueError as error:
            first = first if number else error
    if not texts:
        raise first
    return texts


class Images:
    """Sources as samples with pixels. Raises ValueError on sources without samples (emf.data.sources.scan)."""

    def __init__(
        self,
        sources: Iterable[Source],
        size: int,
        token_size: int | None = None,
        listings: Path | None = None,
        *,
        buckets: bool = False,
        workers: int = 4,
    ) -> None:
        """size: pixels along a side of the crop; token_size: of the second, small crop, or none; listings: see scan;
        buckets: crop each picture to the size of its bucket, so the sizes of all are read here, by workers threads."""
        if min(size, token_size or 1) < 1:
            raise ValueError(f"data: crops of {size} and {token_size} pixels; expected at least 1")
        self.size, self.token_size, self.drops = size, token_size, Drops()
        self.indices: list[Index] = scan(sources, self.drops, listings)
        self.names = [index.source.path for index in self.indices]
        self.counts = [len(index) for index in self.indices]
        self.weights = [index.source.weight for index in self.indices]
        self.runs = [index.runs for index in self.indices]
        self.upscaled = [np.zeros(n, bool) for n in self.counts]
        """Which of the samples read so far were smaller than the crop."""
        self.sizes = bucket_sizes(size) if buckets else [(size, size)]
        self.buckets = [self._measured(s, workers) for s in range(len(self.counts))] if buckets else None

    def _measured(self, source: int, workers: int) -> np.ndarray:
        """The buckets of a source's samples. What cannot be read is dropped."""
        index, name = self.indices[source], self.names[source]
        found = np.full(len(index), UNREAD, np.int16)

        def measure(row: int) -> Dropped | None:
            try:
                found[row] = nearest(*size_of(index, row))
            except BrokenImage as error:
                return Dropped(index.keys[row], name, error.reason, error.detail)
            except ValueError as error:
                reason, _, detail = str(error).partition(":")
                return Dropped(index.keys[row], name, reason, detail.strip())
            return None

        rows = track(range(len(index)), f"sizes in {name}", transient=True)
        for drop in in_order(rows, measure, workers):
            if drop is not None:
                self.drops.add(drop.key, drop.source, drop.reason, drop.detail)
        return found

    def key(self, source: int, index: int) -> str:
        return self.indices[source].keys[index]

    def mark(self, source: int, index: int) -> int:
        """A digest of what a sample is made of, as a signed number of 64 bits: of its caption and the key that it is
        read by, and of the size and both ends of its image. Another one means another sample; when and where the files
        were written plays no part."""
        where = self.indices[source]
        told, place = f"{where.source.caption} {where.is_json[index]} ", where.image[index].tolist()
        if (table := where.table) is None:
            told += f"{place[2]} "
            parts: list[Callable[[], bytes]] = [
                lambda: read_part(where, where.caption[index]),
                lambda: read_part(where, where.image[index], ENDS),
            ]
        else:  # whose rows are read whole
            parts = [lambda: b"\0".join(table.captions(*place)), lambda: table.image(*place)]
        digest = hashlib.sha256(told.encode())
        for part in parts:
            try:
                digest.update(part())
            except ValueError:  # what cannot be read is no sample, and may be one later
                digest.update(b"unreadable")
        return int.from_bytes(digest.digest()[:8], "little", signed=True)

    def get(self, source: int, index: int, turn: int = 0) -> Sample:
        """The decoded sample; see Store. Raises Dropped."""
        where = self.indices[source]
        key, name = where.keys[index], where.source.path
        try:
            captions = captions_of(where, index)
            image = open_image(image_of(where, index), key)
        except BrokenImage as error:
            raise Dropped(key, name, error.reason, error.detail) from None
        except ValueError as error:
            reason, _, detail = str(error).partition(":")
            raise Dropped(key, name, reason, detail.strip()) from None
        size = self.sizes[0]
        if self.buckets is not None:
            if (bucket := int(self.buckets[source][index])) == UNREAD:
                raise Dropped(key, name, "file cannot be read", "it could not when sizes were read")
            size = self.sizes[bucket]
        self.upscaled[source][index] = part_of(image.size, size)[0] < size[0]
        small = centre_crop(image, self.token_size) if self.token_size else None
        several = tuple(captions) if len(captions) > 1 else ()
        pixels = centre_crop(image, size)
        caption = turned(captions, index, turn)
        return Sample(key, name, caption, pixels, small, image.width, image.height, captions=several)


def marks(images: Images, places: Sequence[tuple[int, int]], workers: int = 4) -> list[int]:
    """The marks of the samples at places (source, index), in their order, read by threads."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda place: images.mark(*place), places))


def fetch(store: Store, places: Iterable[tuple[int, int]], workers: int = 4) -> Iterator[Sample | Dropped]:
    """The samples at places (source, index), in their order, decoded by threads."""

    def get(place: tuple[int, int]) -> Sample | Dropped:
        try:
            return store.get(*place)
        except Dropped as drop:
            return drop

    return in_order(places, get, workers)


def in_order(items: Iterable[T], get: Callable[[T], R], workers: int) -> Iterator[R]:
    """get(item) of all items in their order, by threads that are at most 2 x workers ahead."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(get, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
