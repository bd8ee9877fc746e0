"""Parquet files of images with captions: their columns, their row groups, the order of their samples."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaged import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import by_reason, encoded, noise, pairs, write_folder, write_tar
from parquet_files import image_column, pa, write_parquet

from emf.analyze.pairs import read_source
from emf.data import mixture, tables
from emf.data.cache import Cache, write_cache
from emf.data.caches import Caches
from emf.data.drops import Dropped, Drops
from emf.data.images import Images
from emf.data.inspect import inspect
from emf.data.mixture import Dataset, Mixture
from emf.data.sources import Source, count_samples, find_files

SIZE = 8


def pictures(n: int, first: int = 0) -> list[bytes]:
    return [encoded(noise(i)) for i in range(first, first + n)]


def texts(n: int, first: int = 0) -> list[str]:
    return [f"picture {i}" for i in range(first, first + n)]


def images(path: Path, caption: str | None = None) -> Images:
    return Images([Source(str(path), caption=caption)], SIZE)


def captions(path: Path, caption: str | None = None, turn: int = 0) -> list[str]:
    """The captions of all samples, in order; of a dropped one its reason in brackets."""
    store, found = images(path, caption), []
    for i in range(store.counts[0]):
        try:
            found.append(store.get(0, i, turn).caption)
        except Dropped as drop:
            found.append(f"[{drop.reason}]")
    return found


def one_line(path: Path | str, *needles: str, caption: str | None = None) -> None:
    with pytest.raises(ValueError) as error:
        Images([Source(str(path), caption=caption)], SIZE)
    line = str(error.value)
    assert "\n" not in line and all(needle in line for needle in needles), line


def test_rows_are_the_samples_of_a_folder_of_the_same(tmp_path: Path) -> None:
    """Bit for bit, in files found by a name, a pattern and a folder."""
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", {"image": pictures(7), "text": texts(7)})
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", {"image": pictures(4, 7), "text": texts(4, 7)})
    (tmp_path / "data" / "README.md").write_text("of no matter")
    same = images(write_folder(tmp_path / "folder", pairs(11)))
    for path in ("data", "data/train-*.parquet", "data/train-{00000..00001}-of-00002.parquet"):
        store = images(tmp_path / path)
        assert store.counts == [11] and store.runs == [[3, 3, 1, 3, 1]] and not len(store.drops)
        for i in range(11):
            mine, theirs = store.get(0, i), same.get(0, i)
            assert mine.caption == theirs.caption and bool((mine.image == theirs.image).all())
            assert (mine.width, mine.height) == (40, 32)
    assert count_samples([Source(str(tmp_path / "data"))]) == 11
    assert images(tmp_path / "data").key(0, 8) == "train-00001-of-00002.parquet:1"
    assert images(tmp_path / "data" / "train-00001-of-00002.parquet").counts == [4]


@pytest.mark.parametrize(
    ("columns", "key", "expected"),
    [
        (dict(image="x", caption=["a", "b"], text=["c", "d"]), None, ["a", "b"]),
        (dict(image="x", caption=["a", "b"], text=["c", "d"]), "text", ["c", "d"]),
        (dict(image="x", caption=["a", "b"], text=["c", "d"]), "caption,text", ["a", "d"]),
        (dict(image="x", caption=["a", "b"], text=["c", None]), "caption,text", ["a", "b"]),
        (dict(picture="x", text=["c", "d"]), None, ["c", "d"]),
        (dict(photo="x", text=["c", "d"]), None, ["c", "d"]),
        (dict(image="x", other="x", text=["c", "d"]), "other:text", ["c", "d"]),
        ({"image": "x", "a:b,c": ["c", "d"]}, "a:b,c", ["c", "d"]),
        (dict(image="x", caption=[["a", "b"], ["c", "d", "e"]]), None, ["a", "d"]),
        (dict(image="x", caption=[["a", None, " "], []]), None, ["a", "[no caption]"]),
        (dict(image="x", caption=[[""], None]), None, ["[empty caption]", "[no caption]"]),
        (dict(image="x", caption=["  a\r\nb ", ""]), None, ["a\nb", "[empty caption]"]),
        (dict(image="x", caption=["a\0b", None]), None, ["[caption not UTF-8]", "[no caption]"]),
        (dict(image="x", caption=pa.array(["a", "b"]).dictionary_encode()), None, ["a", "b"]),
        (dict(image="x", caption=pa.array(["a", "b"], pa.large_string())), None, ["a", "b"]),
        (dict(image="x", caption=pa.array([["a"], ["b"]], pa.large_list(pa.string()))), None, ["a", "b"]),
        (dict(image="raw", caption=["a", "b"]), None, ["a", "b"]),
        (dict(image="null", caption=["a", "b"]), None, ["[no image]", "[image not in the Parquet file]"]),
        (dict(image="broken", caption=["a", "b"]), None, ["[corrupt image]", "[empty image file]"]),
    ],
)
def test_columns_are_found_by_name(
    columns: dict[str, Any], key: str | None, expected: list[str], tmp_path: Path
) -> None:
    kinds: dict[str, Any] = {
        "x": pictures(2),
        "raw": pa.array(pictures(2), pa.large_binary()),
        "null": pa.array([None, {"bytes": None, "path": "/somewhere/a.png"}], image_column([]).type),
        "broken": image_column([b"no image", b""]),
    }
    made = {name: kinds.get(x, x) if isinstance(x, str) else x for name, x in columns.items()}
    assert captions(write_parquet(tmp_path / "a.parquet", made), key) == expected


def test_a_table_that_cannot_serve_is_named_with_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, dict(image=["not", "bytes"], caption=texts(2)))
    one_line(
        file, "no image column", "a.parquet", "image is not there, or holds no bytes; its columns are image, caption"
    )
    write_parquet(file, dict(left=pictures(2), right=pictures(2), caption=texts(2)))
    one_line(file, "several image columns", "left, right; name one: PATH@WEIGHT@IMAGE:CAPTION")
    write_parquet(file, dict(image=pictures(2), label=[0, 1]))
    one_line(file, "no caption column", "its columns are image, label")
    one_line(file, "no caption column", "label is not there, or holds no text", caption="label")
    one_line(file, "no caption column", "none is not there", caption="none")
    write_parquet(file, dict(image=pictures(0) or image_column([]), caption=pa.array([], pa.string())))
    one_line(file, "holds no image with a caption")
    write_tar(tmp_path / "b.tar", pairs(1))
    one_line(tmp_path, "holds tars and Parquet files; name one of them")
    one_line(f"{tmp_path}/[ab].*", "names Parquet files and others")
    one_line(tmp_path / "c.parquet", "no such file or folder")
    assert find_files(str(file), Drops())[0] == "parquet"


def test_without_the_library_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", dict(image=pictures(1), caption=texts(1)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    one_line(file, 'Parquet files need pyarrow; pip install "emf-meanflow[parquet]"')


def test_a_broken_file_among_whole_ones_is_left_out_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", dict(image=pictures(2), caption=texts(2)))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no PAR1")
    (tmp_path / "c.parquet").write_bytes(b"")
    write_parquet(tmp_path / "d.parquet", dict(image=pictures(2), label=[0, 1]))
    (tmp_path / "e.parquet").symlink_to(tmp_path / "nowhere")
    store = images(tmp_path)
    assert store.counts == [2]
    expected = {"unreadable Parquet file": 2, "no caption column": 1, "missing Parquet file": 1}
    assert by_reason(store.drops) == expected


def test_a_file_that_changes_after_the_scan_is_dropped_by_name(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", dict(image=pictures(6), caption=texts(6)))
    store = images(file)
    assert store.get(0, 0).caption == "picture 0"
    write_parquet(file, dict(image=pictures(4), caption=texts(4)))
    with pytest.raises(Dropped, match="file cannot be read .it has fewer rows than when it was scanned"):
        store.get(0, 5)
    file.unlink()
    assert store.get(0, 1).caption == "picture 1"  # its row group is kept
    store = images(write_parquet(file, dict(image=pictures(6), caption=texts(6))))
    file.unlink()
    with pytest.raises(Dropped, match="row group cannot be read .FileNotFoundError"):
        store.get(0, 1)


ROWS = 24
"""In the place of MIXED, for the tests of order: 8 row groups of 3."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "MIXED", ROWS)
    monkeypatch.setattr(tables, "MIXED", ROWS)


def large(tmp_path: Path, rows: int = 90, group: int = 3) -> Images:
    """Two files of rows that share one small picture, in row groups of a few."""
    picture = encoded(noise(0, 9, 9))
    for name, first in (("a", 0), ("b", rows // 3)):
        n = rows // 3 if name == "a" else rows - rows // 3
        write_parquet(tmp_path / f"{name}.parquet", dict(image=[picture] * n, caption=texts(n, first)), group)
    return images(tmp_path)


def test_the_samples_of_few_row_groups_come_together_and_each_once_an_epoch(tmp_path: Path, few: None) -> None:
    store = large(tmp_path)
    order = Mixture(store.counts, store.weights, 5, store.runs)
    epochs = [[order.place(p) for p in range(90 * e, 90 * e + 90)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(i for _, i, _ in epoch) == [*range(90)] and {e for _, _, e in epoch} == {number}
        drawn = [i // 3 for _, i, _ in epoch]
        for first in range(0, 90, ROWS):
            part = drawn[first : first + ROWS]
            assert set(Counter(part).values()) == {3} and len(set(part)) == len(part) // 3
            assert part != sorted(part, key=part.index)  # mixed, and not one row group after the other
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    other = Mixture(store.counts, store.weights, 6, store.runs)
    assert [other[p] for p in range(90)] != [order[p] for p in range(90)]
    # runs of one file beside samples that are one seek away
    mixed = Mixture([90, 7], [1.0, 1.0], 5, [store.runs[0], None])
    both = Counter(mixed[p] for p in range(400))
    plain = Mixture([90, 7], [1.0, 1.0], 5)
    assert [mixed[p] for p in range(400) if mixed[p][0]] == [plain[p] for p in range(400) if plain[p][0]] and len(
        both
    ) > 90


def test_a_row_group_is_read_once_however_many_threads_ask(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = large(tmp_path), Counter[tuple[str, int]]()
    inner = tables.Table._read

    def counted(self: tables.Table, path: str, group: int) -> Any:
        read[path, group] += 1
        return inner(self, path, group)

    monkeypatch.setattr(tables.Table, "_read", counted)
    dataset = Dataset(store, 1, workers=8)
    for step in range(9):
        assert len(dataset.batch(step, 10)) == 10
    assert set(read.values()) == {1} and len(read) == 30
    table = store.indices[0].table
    assert table is not None and 3 * len(table._kept) == 2 * ROWS


def test_any_step_is_the_same_from_anywhere_and_for_any_ranks(tmp_path: Path, few: None) -> None:
    """So a run resumes in the middle of a row group: nothing of the steps before is needed."""

    def drawn(step: int, part: int = 0, parts: int = 1) -> list[tuple[str, str]]:
        return [(s.key, s.caption) for s in Dataset(images(tmp_path), 3).batch(step, 8, part, parts)]

    large(tmp_path)
    through = Dataset(images(tmp_path), 3)
    every = [[(s.key, s.caption) for s in through.batch(step, 8)] for step in range(25)]
    for step in (0, 7, 13, 24):
        assert drawn(step) == every[step]
        for parts in (2, 4):
            ranks = [drawn(step, part, parts) for part in range(parts)]
            assert [row for rows in zip(*ranks, strict=True) for row in rows] == every[step]


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Two files; a list of captions each, of one row none, and one picture broken."""
    said = [[f"{i} first", f"{i} second", f"{i} third"][: 1 + i % 3] for i in range(10)]
    whole = pictures(10)
    whole[4] = b"broken"
    said[6] = []
    for name, part in (("a", slice(0, 4)), ("b", slice(4, 10))):
        write_parquet(tmp_path / "data" / f"{name}.parquet", dict(image=whole[part], captions=said[part]))
    return tmp_path / "data"


def test_large_row_groups_are_taken_two_at_a_time() -> None:
    order = Mixture([5000], [1.0], 0, [[2000, 1000, 500, 1500]])
    starts = np.array([0, 2000, 3000, 3500])
    drawn = [int(np.searchsorted(starts, order[p][1], "right")) for p in range(5000)]
    first = next(n for n in range(1, 5001) if len(set(drawn[:n])) == 3) - 1
    assert len(set(drawn[:first])) == 2 == len(set(drawn[first:])) and not set(drawn[:first]) & set(drawn[first:])


def test_another_caption_is_taken_each_time_a_source_is_gone_through(several: Path) -> None:
    turns = [captions(several, turn=turn) for turn in range(6)]
    for i in (0, 1, 2, 5, 8):
        n = 1 + i % 3
        words = ["first", "second", "third"][:n]
        assert [turn[i] for turn in turns] == [f"{i} {words[(i + turn) % n]}" for turn in range(6)]
    dataset = Dataset(images(several), 0)
    seen: dict[str, set[str]] = {}
    for step in range(60):
        for sample in dataset.batch(step, 5):
            seen.setdefault(sample.key, set()).add(sample.caption)
    assert {key: len(found) for key, found in seen.items()} == {
        "a.parquet:0": 1, "a.parquet:1": 2, "a.parquet:2": 3, "a.parquet:3": 1,
        "b.parquet:1": 3, "b.parquet:3": 2, "b.parquet:4": 3, "b.parquet:5": 1,
    }  # fmt: skip
    assert by_reason(dataset.drops) == {"corrupt image": 1, "no caption": 1}


def test_a_cache_gives_the_batches_of_its_rows(several: Path, tmp_path: Path) -> None:
    """With the captions of every turn, in the order of row groups; beside another cache too; written in two goes."""
    tar = write_tar(tmp_path / "a.tar", pairs(5))
    sources = [Source(str(several)), Source(str(tar), 2.0)]
    out = tmp_path / "cache"
    encode = lambda x: x[:, :, ::4, ::4] * 0.5  # noqa: E731
    for part in (1, 0):
        write_cache(Images(sources, SIZE), encode, out, encoder="small", shard=4, part=part, parts=2)
    direct, cached = Dataset(Images(sources, SIZE), 2), Dataset(Cache(out), 2)
    again = Dataset(Caches([Source(str(out))]), 2)
    for step in range(12):
        for a, b, c in zip(direct.batch(step, 4), cached.batch(step, 4), again.batch(step, 4), strict=True):
            assert (a.key, a.caption) == (b.key, b.caption) == (c.key, c.caption)
            assert a.image is not None and bool((encode(a.image[None])[0] == b.mean).all())
    assert by_reason(direct.drops) == by_reason(cached.drops)
    before = (several / "b.parquet").read_bytes()
    write_parquet(several / "b.parquet", dict(image=pictures(6), captions=[["x"]] * 6))
    with pytest.raises(ValueError, match="b.parquet:0"):  # other rows under the same names
        write_cache(Images(sources, SIZE), encode, out, encoder="small", shard=4)
    (several / "b.parquet").write_bytes(before)
    write_cache(Images(sources, SIZE), encode, out, encoder="small", shard=4)
    write_parquet(several / "b.parquet", dict(image=pictures(6), captions=[["x"]] * 6), group=2)
    with pytest.raises(ValueError, match="runs"):  # other row groups, and another order
        write_cache(Images(sources, SIZE), encode, out, encoder="small", shard=4)


def test_inspect_and_the_analyses_read_it_too(several: Path, tmp_path: Path) -> None:
    figures = inspect([Source(str(several))], SIZE, tmp_path / "look")
    assert figures["sources"][0]["usable"] == 8 and (tmp_path / "look" / "contact.png").is_file()
    assert {d["reason"]: d["first"] for d in figures["drops"]} == {
        "corrupt image": ["b.parquet:0 (no JPEG, PNG, WEBP)"],
        "no caption": ["b.parquet:2 (the row has none)"],
    }
    some = inspect([Source(str(several))], SIZE, tmp_path / "some", limit=2)
    assert some["sources"][0]["read"] == 2
    found = read_source(str(several))
    assert len(found.captions) == 9 and found.captions[1] == "1 first" and found.open(1).size == (40, 32)


def test_what_the_datasets_library_of_the_hub_writes_and_compresses(tmp_path: Path) -> None:
    """Its files are compressed by snappy, or by others, with pages of their own version."""
    columns: dict[str, Any] = dict(image=pictures(5), caption=texts(5))
    for how in (
        dict(compression="zstd"),
        dict(compression="none", use_dictionary=False),
        dict(data_page_version="2.0"),
    ):
        assert captions(write_parquet(tmp_path / "a.parquet", columns, **how)) == texts(5)


def whole(path: Path, **how: Any) -> bytes:
    columns: dict[str, Any] = dict(
        image=[encoded(noise(0, 4, 4)), encoded(noise(1, 4, 4))], caption=[["a", "b"], ["c"]]
    )
    return write_parquet(path, columns, 1, **how).read_bytes()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    file = tmp_path_factory.mktemp("whole") / "any.parquet"
    return [whole(file), whole(file, compression="none", use_dictionary=False)]


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_are_samples_or_drops_or_one_line(
    data: st.DataObject, bases: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.parquet"
    file.write_bytes(data.draw(st.binary(max_size=60) | damaged(bases)))
    try:
        store = images(file)
    except ValueError as error:
        assert "any.parquet" in str(error) and len(str(error).splitlines()) == 1
        return
    for i in range(store.counts[0]):
        try:
            assert store.get(0, i).caption
        except Dropped as drop:
            assert drop.reason and len(str(drop).splitlines()) == 1
