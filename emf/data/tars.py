"""What lies in a tar: its members' names and places, read once and kept between runs."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from emf.files import read_json, write_json


def read_tar(path: str) -> tuple[list[tuple[str, int, int]], str]:
    """(whole members as (name, offset of the data, size), what is wrong with the tar or "").

    A tar that ends early, or has an unreadable header, gives the members before that place. Tars that were put
    together (`cat a.tar b.tar`) are read one after the other.
    """
    members: list[tuple[str, int, int]] = []
    length = os.path.getsize(path)
    if not length:
        return members, "empty file"
    start: int | None = 0
    with open(path, "rb") as file:
        while start is not None:
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    # not `for member in tar`: it takes an unreadable header in the middle for the end
                    while (member := tar.next()) is not None:
                        if member.isreg() and member.offset_data + member.size <= length:
                            members.append((member.name, member.offset_data, member.size))
                    end = tar.offset
            except (tarfile.TarError, ValueError, EOFError) as error:
                where = f" at byte {start}, after an end mark" if start else ""
                return members, f"{str(error) or type(error).__name__}{where}"
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                return members, f"no end mark at byte {end}"
            if any(block):
                return members, f"unreadable header at byte {end}"
            start = _next_block(file)
    return members, ""


def _next_block(file: BinaryIO) -> int | None:
    """Where the next tar begins in a file of several that were put together: at its next block that is not zero; none
    where zeros are all that follows."""
    while chunk := file.read(64 * tarfile.BLOCKSIZE):
        if any(chunk):
            first = next(i for i, byte in enumerate(chunk) if byte)
            return file.tell() - len(chunk) + first // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


class TarListings:
    """Members of tars, kept in a JSON file between runs where one is named: a tar is read again when its size or time
    changed. Raises ValueError where that file exists and is not of this kind."""

    KIND, EARLIER = "emf tar listings 2", "emf tar listings 1"
    """An earlier one does not list what follows a tar's first end mark: it is made anew."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.changed = file, False
        self.tars: dict[str, list[Any]] = {}
        if file and file.exists():
            try:
                kept = read_json(file)
                self.tars = kept["tars"] if kept["kind"] == self.KIND else {}
                known = kept["kind"] in (self.KIND, self.EARLIER)
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise ValueError(f"data: {file} exists and is no index of tars; name another file")

    def read(self, path: str) -> tuple[list[tuple[str, int, int]], str]:
        stat, name = os.stat(path), os.path.abspath(path)
        found = self.tars.get(name)
        if found is None or found[:2] != [stat.st_size, stat.st_mtime_ns]:
            members, problem = read_tar(path)
            found = self.tars[name] = [stat.st_size, stat.st_mtime_ns, problem, members]
            self.changed = True
        return [(n, o, s) for n, o, s in found[3]], found[2]

    def save(self) -> None:
        if self.file and self.changed:
            write_json(self.file, {"kind": self.KIND, "tars": self.tars}, indent=None, writer=os.getpid())
