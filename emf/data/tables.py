"""Parquet files of images with captions, as Hugging Face's `datasets` writes them: a row is a sample.

The footer of a file says how many rows each of its row groups has, so nothing else is read to scan it. The cells of a
row group are compressed together, so a row group is what is read at once: those that samples were taken from last are
kept, of 2 x MIXED rows and four at least, and emf.data.mixture draws from about half as many at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from emf.files import why

IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
CAPTIONS = ("caption", "text", "captions", "texts", "txt")
"""Names of columns that are looked for, in this order, where a source names none."""
MIXED = 1024
"""Rows, at least, of the row groups that samples are drawn from at a time, which are two or more."""


class BadTable(ValueError):
    """A Parquet file that cannot be used: `reason` is one of a few, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def library() -> Any:
    """pyarrow. Raises ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError('data: Parquet files need pyarrow; pip install "emf-meanflow[parquet]"') from None
    return pyarrow


def columns(schema: Any, key: str | None) -> tuple[str, list[str]]:
    """(the image's column, the captions' columns) of a table. An image is Hugging Face's struct of `bytes` and `path`,
    or bytes; a caption is text, or a list of texts.

    key: CAPTION, several with commas between, or IMAGE:CAPTION; none: the first of CAPTIONS that is there, and of
    IMAGES, else the only image there is. Raises BadTable where they are not there, or of another kind.
    """
    types = dict(zip(schema.names, schema.types, strict=True))
    has = ", ".join(types) or "none"
    images = [name for name, kind in types.items() if _is_image(kind)]
    image, colon, captions = key.partition(":") if key else ("", "", "")
    if not colon or key in types:  # a column whose own name has a colon
        image, captions = "", key or ""
    if not image:
        structs = [name for name in images if library().types.is_struct(types[name])]
        found = [name for name in IMAGES if name in images][:1] or structs
        if len(found) > 1:
            raise BadTable("several image columns", f"{', '.join(found)}; name one: PATH@WEIGHT@IMAGE:CAPTION")
        image = next(iter(found), "image")
    if image not in images:
        raise BadTable("no image column", f"{image} is not there, or holds no bytes; its columns are {has}")
    if captions:
        names = [captions] if captions in types else captions.split(",")
    else:
        names = [name for name in CAPTIONS if name in types and _is_text(types[name])][:1] or list(CAPTIONS[:1])
    if wrong := [name for name in names if name not in types or not _is_text(types[name])]:
        raise BadTable("no caption column", f"{wrong[0]} is not there, or holds no text; its columns are {has}")
    return image, names


def _is_bytes(kind: Any) -> bool:
    types = library().types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_image(kind: Any) -> bool:
    if not library().types.is_struct(kind):
        return _is_bytes(kind)
    place = kind.get_field_index("bytes")
    return place >= 0 and _is_bytes(kind.field(place).type)


def _is_list(kind: Any) -> bool:
    types = library().types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_text(kind: Any) -> bool:
    types = library().types
    kind = kind.value_type if _is_list(kind) or types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def read_footer(path: str, key: str | None) -> list[int]:
    """The rows of each row group of a Parquet file. Raises FileNotFoundError where it is not
    there, and BadTable where it cannot be used."""
    arrow, size = library(), os.stat(path).st_size
    try:
        with arrow.parquet.ParquetFile(path) as file:
            about = file.metadata
            columns(file.schema_arrow, key)
            # what it says of a row group's columns is not asked for: damaged, that ends the process (pyarrow 26)
            rows = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
    except BadTable:
        raise
    except Exception as error:  # of damaged bytes the library has many kinds
        raise BadTable("unreadable Parquet file", f"{type(error).__name__}: {why(error)[:80]}") from None
    if min(rows, default=0) < 0 or sum(rows) != about.num_rows or sum(rows) > 8 * size:
        raise BadTable("unreadable Parquet file", f"its footer tells of {about.num_rows} rows in {size} bytes")
    return rows


class Table:
    """Rows of Parquet files, at random; any number of threads may read. The row groups that were used last are kept."""

    def __init__(self, files: Sequence[str], key: str | None, rows: dict[tuple[int, int], int]) -> None:
        """rows: of each row group, by the number of its file and its own."""
        self.files, self.key, self.rows = files, key, rows
        self._kept: dict[tuple[int, int], Future[tuple[Any, list[Any]]]] = {}
        self._lock = threading.Lock()

    def image(self, file: int, group: int, row: int) -> bytes:
        """The bytes of a row's image. Raises ValueError("reason: detail") where it has none."""
        cell = self._cell(self._group(file, group)[0], row)
        if cell.is_valid and hasattr(cell, "keys"):  # a struct, as Hugging Face's Image is written
            path, cell = cell.get("path"), cell["bytes"]
            if not cell.is_valid and path is not None and path.is_valid:
                detail = f"it names {path.as_py()}; write the data set with its images embedded"
                raise ValueError(f"image not in the Parquet file: {detail}")
        if not cell.is_valid:
            raise ValueError("no image:")
        data: bytes = cell.as_buffer().to_pybytes()
        return data

    def captions(self, file: int, group: int, row: int) -> list[bytes]:
        """The bytes of a row's captions, in the order of their columns and lists; null is absent. Raises
        ValueError("reason: detail") where the row cannot be read."""
        cells = [text for column in self._group(file, group)[1] for text in self._texts(self._cell(column, row))]
        return [cell.as_buffer().to_pybytes() for cell in cells if cell.is_valid]

    def _texts(self, cell: Any) -> Iterator[Any]:
        if not _is_list(cell.type):
            yield cell
        elif cell.is_valid:
            yield from cell.values

    def _cell(self, column: Any, row: int) -> Any:
        if row >= len(column):
            raise ValueError("file cannot be read: it has fewer rows than when it was scanned")
        return column[row]

    def _group(self, file: int, group: int) -> tuple[Any, list[Any]]:
        """A row group's columns of images and captions. Of threads that ask for one at once, the first reads it."""
        with self._lock:
            found = self._kept.pop((file, group), None)
            waiting: Future[tuple[Any, list[Any]]] = found or Future()
            self._kept[file, group] = waiting  # the last of them, so that it stays longest
            while len(self._kept) > 4 and sum(self.rows[place] for place in self._kept) > 2 * MIXED:
                self._kept.pop(next(iter(self._kept)))
        if found is None:
            try:
                waiting.set_result(self._read(self.files[file], group))
            except BaseException as error:
                waiting.set_exception(error)
                with self._lock:  # a disk may be well again the next time
                    if self._kept.get((file, group)) is waiting:
                        del self._kept[file, group]
        return waiting.result()

    def _read(self, path: str, group: int) -> tuple[Any, list[Any]]:
        arrow = library()
        try:
            with arrow.parquet.ParquetFile(path) as file:
                image, captions = columns(file.schema_arrow, self.key)
                table = file.read_row_group(group, columns=[image, *captions], use_threads=False)
            table.validate(full=True)  # a damaged page may hold offsets that lead out of it
            texts = [table.column(name) for name in captions]
            texts = [t.cast(t.type.value_type) if arrow.types.is_dictionary(t.type) else t for t in texts]
            return table.column(image), texts
        except Exception as error:  # of damaged bytes the library has many kinds
            raise ValueError(f"row group cannot be read: {type(error).__name__}: {why(error)[:80]}") from None
