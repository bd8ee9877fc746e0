"""Tars and folders of images with captions: what becomes a sample, what is dropped and how it is told."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import by_reason, encoded, noise, pairs, write_folder, write_tar
from PIL import Image

from emf.data import tars
from emf.data.drops import Dropped, Drops
from emf.data.images import Images, centre_crop
from emf.data.mixture import Dataset
from emf.data.sources import Source, parse_source, scan
from emf.data.tars import read_tar
from emf.files import open_image


def captions(images: Images, source: int = 0) -> list[str]:
    return [images.get(source, i).caption for i in range(images.counts[source])]


def reasons(images: Images) -> dict[str, int]:
    """Every sample read once; what was dropped, in scan and reading."""
    for source, count in enumerate(images.counts):
        for i in range(count):
            try:
                images.get(source, i)
            except Dropped as drop:
                images.drops.add(drop.key, drop.source, drop.reason, drop.detail)
    return by_reason(images.drops)


def test_tars_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(5):
            tar.write({"__key__": f"sub/x{i}", "png": encoded(noise(i)), "txt": f"caption {i}", "cls": i})
    images = Images([Source(str(tmp_path / "a.tar"))], 32)
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert len(theirs) == images.counts[0] == 5 and len(images.drops) == 0
    for i, sample in enumerate(theirs):
        mine = images.get(0, i)
        assert mine.caption == sample["txt"].decode() and mine.key == f"a.tar:{sample['__key__']}"
        assert torch.equal(mine.image, centre_crop(open_image(sample["png"]), 32))


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    members = pairs(3)
    tar = write_tar(tmp_path / "a.tar", dict(sorted(members.items(), key=lambda item: item[0][::-1])))
    assert captions(Images([Source(str(tar))], 8)) == [f"picture {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a-{00..02}.tar", 6),
        ("a-*.tar", 6),
        ("a-0[01].tar", 4),
        ("{a-00,sub/b}.tar", 4),
        ("a-01.tar", 2),
        ("sub", 2),
        (".", 8),
        ("a-{00..03}.tar", 6),
    ],
)
def test_patterns_of_tars(pattern: str, found: int, tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"a-{i:02d}.tar", pairs(2, 2 * i))
    write_tar(tmp_path / "sub" / "b.tar", pairs(2, 6))
    images = Images([Source(str(tmp_path / pattern))], 8)
    assert images.counts == [found] and len(set(captions(images))) == found
    assert by_reason(images.drops) == ({"missing tar": 1} if "03" in pattern else {})


def test_brackets_in_the_name_of_a_folder(tmp_path: Path) -> None:
    for i, folder in enumerate(("set[1]", "set1")):  # as a pattern, where that names files
        write_tar(tmp_path / folder / "a.tar", pairs(1, i))
        assert captions(Images([Source(f"{tmp_path}/set[1]/*.tar")], 8)) == [f"picture {i}"]


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures = {"b/one.two.jpg": encoded(noise(1), "jpeg"), "B.WEBP": encoded(noise(2), "webp")}
    texts = {"b/one.two.txt": b"\xef\xbb\xbf a caf\xc3\xa9, \xe7\x8c\xab \n", "B.txt": "naïve 🐈".encode()}
    write_folder(tmp_path / "x", pictures | texts)
    (tmp_path / "link").symlink_to(tmp_path / "x" / "b")
    (tmp_path / "x" / "round").symlink_to(tmp_path / "x")  # a folder in itself
    images = Images([Source(str(tmp_path / "x")), Source(str(tmp_path / "link"))], 8)
    assert captions(images) == ["naïve 🐈", "a café, 猫"] and captions(images, 1) == ["a café, 猫"]
    assert images.indices[0].keys == ["B", "b/one.two"] and len(images.drops) == 0


@pytest.mark.parametrize(
    ("key", "expected"),
    [(None, ["from caption", "from text", "from txt"]), ("long", ["long one", "from txt"])],
)
def test_captions_in_json(key: str | None, expected: list[str], tmp_path: Path) -> None:
    members = {f"{i}.jpg": encoded(noise(i), "jpeg") for i in range(3)}
    members["0.json"] = json.dumps({"text": "from text", "caption": "from caption", "long": "long one"}).encode()
    members["1.json"] = json.dumps({"text": "from text", "caption": None}).encode()  # null is absent
    members |= {"2.json": b'{"caption": "from json", "long": 3}', "2.txt": b"from txt"}
    images = Images([Source(str(write_tar(tmp_path / "a.tar", members)), caption=key)], 8)
    if key:
        assert images.get(0, 0).caption == "long one"
        assert reasons(images) == {"no caption in JSON": 2}
    else:
        assert captions(images) == expected


BROKEN = {
    "corrupt image": {"x.jpg": b"\xff\xd8\xff\xe0 no picture", "x.txt": b"a"},
    "corrupt image ": {"x.jpg": encoded(noise(0), "jpeg")[:-300], "x.txt": b"a"},
    "corrupt image  ": {"x.png": encoded(noise(0))[:-1500], "x.txt": b"a"},
    "empty image file": {"x.png": b"", "x.txt": b"a"},
    "empty caption": {"x.png": encoded(noise(0)), "x.txt": b""},
    "empty caption ": {"x.png": encoded(noise(0)), "x.txt": b" \n\t"},
    "empty caption  ": {"x.png": encoded(noise(0)), "x.json": b'{"caption": ""}'},
    "no caption": {"x.png": encoded(noise(0))},
    "no image": {"x.txt": b"a"},
    "neither image nor caption": {"x.csv": b"a"},
    "second image": {"x.png": encoded(noise(0)), "x.jpg": encoded(noise(0), "jpeg"), "x.txt": b"a"},
    "caption not UTF-8": {"x.png": encoded(noise(0)), "x.txt": b"caf\xe9"},
    "caption not JSON": {"x.png": encoded(noise(0)), "x.json": b"{"},
    "no caption in JSON": {"x.png": encoded(noise(0)), "x.json": b'{"captions": "a"}'},
    "no caption in JSON ": {"x.png": encoded(noise(0)), "x.json": b'{"caption": ["a"]}'},
    "caption not JSON ": {"x.png": encoded(noise(0)), "x.json": b"[" * 100_000},
    "caption not UTF-8 ": {"x.png": encoded(noise(0)), "x.txt": "a cat".encode("utf-16-le")},
    "broken letter in caption": {"x.png": encoded(noise(0)), "x.json": b'{"caption": "a dog \\ud83d"}'},
    "no caption in JSON  ": {"x.png": encoded(noise(0)), "x.json": b'["caption"]'},
}


@pytest.mark.parametrize("tar", [True, False], ids=["tar", "folder"])
@pytest.mark.parametrize("reason", BROKEN)
def test_what_is_broken_is_counted_named_and_skipped(reason: str, tar: bool, tmp_path: Path) -> None:
    members = pairs(2) | BROKEN[reason]
    path = write_tar(tmp_path / "a.tar", members) if tar else write_folder(tmp_path / "a", members)
    images = Images([Source(str(path))], 8)
    assert reasons(images) == {reason.strip(): 1}
    (line,) = images.drops.lines()
    assert str(path) in line and ("a.tar:x" in line if tar else ": x" in line)
    seen = {s.caption for step in range(8) for s in Dataset(images).batch(step, 4)}
    assert {"picture 0", "picture 1"} <= seen <= {"picture 0", "picture 1", "a"}


def test_a_picture_of_too_many_pixels_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "a", pairs(1) | {"x.png": encoded(noise(0, 100, 100)), "x.txt": b"a"})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert reasons(Images([Source(str(folder))], 8)) == {"image too large": 1}


def offsets(tar: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(tar) as file:
        return [(m.name, m.offset_data, m.size) for m in file]


@pytest.mark.parametrize("where", ["data", "padding", "header", "before a header", "end mark"])
def test_a_truncated_tar_gives_what_is_whole(where: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(6))
    name, start, size = offsets(tar)[7]  # 0003.txt
    assert name == "0003.txt"
    cut = {"data": start + 3, "padding": start + size, "header": start + 612, "before a header": start + 512}
    cut["end mark"] = offsets(tar)[-1][1] + 512
    with tar.open("r+b") as file:
        file.truncate(cut[where])
    members, problem = read_tar(str(tar))
    assert problem
    assert members == [m for m in offsets(write_tar(tmp_path / "b.tar", pairs(6))) if m[1] + m[2] <= cut[where]]
    images = Images([Source(str(tmp_path / "a.tar"))], 8)
    whole = {"data": 3, "end mark": 6}.get(where, 4)
    assert captions(images) == [f"picture {i}" for i in range(whole)]
    found = reasons(images)
    assert found.pop("truncated or broken tar") == 1
    assert found == ({"no caption": 1} if where == "data" else {})


def test_an_unreadable_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(6))
    (_, start, _) = offsets(tar)[8]
    with tar.open("r+b") as file:
        file.seek(start - 512)
        file.write(b"\xff" * 512)
    images = Images([Source(str(tar))], 8)
    assert images.counts == [4] and by_reason(images.drops) == {"truncated or broken tar": 1}
    assert "header" in next(images.drops.lines())


@pytest.mark.parametrize("broken", [b"", b"not a tar" * 200], ids=["empty", "text"])
def test_a_broken_tar_among_whole_ones(broken: bytes, tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", pairs(2, 2 * i))
    (tmp_path / "2.tar").write_bytes(broken)
    images = Images([Source(str(tmp_path))], 8)
    assert images.counts == [4] and by_reason(images.drops) == {"unreadable tar": 1}
    assert "2.tar" in next(images.drops.lines())


def test_a_file_that_changes_after_the_scan(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(3))
    images = Images([Source(str(tar))], 8)
    with tar.open("r+b") as file:
        file.truncate(offsets(tar)[4][1])
    assert reasons(images) == {"file cannot be read": 1}


def test_names_that_are_no_utf8_can_be_printed(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    tar = write_tar(tmp_path / "a.tar", pairs(1) | {f"{name}.png": b"", f"{name}.txt": b"a"})
    images = Images([Source(str(tar))], 8)
    assert reasons(images) == {"empty image file": 1}
    assert r"caf\xe9" in "".join(images.drops.lines()).encode().decode()  # no lone surrogate


def test_a_drop_is_counted_once() -> None:
    drops = Drops()
    for _ in range(3):
        for i in range(9):
            drops.add(f"k{i}", "s", "no caption")
        drops.add("k0", "s", "no image", "why")
    assert len(drops) == 10 and by_reason(drops) == {"no caption": 9, "no image": 1}
    assert list(drops.lines()) == [
        "s: 9 dropped: no caption: k0, k1, k2, k3, k4, ...",
        "s: 1 dropped: no image: k0 (why)",
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "no such file"),
        ("none/*.tar", "no such file"),
        ("empty", "holds no image"),
        ("both", "tars and images"),
        ("texts", "no image"),
        ("zip.tar", "unreadable tar"),
        ("http://x/{0..3}.tar", "copy"),
        ("pipe:cat a.tar", "copy"),
        ("a.{tar", "Unbalanced"),
    ],
)
def test_a_source_of_nothing_is_one_line(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "both", pairs(1))
    write_tar(tmp_path / "both" / "a.tar", pairs(1))
    write_folder(tmp_path / "texts", {"a.txt": b"a"})
    (tmp_path / "zip.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    full = path if ":" in path else str(tmp_path / path)
    with pytest.raises(ValueError, match=message) as caught:
        Images([Source(full)], 8)
    assert len(str(caught.value).splitlines()) == 1 and full in str(caught.value)


def test_wrong_settings_are_one_line(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "a", pairs(1)))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            Source(folder, weight)
    with pytest.raises(ValueError, match="at least 1"):
        Images([Source(folder)], 0)
    with pytest.raises(ValueError, match="no source"):
        Images([], 8)
    with pytest.raises(ValueError, match="seed"):
        Dataset(Images([Source(folder)], 8), seed=-1)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a/{0..3}.tar", Source("a/{0..3}.tar")),
        ("a@2", Source("a", 2.0)),
        ("a@0.5@long", Source("a", 0.5, "long")),
        ("me@home/a", Source("me@home/a")),
        ("me@home/a@3", Source("me@home/a", 3.0)),
        ("me@home/a@3@key", Source("me@home/a", 3.0, "key")),
    ],
)
def test_a_source_in_words(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize("text", ["a@0", "a@-1@key", "a@nan"])
def test_a_weight_in_words_is_checked(text: str) -> None:
    with pytest.raises(ValueError, match="positive"):
        parse_source(text)


def test_listings_are_kept_until_a_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(path: str) -> tuple[list[tuple[str, int, int]], str]:
        read.append(os.path.basename(path))
        return read_tar(path)

    monkeypatch.setattr(tars, "read_tar", spy)
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", pairs(2, 2 * i))
    where, kept = [Source(str(tmp_path / "*.tar"))], tmp_path / "sub" / "listings.json"
    first = scan(where, Drops(), kept)
    assert read == ["0.tar", "1.tar"]
    again = scan(where, Drops(), kept)
    assert read == ["0.tar", "1.tar"] and again[0].keys == first[0].keys
    assert np.array_equal(again[0].image, first[0].image) and np.array_equal(again[0].caption, first[0].caption)
    write_tar(tmp_path / "1.tar", pairs(3, 5))
    assert len(scan(where, Drops(), kept)[0]) == 5 and read == ["0.tar", "1.tar", "1.tar"]


def test_a_file_of_the_users_is_no_listing(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs(1))
    texts = ["{}", "mine", '{"tars": {}, "kind": "other"}', "[]"]
    for strange in ([], {"a.tar": None}, {"a.tar": [1, 2, "", [["a.png", 0]]]}, {"a.tar": [1, 2, None, []]}):
        texts.append(json.dumps({"tars": strange, "kind": tars.TarListings.KIND}))
    for text in texts:
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ValueError, match="no index"):
            scan([Source(str(tmp_path / "0.tar"))], Drops(), tmp_path / "mine.json")
        assert (tmp_path / "mine.json").read_text() == text


def test_a_sample_says_how_large_it_was(tmp_path: Path) -> None:
    sizes = {"a": (40, 20), "b": (16, 50), "c": (15, 15), "d": (40, 12)}
    members = {f"{k}.png": encoded(noise(0, *s)) for k, s in sizes.items()} | {f"{k}.txt": b"x" for k in sizes}
    images = Images([Source(str(write_folder(tmp_path / "x", members)))], 16, token_size=6)
    for i, size in enumerate(sizes.values()):
        sample = images.get(0, i)
        assert (sample.width, sample.height) == size
        assert sample.image.shape == (3, 16, 16) and sample.small.shape == (3, 6, 6)
    assert images.upscaled[0].tolist() == [False, False, True, True]


def test_tars_that_were_put_together_are_read_to_the_end(tmp_path: Path) -> None:
    a, b = write_tar(tmp_path / "a" / "a.tar", pairs(3)), write_tar(tmp_path / "a" / "b.tar", pairs(3, 10))
    both = tmp_path / "c.tar"
    both.write_bytes(a.read_bytes() + b.read_bytes())
    images = Images([Source(str(both))], 8)
    assert captions(images) == [f"picture {i}" for i in (0, 1, 2, 10, 11, 12)] and len(images.drops) == 0
    both.write_bytes(a.read_bytes() + b"no tar" * 100)
    images = Images([Source(str(both))], 8)
    assert images.counts == [3] and by_reason(images.drops) == {"truncated or broken tar": 1}
    assert "unreadable header at byte 20480; 6 whole members" in next(images.drops.lines())


@pytest.mark.parametrize("kind", tars.TarListings.EARLIER)
def test_listings_of_an_earlier_kind_are_made_anew(tmp_path: Path, kind: str) -> None:
    write_tar(tmp_path / "0.tar", pairs(2))
    (tmp_path / "kept.json").write_text(json.dumps({"kind": kind, "tars": {}}))
    scan([Source(str(tmp_path / "0.tar"))], Drops(), tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())["kind"] == tars.TarListings.KIND


def test_links_in_a_tar_are_followed_or_named(tmp_path: Path) -> None:
    file, data = tmp_path / "a.tar", encoded(noise(0))
    entries = {  # name: (kind, where it leads to)
        "sub/1.png": (tarfile.SYMTYPE, "../0.png"),
        "sub/1.txt": (tarfile.LNKTYPE, "0.txt"),
        "2.png": (tarfile.SYMTYPE, "sub/../sub/1.png"),  # by a second link
        "2.txt": (tarfile.SYMTYPE, "/elsewhere/2.txt"),
        "3.png": (tarfile.SYMTYPE, "3.png"),
        "4.png": (tarfile.FIFOTYPE, ""),
        "folder": (tarfile.DIRTYPE, ""),
    }
    with tarfile.open(file, "w") as tar:
        for name, content in {"0.png": data, "0.txt": b"zero"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, (kind, target) in entries.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    images = Images([Source(str(file))], 8)
    assert captions(images) == ["zero", "zero"] and images.indices[0].keys == ["a.tar:0", "a.tar:sub/1"]
    assert by_reason(images.drops) == {"link or special file in a tar": 3, "no caption": 1}
    (told,) = (line for line in images.drops.lines() if "link or special" in line)
    assert told.endswith("a.tar:2.txt, a.tar:3.png, a.tar:4.png")
