"""Images with captions for retrieval: COCO's folders, or tars and folders of image-text pairs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emf.analyze.choices import Choice
from emf.analyze.digit_pairs import SCENES, scenes
from emf.data.drops import Drops
from emf.data.images import captions_of, image_of
from emf.data.sources import Source, scan
from emf.files import BrokenImage, files_in, open_image, read_json, why
from emf.idle import refuse_idle, unless
from emf.show.progress import track


@dataclass(frozen=True)
class Pairs:
    """Captions, several an image perhaps."""

    captions: list[str]
    image: np.ndarray
    """[n] int64: number of each caption's image."""
    keys: list[str]
    """By image: what it is known by."""
    open: Callable[[int], Image.Image]
    """An image by its number, upright RGB. Raises ValueError where it cannot be read."""
    notes: list[str]
    """What was left out, a sentence each."""


def read_pairs(data: Path | None, split: str = "train2017") -> Pairs:
    """COCO's layout where there is annotations/captions_SPLIT.json (COCO 2017: train2017, val2017), else what
    emf.data.sources reads: tars, or a folder of images with texts of the same name; None: the digits' scenes. Raises
    ValueError."""
    if data is None or not (data / "annotations").is_dir():
        refuse_idle("analyze", {"split": unless(split, "train2017")}, "it is of COCO, and --data holds no annotations/")
    if data is None:
        captions, images = scenes(SCENES)
        pictures = [Image.fromarray(image) for image in images]
        keys = [f"scene {n}" for n in range(len(captions))]
        return Pairs(captions, np.arange(len(captions)), keys, pictures.__getitem__, [])
    if not data.exists() and not any(c in data.name for c in "*?[{"):
        raise ValueError(
            f"analyze: {data} does not exist; expected COCO's folder (annotations/captions_{split}.json and {split}/), "
            "or a folder or tars of images with texts"
        )
    if (data / "annotations").is_dir():
        return read_coco(data, split)
    return read_source(str(data))


def read_coco(data: Path, split: str) -> Pairs:
    """COCO captions: those of images that are there, ordered by image and caption number. Raises ValueError."""
    file, folder = data / "annotations" / f"captions_{split}.json", data / split
    for path in (file, folder):
        if not path.exists():
            raise ValueError(
                f"analyze: {path} does not exist; expected COCO's {file.name} in {data / 'annotations'} and the images "
                f"in {folder}, or another --split"
            )
    try:
        tree: dict[str, Any] = read_json(file)
        names = {int(i["id"]): str(i["file_name"]) for i in tree["images"]}
        # null is absent: so data sets write a key that only other rows have
        texts = [(a, a.get("caption") or "") for a in tree["annotations"]]
        if wrong := [text for _, text in texts if not isinstance(text, str)]:
            raise ValueError(f"the caption {wrong[0]!r} is no text")
        every = sorted((int(a["image_id"]), int(a["id"]), text.strip()) for a, text in texts)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else why(error)
        raise ValueError(f"analyze: {file} is no file of COCO captions: {reason}") from None
    there = {path.name for path in files_in(folder, "*")}
    said = [row for row in every if row[2]]
    kept = [(i, text) for i, _, text in said if names.get(i) in there]
    if not kept:
        raise ValueError(f"analyze: {folder} holds none of the {len(names)} images of {file.name}; put them there")
    ids = sorted({i for i, _ in kept})
    number = {i: n for n, i in enumerate(ids)}
    keys = [names[i] for i in ids]
    lost = len({i for i, _, _ in said}) - len(ids)
    notes = [f"{lost} of {lost + len(ids)} images of {file.name} were not there and left out"] if lost else []
    if blank := len(every) - len(said):
        notes.append(f"{blank} of {len(every)} captions of {file.name} were empty and left out")
    image = np.array([number[i] for i, _ in kept], np.int64)

    def opened(i: int) -> Image.Image:
        return open_image(folder / keys[i])

    return Pairs([text for _, text in kept], image, keys, opened, notes)


def read_source(path: str) -> Pairs:
    """One caption an image. What has no usable caption is left out. Raises ValueError where nothing is left."""
    drops = Drops()
    (index,) = scan([Source(path)], drops)
    captions, rows = [], []
    for row in track(range(len(index)), description="captions", disable=len(index) < 1000):
        try:
            captions.append(captions_of(index, row)[0])
        except ValueError as error:
            drops.add(index.keys[row], path, str(error).partition(":")[0])
            continue
        rows.append(row)
    if not rows:
        raise ValueError(f"analyze: {path} holds no usable caption; {'; '.join(drops.lines())}")

    def opened(i: int) -> Image.Image:
        name = f"{path}: {index.keys[rows[i]]}"
        try:
            data = image_of(index, rows[i])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return open_image(data, name)

    keys = [f"{index.keys[row]} {index.stamp(row)}" for row in rows]  # the bytes too: a name may get another image
    return Pairs(captions, np.arange(len(rows)), keys, opened, list(drops.lines()))


def readable(pairs: Pairs, source: str) -> Pairs:
    """The pairs whose image can be read. The others are dropped by name: every image is opened once, before captions
    are encoded for hours. source: what the pairs are of. Raises ValueError where none is left."""
    drops = Drops()

    def look(i: int) -> bool:
        try:
            pairs.open(i)
        except BrokenImage as error:
            drops.add(pairs.keys[i], source, error.reason, error.detail)
        except ValueError as error:
            drops.add(pairs.keys[i], source, "file cannot be read", str(error))
        else:
            return True
        return False

    n = len(pairs.keys)
    with ThreadPoolExecutor() as pool:
        good = np.array(list(track(pool.map(look, range(n)), "images", n, disable=n < 1000)))
    kept = np.flatnonzero(good)
    if not len(kept):
        raise ValueError(f"analyze: {source} holds no image that can be read; {'; '.join(drops.lines())}")
    number, rows = np.cumsum(good) - 1, good[pairs.image]
    captions = [text for text, row in zip(pairs.captions, rows, strict=True) if row]
    keys = [pairs.keys[i] for i in kept]
    return Pairs(
        captions, number[pairs.image[rows]], keys, lambda i: pairs.open(int(kept[i])), [*pairs.notes, *drops.lines()]
    )


def choose_captions(image: np.ndarray, choice: Choice, seed: int) -> np.ndarray:
    """Numbers of the captions that are retrieved from and queried: of every image the first, a random one, or all."""
    if choice == "all":
        return np.arange(len(image))
    order = np.arange(len(image))
    if choice == "random":
        order = np.random.default_rng(seed).permutation(order)
    _, first = np.unique(image[order], return_index=True)
    return np.sort(order[first])


def choose_queries(image: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Numbers of captions to query with: one random caption each of `count` random images (None: of every image), so
    that queries are independent."""
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(image))
    _, first = np.unique(image[order], return_index=True)
    one_each = order[first]
    return np.sort(rng.permutation(one_each)[:count])
