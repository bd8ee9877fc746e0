"""Image-text data: what becomes a sample, what is dropped and how it is told, and which samples are in a batch."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, noise, pairs, write_folder, write_tar
from PIL import Image

from emf.data import inspect as inspecting
from emf.data.drops import Dropped, Drops
from emf.data.images import Images, centre_crop, decode
from emf.data.inspect import inspect
from emf.data.mixture import BLOCK, Dataset, Mixture
from emf.data.sources import Source, parse_source, read_tar, scan
from emf.show.sheet import GAP


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
    return images.drops.by_reason()


# Pixels


def test_a_crop_is_the_centre_at_full_scale():
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 48, 32))  # the centre square
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        crop = centre_crop(picture, 16)
        assert crop.shape == (3, 16, 16) and crop.dtype == torch.float32
        inner = crop[:, 2:-2, 2:-2]
        torch.testing.assert_close(inner, torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand_as(inner))


def test_a_crop_is_resizing_and_cutting():
    picture = noise(0, 48, 32)  # 3:2, so that the resized long side is a whole number of pixels
    crop = centre_crop(picture, 16)
    whole = np.asarray(picture.resize((24, 16), Image.Resampling.BICUBIC))[:, 4:20]
    assert np.abs(((crop.numpy() + 1) * 127.5).transpose(1, 2, 0) - whole).max() <= 1.01  # of 255
    same = centre_crop(noise(1, 16, 16), 16)  # nothing to do
    assert torch.equal(same, torch.tensor(np.asarray(noise(1, 16, 16))).permute(2, 0, 1).float() / 127.5 - 1)


def test_a_crop_is_antialiased_and_a_small_picture_enlarged():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert centre_crop(Image.fromarray(stripes), 16).abs().max() < 0.1  # grey, no aliases
    assert centre_crop(noise(0, 8, 12), 32).shape == (3, 32, 32)


def colours(image: Image.Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return image.getpixel((1, 1)), image.getpixel((image.width - 2, image.height - 2))


def two_halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def with_transparent_index() -> bytes:
    image = two_halves("P", 0, 1)
    image.putpalette([10, 200, 30, 250, 0, 0])
    return encoded(image, transparency=1)


KINDS = ["jpeg", "webp", "palette", "grey", "bilevel", "grey-alpha", "alpha", "half-alpha-webp", "transparent-index"]
KINDS += ["cmyk", "16-bit"]


@pytest.mark.parametrize(
    ("data", "first", "last"),
    [
        (encoded(two_halves("RGB", "red", "blue"), "jpeg", quality=95, subsampling=0), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("RGB", "red", "blue"), "webp", lossless=True), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("RGB", "red", "blue").convert("P")), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("L", 200, 50)), (200,) * 3, (50,) * 3),
        (encoded(two_halves("1", 1, 0)), (255,) * 3, (0,) * 3),
        (encoded(two_halves("LA", (200, 255), (200, 0))), (200,) * 3, (255,) * 3),
        (encoded(two_halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))), (255, 0, 0), (255,) * 3),
        (encoded(two_halves("RGBA", (0, 0, 0, 128), (0, 0, 0, 0)), "webp", lossless=True), (127,) * 3, (255,) * 3),
        (with_transparent_index(), (10, 200, 30), (255,) * 3),
        (encoded(two_halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "jpeg"), (255, 0, 0), (0, 0, 255)),
        (encoded(two_halves("I;16", 200 * 257, 50 * 257)), (200,) * 3, (50,) * 3),
    ],
    ids=[
        "jpeg",
        "webp",
        "palette",
        "grey",
        "bilevel",
        "grey-alpha",
        "alpha",
        "half-alpha-webp",
        "transparent-index",
        "cmyk",
        "16-bit",
    ],
)
def test_every_kind_of_picture_becomes_rgb(data: bytes, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    image = decode(data)
    assert image.mode == "RGB" and image.size == (16, 16)
    np.testing.assert_allclose(colours(image), (first, last), atol=3)


@pytest.mark.parametrize(("orientation", "back"), [(3, 2), (6, 4), (8, 3)])
def test_exif_orientation_is_obeyed(orientation: int, back: int) -> None:
    upright = two_halves("RGB", "red", "blue").resize((32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright.transpose({3: Image.Transpose.ROTATE_180, 6: 2, 8: 4}[orientation])
    image = decode(encoded(turned, "jpeg", quality=95, subsampling=0, exif=exif))
    assert image.size == (32, 16)
    np.testing.assert_allclose(colours(image), [(255, 0, 0), (0, 0, 255)], atol=3)


# Sources


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
        assert torch.equal(mine.image, centre_crop(decode(sample["png"]), 32))


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
    assert images.drops.by_reason() == ({"missing tar": 1} if "03" in pattern else {})


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
    members["1.json"] = json.dumps({"text": "from text"}).encode()
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
    assert images.counts == [4] and images.drops.by_reason() == {"truncated or broken tar": 1}
    assert "header" in next(images.drops.lines())


@pytest.mark.parametrize("broken", [b"", b"not a tar" * 200], ids=["empty", "text"])
def test_a_broken_tar_among_whole_ones(broken: bytes, tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", pairs(2, 2 * i))
    (tmp_path / "2.tar").write_bytes(broken)
    images = Images([Source(str(tmp_path))], 8)
    assert images.counts == [4] and images.drops.by_reason() == {"unreadable tar": 1}
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
    assert len(drops) == 10 and drops.by_reason() == {"no caption": 9, "no image": 1}
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
    from emf.data import sources

    read: list[str] = []

    def spy(path: str) -> tuple[list[tuple[str, int, int]], str]:
        read.append(os.path.basename(path))
        return read_tar(path)

    monkeypatch.setattr(sources, "read_tar", spy)
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
    for text in ("{}", "mine", '{"tars": {}, "kind": "other"}', "[]"):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ValueError, match="no index"):
            scan([Source(str(tmp_path / "0.tar"))], Drops(), tmp_path / "mine.json")
        assert (tmp_path / "mine.json").read_text() == text


# Batches


def test_an_epoch_is_a_permutation_and_the_next_another() -> None:
    order = Mixture([10], [1.0], 0)
    epochs = [[order[p][1] for p in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    other = Mixture([10], [1.0], 1)
    assert [other[p][1] for p in range(10)] != epochs[0]


def test_sources_are_drawn_by_weight_whatever_their_size() -> None:
    weights, n = [3.0, 1.0, 0.5], 20_000
    order = Mixture([50, 4000, 7], weights, 3)
    drawn = [order[p] for p in range(n)]
    count = Counter(source for source, _ in drawn)
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(count[source] / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    # of each source every index equally often, to one
    for source, size in enumerate(order.counts):
        seen = Counter(index for s, index in drawn if s == source)
        assert max(seen.values()) - min(seen.get(i, 0) for i in range(size)) <= 1
    # and the draws are not in turn: runs of one source occur
    assert any(a[0] == b[0] == c[0] == 2 for a, b, c in zip(drawn, drawn[1:], drawn[2:], strict=False))


def test_any_position_can_be_asked_for_first() -> None:
    order = Mixture([5, 9], [1.0, 2.0], 7)
    across = [order[p] for p in range(BLOCK - 50, BLOCK + 50)]
    count = Counter(order[p] for p in range(BLOCK + 50))
    fresh = Mixture([5, 9], [1.0, 2.0], 7)
    assert [fresh[p] for p in reversed(range(BLOCK - 50, BLOCK + 50))] == across[::-1]
    for source, size in enumerate([5, 9]):  # epochs go on from block to block
        times = [count[source, i] for i in range(size)]
        assert max(times) - min(times) <= 1


def test_the_order_is_the_one_it_was() -> None:
    """A change of these figures would break every resumed run."""
    order = Mixture([5, 9], [1.0, 2.0], 7)
    assert [order[p] for p in (0, 1, 2, 3, 100_000)] == [(1, 8), (1, 2), (1, 6), (0, 1), (1, 3)]


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """A tar with two broken pictures side by side, and a folder with an empty caption."""
    root = tmp_path_factory.mktemp("data")
    members = pairs(9) | {"0003.png": b"broken", "0004.png": b""}
    tar = write_tar(root / "a.tar", members)
    folder = write_folder(root / "b", pairs(7, 20) | {"0026.txt": b""})
    return [Source(str(tar), 2.0), Source(str(folder), 1.0)]


def keys(dataset: Dataset, step: int, batch_size: int, part: int = 0, parts: int = 1) -> list[str]:
    return [s.key for s in dataset.batch(step, batch_size, part, parts)]


def test_a_broken_sample_is_replaced_by_the_next(two_sources: list[Source]) -> None:
    images = Images(two_sources, 8)
    dataset = Dataset(images, seed=1)
    next_one = {(0, 3): (0, 5), (0, 4): (0, 5), (1, 6): (1, 0)}
    for step in range(8):
        wanted = [next_one.get(p, p) for p in (dataset.order[step * 6 + row] for row in range(6))]
        assert keys(dataset, step, 6) == [images.key(*p) for p in wanted]
    assert images.drops.by_reason() == {"corrupt image": 1, "empty image file": 1, "empty caption": 1}
    assert len(dataset) == 16


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_a_batch(ranks: int, two_sources: list[Source]) -> None:
    one = Dataset(Images(two_sources, 8), seed=5)
    several = [Dataset(Images(two_sources, 8), seed=5, workers=2) for _ in range(ranks)]
    for step in range(6):
        whole, parts = keys(one, step, 7), [keys(d, step, 7, r, ranks) for r, d in enumerate(several)]
        assert [whole[r::ranks] for r in range(ranks)] == parts


def test_a_resumed_run_goes_on_with_the_same_batches(two_sources: list[Source]) -> None:
    whole = [(step, [s.key for s in b]) for step, b in Dataset(Images(two_sources, 8), 2).batches(0, 9, 5)]
    resumed = [(step, [s.key for s in b]) for step, b in Dataset(Images(two_sources, 8), 2).batches(4, 9, 5)]
    assert resumed == whole[4:] and [step for step, _ in whole] == list(range(9))
    one = Dataset(Images(two_sources, 8), 2)
    assert [keys(one, step, 5) for step in (8, 0)] == [whole[8][1], whole[0][1]]
    images = [[s.image for s in Dataset(Images(two_sources, 8), 2).batch(4, 5)] for _ in range(2)]
    assert all(map(torch.equal, *images))


def test_batches_can_be_left_early_and_may_be_none(two_sources: list[Source]) -> None:
    dataset = Dataset(Images(two_sources, 8))
    assert [step for step, _ in islice(dataset.batches(0, 100, 2), 3)] == [0, 1, 2]
    assert list(dataset.batches(3, 3, 2)) == []


def test_a_source_of_nothing_usable_stops_with_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {f"{i}.{e}": b"" for i in range(3) for e in ("png", "txt")})
    with pytest.raises(ValueError, match="none of 3 samples can be used.*3 empty caption"):
        Dataset(Images([Source(str(folder))], 8)).batch(0, 2)


def test_a_sample_says_how_large_it_was(tmp_path: Path) -> None:
    sizes = {"a": (40, 20), "b": (16, 50), "c": (15, 15), "d": (40, 12)}
    members = {f"{k}.png": encoded(noise(0, *s)) for k, s in sizes.items()} | {f"{k}.txt": b"x" for k in sizes}
    images = Images([Source(str(write_folder(tmp_path / "x", members)))], 16, token_size=6)
    for i, size in enumerate(sizes.values()):
        sample = images.get(0, i)
        assert (sample.width, sample.height) == size
        assert sample.image.shape == (3, 16, 16) and sample.small.shape == (3, 6, 6)
    assert images.upscaled[0].tolist() == [False, False, True, True]


# emf data inspect


def test_inspect_tells_and_draws(two_sources: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    figures = inspect(two_sources, 35, out)
    assert json.loads((out / "inspect.json").read_text()) == figures
    tar, folder = figures["sources"]
    assert (tar["samples"], tar["read"], tar["usable"], tar["upscaled"]) == (9, 9, 7, 7)
    assert (folder["samples"], folder["usable"], folder["weight"]) == (7, 6, 1.0)
    assert {(d["reason"], d["count"]) for d in figures["drops"]} == {
        ("corrupt image", 1),
        ("empty image file", 1),
        ("empty caption", 1),
    }
    spread = figures["quantiles"]
    assert spread["width"]["50"] == 40 and spread["height"]["100"] == 32 and spread["width / height"]["0"] == 1.25
    assert spread["caption, words"]["50"] == 2
    text = " ".join(capsys.readouterr().out.split())
    for word in ("a.tar", "corrupt image", "0003", "0026", "caption, words", "1.25"):
        assert word in text, word
    sheet = np.asarray(Image.open(out / "contact.png").convert("RGB")).astype(int)
    cell = inspecting.CELL
    picture = sheet[GAP : GAP + cell, GAP : GAP + cell]
    images = Images(two_sources, cell)
    assert np.abs(picture - ((images.get(0, 0).image.permute(1, 2, 0).numpy() + 1) * 127.5)).max() <= 1
    assert (sheet[GAP + cell : GAP + cell + 17, GAP : GAP + cell] < 128).any()  # its caption


def test_inspect_writes_over_nothing(two_sources: list[Source], tmp_path: Path) -> None:
    for name in ("inspect.json", "contact.png"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match="exists"):
            inspect(two_sources, 16, out)
        assert [f.read_text() for f in out.iterdir()] == ["mine"]


def test_inspect_reads_as_many_as_asked(two_sources: list[Source], tmp_path: Path) -> None:
    figures = inspect(two_sources, 16, tmp_path / "a", limit=3)
    assert [s["read"] for s in figures["sources"]] == [3, 3] and [s["samples"] for s in figures["sources"]] == [9, 7]
    assert inspect(two_sources, 16, tmp_path / "b", limit=3) == figures
    for wrong in (dict(limit=0), dict(size=0)):
        with pytest.raises(ValueError, match="at least 1"):
            inspect(two_sources, **(dict(size=16, out=tmp_path / "c") | wrong))
    assert not (tmp_path / "c").exists()


def test_inspect_survives_long_names_captions_and_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"[red]x.png": encoded(noise(0)), "[red]x.txt": "wörter 猫 ".encode() * 300}
    folder = write_folder(tmp_path / "[bold]", members | {"[/b]y.png": b"", "[/b]y.txt": b"a"})
    figures = inspect([Source(str(folder))], 16, tmp_path / "out")
    assert figures["quantiles"]["caption, words"]["100"] == 600
    assert "[/b]y" in capsys.readouterr().out and (tmp_path / "out" / "contact.png").exists()


def test_inspect_of_nothing_usable_still_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "a", {"x.png": b"", "x.txt": b"a"})
    figures = inspect([Source(str(folder))], 16, tmp_path / "out")
    assert figures["sources"][0]["usable"] == 0 and "empty image file" in " ".join(capsys.readouterr().out.split())
