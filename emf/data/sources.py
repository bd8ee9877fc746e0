"""Where image-text samples lie: webdataset tars, Parquet files and folders, scanned once into an index.

A scan opens no image: it lists what a sample's image and caption are in (file, offset, size), so that any sample is one
seek away, in tars too; of Parquet files it lists (file, row group, row), from their footers alone. What cannot become a
sample is dropped, named and counted (Drops).
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from emf.data.drops import Drops
from emf.data.tables import BadTable, Table, read_footer
from emf.data.tars import NO_DATA, TarListings
from emf.files import why

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
PACKED: dict[Literal["tar", "parquet"], str] = {"tar": "tars", "parquet": "Parquet files"}
"""Endings of files that hold many samples each, and what those are called."""

CAPTION_BYTES = 256
"""Of a row's captions, about, which a Parquet file does not say before it is read."""
MOST_NAMES = 1_000_000
"""Files that the braces of one source may name."""

Entry = tuple[int, int, int]
"""(number of the file, offset, size), in bytes."""


@dataclass(frozen=True)
class Source:
    """One part of a mixture. Raises ValueError on a weight that is no positive number."""

    path: str
    """A tar or a Parquet file, a pattern of either (`{000..063}`, `*`), a folder of either, or a folder of images with
    a caption file of the same name beside each."""
    weight: float = 1.0
    """Share of the samples drawn from here, relative to the other sources'; the size of a source plays no part."""
    caption: str | None = None
    """The caption's key in a json file; none: "caption", else "text", and a txt file goes before a json. In Parquet
    files a column's name; see emf.data.tables.columns."""

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
    """[n, 3] int64: an Entry for each sample; with a table (number of the file, row group, row in it)."""
    caption: np.ndarray
    """[n, 3] int64; with a table the same as image."""
    is_json: np.ndarray
    """[n] bool: the caption's file is json."""
    caption_bytes: int
    """Of all captions together, about."""
    table: Table | None = None
    """What reads the samples, where they are rows of Parquet files."""
    runs: list[int] | None = None
    """How many samples are read together, from the first to the last; none: each is one seek away."""

    def __len__(self) -> int:
        return len(self.keys)

    def stamp(self, row: int) -> int:
        """A number that another image of the same key would probably change: the bytes of the image, or those of the
        Parquet file that it is in."""
        number, _, size = self.image[row].tolist()
        return size if self.table is None else os.path.getsize(self.files[number])


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


Kind = Literal["tar", "parquet", "folder"]


def find_files(path: str, drops: Drops) -> tuple[Kind, str, list[str]]:
    """(what a source's files are, their root, the files in a fixed order). Raises ValueError where there is
    nothing, and on what is not on a disk."""
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"data: {path} is no path; copy the files to a disk first (any sample must be one seek away)")
    if os.path.isdir(path):
        files = walk(path, drops)
        found: dict[Kind, list[str]] = {kind: [f for f in files if extension(f) == kind] for kind in PACKED}
        packed = [kind for kind in PACKED if found[kind]]
        held = [PACKED[kind] for kind in packed] + ["images"] * any(extension(f) in IMAGES for f in files)
        if packed and len(held) > 1:
            one = os.path.join(path, f"*.{packed[0]}")
            raise ValueError(f"data: {path} holds {' and '.join(held)}; name one of them, e.g. {one}")
        return (packed[0], path, found[packed[0]]) if packed else ("folder", path, files)
    if os.path.exists(path):
        named = [path]
    else:
        from braceexpand import braceexpand

        ranges = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", path)]
        if math.prod(ranges) > MOST_NAMES:
            raise ValueError(f"data: {path} names {math.prod(ranges):,} files; expected at most {MOST_NAMES:,}")
        try:
            expanded = list(braceexpand(path))
        except ValueError as error:
            raise ValueError(f"data: {path}: {error}") from None
        # what a range of braces names must be there, or be missed; a * names what there is
        named = [f for p in expanded for f in (_there(p) if any(c in p for c in "*?[") else [p])]
    if not any(map(os.path.exists, named)):
        raise ValueError(
            f"data: {path}: no such file or folder; expected a tar, a Parquet file, a pattern of either or a folder"
        )
    kinds = {extension(f) == "parquet" for f in named}
    if len(kinds) > 1:
        raise ValueError(f"data: {path} names Parquet files and others; make two sources of it")
    return (
        "parquet" if kinds == {True} else "tar",
        os.path.commonpath([os.path.dirname(f) or "." for f in named]),
        named,
    )


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


def _completed(progress: Any, task: Any, done: int) -> None:
    progress.update(task, completed=done)


def _file_index(
    parts: Iterator[tuple[int, list[Member]]],
    files: list[str],
    source: Source,
    drops: Drops,
    advance: Callable[[int], None],
) -> Index:
    """The samples of tars or of a folder, in order. advance: is told how many files are done."""
    rows: list[tuple[str, Entry, Entry, bool]] = []
    for number, members in parts:
        rows += _pair(members, source, drops)
        advance(number + 1)
    image, caption = (np.array([row[part] for row in rows], np.int64).reshape(-1, 3) for part in (1, 2))
    how: Any = dict(is_json=np.array([row[3] for row in rows], bool), caption_bytes=int(caption[:, 2].sum()))
    return Index(source, files, [row[0] for row in rows], image, caption, **how)


def _table_index(files: list[str], root: str, source: Source, drops: Drops, advance: Callable[[int], None]) -> Index:
    """The rows of Parquet files, in order. advance: is told how many files are done."""
    keys, entries, held = list[str](), [np.zeros((0, 3), np.int64)], dict[tuple[int, int], int]()
    for number, path in enumerate(files):
        name = printable(os.path.relpath(path, root))
        try:
            groups = read_footer(path, source.caption)
        except FileNotFoundError:
            drops.add(name, source.path, "missing Parquet file")
        except OSError as error:
            drops.add(name, source.path, "unreadable Parquet file", str(error.strerror))
        except BadTable as error:
            drops.add(name, source.path, error.reason, error.detail)
        else:
            keys += [f"{name}:{row}" for row in range(sum(groups))]
            for group, rows in enumerate(groups):
                place = np.full((rows, 1), number), np.full((rows, 1), group), np.arange(rows)[:, None]
                entries.append(np.concatenate(place, axis=1).astype(np.int64))
            held |= {(number, group): rows for group, rows in enumerate(groups) if rows}
        advance(number + 1)
    every = np.concatenate(entries)
    how: Any = dict(is_json=np.zeros(len(keys), bool), caption_bytes=CAPTION_BYTES * len(keys), runs=[*held.values()])
    return Index(source, files, keys, every, every, **how, table=Table(files, source.caption, held))


def scan(sources: Iterable[Source], drops: Drops, listings: Path | None = None) -> list[Index]:
    """The index of every source, in order; drops takes what is no sample.

    listings: a JSON file to keep the tars' members in; tars that did not change are not read again.
    Raises ValueError on a source without a sample, and on listings where no source is of tars.
    """
    from emf.show.progress import bars

    kept, indices, some_tars = TarListings(listings), list[Index](), False
    with bars(transient=True) as progress:
        for source in sources:
            kind, root, files = find_files(source.path, drops)
            some_tars |= kind == "tar"
            task = progress.add_task(f"scan {source.path}", total=1 if kind == "folder" else len(files))
            advance = partial(_completed, progress, task)
            if kind == "parquet":
                index = _table_index(files, root, source, drops, advance)
            else:
                members_of = _tar_members if kind == "tar" else _folder_members
                index = _file_index(members_of(files, root, source, drops, kept), files, source, drops, advance)
            if not len(index):
                lost = "; ".join(line.partition(": ")[2] for line in drops.lines() if line.startswith(source.path))
                raise ValueError(
                    f"data: {source.path} holds no image with a caption; expected tars or a folder of "
                    f"{'/'.join(IMAGES)} with {' or '.join(CAPTIONS)} of the same name, or Parquet files"
                    f"{f' ({lost})' if lost else ''}"
                )
            indices.append(index)
    if listings and indices and not some_tars:
        raise ValueError(
            f"data: listings {listings} would keep what is in tars, and no source is of tars; leave it out"
        )
    kept.save()
    if not indices:
        raise ValueError("data: no source; name at least one tar, Parquet file, pattern of either or folder")
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
    tars = [file for kind, _, files in found if kind == "tar" for file in files if os.path.exists(file)]
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
