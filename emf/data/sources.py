"""Where image-text samples lie: webdataset tars and folders, scanned once into an index of bytes.

A scan opens no image: it lists what a sample's image and caption are in (file, offset, size), so that any sample is one
seek away, in tars too. What cannot become a sample is dropped, named and counted (Drops).
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emf.data.drops import Drops
from emf.data.tars import NO_DATA, TarListings
from emf.files import why

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")

Entry = tuple[int, int, int]
"""(number of the file, offset, size), in bytes."""


@dataclass(frozen=True)
class Source:
    """One part of a mixture. Raises ValueError on a weight that is no positive number."""

    path: str
    """A tar, a pattern of tars (`{000..063}`, `*`), a folder of tars, or a folder of images with a caption file of the
    same name beside each."""
    weight: float = 1.0
    """Share of the samples drawn from here, relative to the other sources'; the size of a source plays no part."""
    caption: str | None = None
    """The caption's key in a json file; none: "caption", else "text", and a txt file goes before a json."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"data: weight {self.weight} of {self.path} must be a positive number")


def parse_source(text: str) -> Source:
    """`PATH`, `PATH@WEIGHT` or `PATH@WEIGHT@KEY`, as on a command line or in a config; a path that ends in an @ and a
    number of its own needs its weight said. Raises ValueError on a weight that is not positive."""
    head, at, key = text.rpartition("@")
    path, second, weight = head.rpartition("@")
    try:
        if second:
            return Source(path, float(weight), key)
    except ValueError as error:
        if str(error).startswith("data:"):
            raise
    try:
        return Source(head, float(key)) if at else Source(text)
    except ValueError as error:
        if str(error).startswith("data:"):
            raise
        return Source(text)  # an @ of the path's own


@dataclass(frozen=True)
class Index:
    """The samples of one source, in a fixed order."""

    source: Source
    files: list[str]
    keys: list[str]
    """Names a person can find: path under the source's root, in a tar followed by `:` and the member's key."""
    image: np.ndarray
    """[n, 3] int64: an Entry for each sample."""
    caption: np.ndarray
    """[n, 3] int64."""
    is_json: np.ndarray
    """[n] bool: the caption's file is json."""

    def __len__(self) -> int:
        return len(self.keys)


def walk(root: str, drops: Drops) -> list[str]:
    """Every file under root, sorted; links to folders are followed, each folder is read once."""

    def unreadable(error: OSError) -> None:
        drops.add(os.path.relpath(error.filename, root), root, "folder cannot be read", str(error.strerror))

    files, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        files += [os.path.join(folder, name) for name in names]
    return sorted(files)


def find_files(path: str, drops: Drops) -> tuple[bool, str, list[str]]:
    """(whether they are tars, their root, the files of a source in a fixed order). Raises ValueError where there is
    nothing, and on what is not on a disk."""
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"data: {path} is no path; copy the tars to a disk first (any sample must be one seek away)")
    if os.path.isdir(path):
        files = walk(path, drops)
        tars = [f for f in files if f.endswith(".tar")]
        if tars and any(extension(f) in IMAGES for f in files):
            raise ValueError(
                f"data: {path} holds tars and images; name one of them, e.g. {os.path.join(path, '*.tar')}"
            )
        return bool(tars), path, tars or files
    if os.path.exists(path):
        found = [path]
    else:
        from braceexpand import braceexpand

        try:
            expanded = list(braceexpand(path))
        except ValueError as error:
            raise ValueError(f"data: {path}: {error}") from None
        # what a range of braces names must be there, or be missed; a * names what there is
        found = [f for p in expanded for f in (_there(p) if any(c in p for c in "*?[") else [p])]
    if not any(map(os.path.exists, found)):
        raise ValueError(f"data: {path}: no such file or folder; expected a tar, a pattern of tars or a folder")
    return True, os.path.commonpath([os.path.dirname(f) or "." for f in found]), found


def _there(pattern: str) -> list[str]:
    """The files of a pattern, in order. Where it names none as it stands, its brackets are taken for letters, as in
    set[1]/*.tar."""
    return sorted(glob.glob(pattern) or glob.glob(pattern.replace("[", "[[]")))


def printable(name: str) -> str:
    """A file's name with bytes that are no UTF-8 written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


Member = tuple[str, str, str, Entry]
"""(key that a sample's parts share, what is said of the part when it is dropped, extension, where it is)."""


def _tar_members(
    files: list[str], root: str, source: Source, drops: Drops, listings: TarListings
) -> Iterator[tuple[int, list[Member]]]:
    for number, path in enumerate(files):
        name = os.path.relpath(path, root)
        try:
            members, problem = listings.read(path)
        except FileNotFoundError:
            drops.add(name, source.path, "missing tar")
            continue
        except OSError as error:
            drops.add(name, source.path, "unreadable tar", str(error.strerror))
            continue
        if problem:
            detail = f"{problem}; {len(members)} whole members before it"
            drops.add(name, source.path, "truncated or broken tar" if members else "unreadable tar", detail)
        found: list[Member] = []
        for member, offset, size in members:
            if (offset, size) == NO_DATA:
                drops.add(printable(f"{name}:{member}"), source.path, "link or special file in a tar")
                continue
            # webdataset's rule: the key ends at the first dot of the last part of the name
            folder, _, base = member.rpartition("/")
            stem, _, ending = base.partition(".")
            key = f"{name}:{folder}/{stem}" if folder else f"{name}:{stem}"
            found.append((printable(key), printable(f"{name}:{member}"), ending.lower(), (number, offset, size)))
        yield number, found


def _folder_members(
    files: list[str], root: str, source: Source, drops: Drops, _: TarListings
) -> Iterator[tuple[int, list[Member]]]:
    found: list[Member] = []
    for number, path in enumerate(files):
        name = printable(os.path.relpath(path, root))
        try:
            found.append((os.path.splitext(name)[0], name, extension(name), (number, 0, os.path.getsize(path))))
        except OSError as error:  # a link to nothing
            drops.add(name, source.path, "file cannot be read", str(error.strerror))
    yield 0, found


def _pair(members: Iterable[Member], source: Source, drops: Drops) -> Iterator[tuple[str, Entry, Entry, bool]]:
    """Parts of one tar or folder -> (key, image, caption, caption is json)."""
    parts: dict[str, dict[str, Entry]] = {}
    for key, name, ending, entry in members:
        kinds = parts.setdefault(key, {})
        image = ending in IMAGES
        taken = "image" if image else ending
        if taken in kinds and (image or ending in CAPTIONS):
            drops.add(name, source.path, "second image" if image else "second caption")
            continue
        kinds[taken] = entry
    for key, kinds in parts.items():
        captions = [kind for kind in CAPTIONS if kind in kinds]
        if source.caption is not None:
            captions = captions[::-1]
        if "image" in kinds and captions:
            yield key, kinds["image"], kinds[captions[0]], captions[0] == "json"
        else:
            missing = "no caption" if "image" in kinds else "no image" if captions else "neither image nor caption"
            drops.add(key, source.path, missing)


def scan(sources: Iterable[Source], drops: Drops, listings: Path | None = None) -> list[Index]:
    """The index of every source, in order; drops takes what is no sample.

    listings: a JSON file to keep the tars' members in; tars that did not change are not read again.
    Raises ValueError on a source without a sample, and on listings where no source is of tars.
    """
    from emf.show.progress import bars

    kept, indices, some_tars = TarListings(listings), list[Index](), False
    with bars(transient=True) as progress:
        for source in sources:
            tars, root, files = find_files(source.path, drops)
            some_tars |= tars
            task = progress.add_task(f"scan {source.path}", total=len(files) if tars else 1)
            rows: list[tuple[str, Entry, Entry, bool]] = []
            members_of = _tar_members if tars else _folder_members
            for number, members in members_of(files, root, source, drops, kept):
                rows += _pair(members, source, drops)
                progress.update(task, completed=number + 1)
            if not rows:
                lost = "; ".join(line.partition(": ")[2] for line in drops.lines() if line.startswith(source.path))
                raise ValueError(
                    f"data: {source.path} holds no image with a caption; expected tars or a folder of "
                    f"{'/'.join(IMAGES)} with {' or '.join(CAPTIONS)} of the same name{f' ({lost})' if lost else ''}"
                )
            keys, image, caption, is_json = zip(*rows, strict=True)
            entries = np.array(image, np.int64), np.array(caption, np.int64)
            indices.append(Index(source, files, list(keys), *entries, np.array(is_json, bool)))
    if listings and indices and not some_tars:
        raise ValueError(
            f"data: listings {listings} would keep what is in tars, and no source is of tars; leave it out"
        )
    kept.save()
    if not indices:
        raise ValueError("data: no source; name at least one tar, pattern of tars or folder")
    return indices


CHEAP = 4 * 2**30
"""Bytes of tars whose members are listed for a count alone: seconds."""


def is_there(source: Source) -> bool:
    """Whether something of a source is on this machine's disks; of what is no path it is not asked."""
    if os.path.exists(source.path) or "://" in source.path or source.path.startswith("pipe:"):
        return True
    try:
        return bool(find_files(source.path, Drops()))
    except ValueError:
        return False


def count_samples(sources: Sequence[Source], listings: Path | None = None) -> int | None:
    """How many samples there are, the unusable among them; None where to tell it would take long: tars of more than
    CHEAP bytes that are not in the listings. Writes nothing. Raises ValueError on a source without a sample."""
    kept, found = TarListings(listings), [find_files(source.path, Drops()) for source in sources]
    tars = [file for are_tars, _, files in found if are_tars for file in files if os.path.exists(file)]
    unknown = sum(os.path.getsize(file) for file in tars if not kept.knows(file))
    if unknown > CHEAP:
        return None
    return sum(map(len, scan(sources, Drops(), None if unknown else listings)))


def read_part(index: Index, entry: np.ndarray, ends: int | None = None) -> bytes:
    """The bytes of a sample's image or caption, of which the index has the entry [3]; with `ends` as many from its
    beginning and from its end alone. Raises ValueError("file cannot be read: why") where they are not there any more,
    or not all of them."""
    number, offset, size = entry.tolist()
    parts = [(offset, size)] if ends is None or size <= 2 * ends else [(offset, ends), (offset + size - ends, ends)]
    data = b""
    try:
        with open(index.files[number], "rb") as file:
            for start, length in parts:
                file.seek(start)
                data += file.read(length)
    except OSError as error:
        raise ValueError(f"file cannot be read: {why(error)}") from None
    if len(data) < sum(length for _, length in parts):
        raise ValueError("file cannot be read: it became shorter since it was scanned")
    return data
