"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emf.files.reading import check_readable, files_in, why

MARKER = ".emf-part"
"""A file in an unfinished folder: what holds it was made here and may be removed."""


@contextmanager
def whole_file(path: Path, writer: int | None = None) -> Iterator[Path]:
    """A file beside `path`, there and empty, to write to; it takes the place of `path` when the block ends, and is
    removed where the block raises. It has the mode that the umask gives, whatever the block's writer sets.

    writer: the number of this process, where several write the same file at the same time.
    The file's name ends in .part, so a writer that goes by names must be told its format.
    Raises ValueError where it cannot be written: a full disk, a folder that may not be written to.
    """
    part = path.with_name(f"{path.name}.part" if writer is None else f"{path.name}.{writer}.part")
    make_folder(path.parent)
    try:
        part.unlink(missing_ok=True)  # of a killed process: it would lend the file its mode
        part.open("wb").close()
        mode = part.stat().st_mode & 0o777
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {why(error)}") from None
    try:
        with written(path, part):
            yield part
            part.chmod(mode)
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def written(path: Path, part: Path | None = None, who: str = "") -> Iterator[None]:
    """A block that writes the file or folder `path`, at first as `part`. Raises ValueError, its text beginning with
    `who`, where that fails, whatever writes: a full disk, a folder that may not be written to."""
    try:
        yield
    except Exception as error:
        if reason := not_written(error, part or path):
            raise ValueError(f"{who}{path} cannot be written: {reason}") from None
        raise


def not_written(error: BaseException, part: Path | None = None) -> str | None:
    """Why `part`, or something, could not be written; None where the error is about something else. The writers of
    torch and safetensors have errors of their own, which are known by name and text so that neither library is
    imported."""
    if isinstance(error, OSError):
        ours = error.filename is None or (part is not None and str(error.filename).startswith(str(part)))
        return why(error) if ours else None
    if type(error).__name__ == "SafetensorError":
        return str(error)
    if isinstance(error, RuntimeError) and ("unexpected pos" in str(error) or "PytorchStreamWriter" in str(error)):
        return "the disk is full, or the file was cut"
    return None


def write_text(path: Path, text: str, writer: int | None = None) -> None:
    """A whole file of `text` in UTF-8; half of a surrogate pair is written as its escape. See whole_file."""
    with whole_file(path, writer) as part:
        part.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(
    path: Path, tree: Any, *, indent: int | None = 1, sort_keys: bool = False, writer: int | None = None
) -> None:
    """A whole file of JSON, null in place of nan and of infinities. See whole_file."""
    text = json.dumps(finite(tree), indent=indent, sort_keys=sort_keys, allow_nan=False)
    write_text(path, text + "\n", writer)


def finite(tree: Any) -> Any:
    """The same tree as JSON can hold it: names as text, tuples as lists, null in place of nan and of infinities."""
    if isinstance(tree, dict):
        return {k if isinstance(k, str) else json.dumps(k): finite(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def make_folder(path: Path) -> None:
    """A folder and those above it, where they are missing. Raises ValueError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{path} is no folder") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be made a folder: {why(error)}") from None


def check_writable(path: Path, who: str = "") -> None:
    """Raises ValueError, its text beginning with `who`, where the file or folder `path` could not be written or made:
    what is above it is no folder, or may not be written to. Asked before work that would be lost."""
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    above = there if there.is_dir() else there.parent if there == path else None
    if above is None:
        raise ValueError(f"{who}{path} cannot be written: {there} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{who}{path} cannot be written: {above} may not be written to")


def refuse_existing(out: Path, who: str = "") -> None:
    """Raises ValueError, its text beginning with `who`, where `out` is taken, a dangling link included, where it lies
    among the checkpoints of a run, which training removes and takes for its own, and where it could not be written."""
    if os.path.lexists(out):
        raise ValueError(f"{who}{out} exists; choose another --out")
    for above in out.resolve().parents:
        if above.name == "checkpoints" and (above.parent / "config.json").is_file():
            raise ValueError(f"{who}{out} lies among the checkpoints of the run {above.parent}; choose another --out")
    check_writable(out, who)


def copy_file(source: Path | str, target: Path | str) -> None:
    """A copy of a file, or of the file that a link leads to, that shares nothing with it but unwritten blocks, where
    the file system can do that: a change of the one never changes the other. Its mode is the umask's. Raises
    ValueError where there is no such file, or it may not be read; errors of writing are the system's."""
    check_readable(Path(source))
    with open(source, "rb") as read, open(target, "wb") as write:
        try:
            while os.copy_file_range(read.fileno(), write.fileno(), 2**30):
                pass
        except (OSError, AttributeError):  # across file systems, or a system that has no such call
            read.seek(write.seek(0, os.SEEK_END))
            shutil.copyfileobj(read, write, 2**24)


def copy_folder(source: Path, target: Path) -> None:
    """A copy of a folder and of all in it, of links what they lead to, by copy_file. Raises ValueError where something
    of it may not be read, or a link leads nowhere; errors of writing are the system's."""
    target.mkdir()
    for entry in files_in(source, "*"):
        if entry.is_dir():
            copy_folder(entry, target / entry.name)
        else:
            copy_file(entry, target / entry.name)


@contextmanager
def whole_folder(out: Path, who: str = "") -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` when the block ends, and removed where it raises. What a
    kill left of an earlier one is replaced. Its files have the mode that the umask gives, whatever the block's writers
    set: safetensors' lets none but the owner read.

    Raises ValueError, its text beginning with `who`, where `out` exists or cannot be written, and where a folder of
    somebody else's is in the way.
    """
    refuse_existing(out, who)
    part = out.with_name(out.name + ".part")
    if os.path.lexists(part):
        if not (part / MARKER).is_file():
            raise ValueError(f"{who}{part} is in the way and not ours; move it")
        shutil.rmtree(part)
    try:
        part.mkdir(parents=True)
        (part / MARKER).touch()
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"{who}{out} cannot be written: {why(error)}") from None
    try:
        with written(out, part, who):
            yield part
        refuse_existing(out, who)
        mode = (part / MARKER).stat().st_mode & 0o777
        for file in part.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
        (part / MARKER).unlink()
        part.rename(out)
    except Exception:  # whoever interrupts or kills has no time for it: the next call removes what is left
        shutil.rmtree(part, ignore_errors=True)
        raise
