"""What lies in a tar: its members' names and places, read once and kept between runs."""

from __future__ import annotations

import os
import posixpath
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from emf.files import read_json, write_json

NO_DATA = (-1, -1)
"""Place and size of a member without data of its own that can be read: a link that leads out of the tar, a sparse or a
special file."""


def read_tar(path: str) -> tuple[list[tuple[str, int, int]], str]:
    """(whole members as (name, offset of the data, size), what is wrong with the tar or "").

    A tar that ends early, or has an unreadable header, gives the members before that place. Tars that were put
    together (`cat a.tar b.tar`) are read one after the other. A link has the place and size of what it leads to, and
    what has no data of its own NO_DATA; folders are left out.
    """
    members: list[tuple[str, int, int]] = []
    links: dict[str, str] = {}
    problem = _read_members(path, members, links)
    if not links:
        return members, problem
    places = {posixpath.normpath(name): (start, size) for name, start, size in members if (start, size) != NO_DATA}
    linked = []
    for name, start, size in members:
        if (start, size) == NO_DATA:
            target, passed = posixpath.normpath(name), set[str]()
            while target in links and target not in passed:
                passed.add(target)
                target = links[target]
            start, size = places.get(target, NO_DATA)
        linked.append((name, start, size))
    return linked, problem


def _read_members(path: str, members: list[tuple[str, int, int]], links: dict[str, str]) -> str:
    """Add to members, and to links (name -> name in the tar), what is in a tar; return what is wrong with it."""
    length = os.path.getsize(path)
    if not length:
        return "empty file"
    start: int | None = 0
    with open(path, "rb") as file:
        while start is not None:
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    # not `for member in tar`: it takes an unreadable header in the middle for the end
                    while (member := tar.next()) is not None:
                        if not member.isreg() or member.issparse():
                            members += [(member.name, *NO_DATA)] * (not member.isdir())
                        elif member.offset_data + member.size <= length:
                            members.append((member.name, member.offset_data, member.size))
                        if member.islnk() or member.issym():
                            name = posixpath.normpath(member.name)
                            beside = posixpath.dirname(name) if member.issym() else ""
                            links[name] = posixpath.normpath(posixpath.join(beside, member.linkname))
                    end = tar.offset
            except (tarfile.TarError, ValueError, EOFError) as error:
                where = f" at byte {start}, after an end mark" if start else ""
                return f"{str(error) or type(error).__name__}{where}"
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                return f"no end mark at byte {end}"
            if any(block):
                return f"unreadable header at byte {end}"
            start = _next_block(file)
    return ""


def _next_block(file: BinaryIO) -> int | None:
    """Where the next tar begins in a file of several that were put together: at its next block that is not zero; none
    where zeros are all that follows."""
    while chunk := file.read(64 * tarfile.BLOCKSIZE):
        if any(chunk):
            first = next(i for i, byte in enumerate(chunk) if byte)
            return file.tell() - len(chunk) + first // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


def _is_listing(item: tuple[str, Any]) -> bool:
    """Whether a tar's listing is what TarListings writes: (size, time, problem, members)."""
    size, time, problem, members = item[1]
    kinds = [isinstance(size, int), isinstance(time, int), isinstance(problem, str), isinstance(members, list)]
    return all(kinds) and all([str, int, int] == [*map(type, member)] for member in members)


class TarListings:
    """Members of tars, kept in a JSON file between runs where one is named: a tar is read again when its size or time
    changed. Raises ValueError where that file exists and is not of this kind."""

    KIND, EARLIER = "emf tar listings 3", ("emf tar listings 1", "emf tar listings 2")
    """The first does not list what follows a tar's first end mark, the second no links: they are made anew."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.changed = file, False
        self.tars: dict[str, list[Any]] = {}
        if file and file.exists():
            try:
                kept = read_json(file)
                self.tars = kept["tars"] if kept["kind"] == self.KIND else {}
                known = kept["kind"] in (self.KIND, *self.EARLIER) and all(map(_is_listing, self.tars.items()))
            except (ValueError, KeyError, TypeError, AttributeError):
                known = False
            if not known:
                raise ValueError(f"data: {file} exists and is no index of tars; name another file")

    def knows(self, path: str) -> bool:
        """Whether a tar, as it is now, is in the file."""
        stat = os.stat(path)
        return self.tars.get(os.path.abspath(path), [])[:2] == [stat.st_size, stat.st_mtime_ns]

    def read(self, path: str) -> tuple[list[tuple[str, int, int]], str]:
        name = os.path.abspath(path)
        if not self.knows(path):
            stat = os.stat(path)
            members, problem = read_tar(path)
            self.tars[name] = [stat.st_size, stat.st_mtime_ns, problem, members]
            self.changed = True
        found = self.tars[name]
        return [(n, o, s) for n, o, s in found[3]], found[2]

    def save(self) -> None:
        if self.file and self.changed:
            write_json(self.file, {"kind": self.KIND, "tars": self.tars}, indent=None, writer=os.getpid())
