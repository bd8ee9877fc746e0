"""Aspect-ratio buckets: SANA's sizes, which of them a picture goes to, and which samples are in a step of one size."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, noise, write_folder, write_tar
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from emf.data.batches import Batches, DataConfig
from emf.data.buckets import LIST, UNREAD, nearest, sizes
from emf.data.cache import Cache, parts_of, read_settings, write_cache
from emf.data.caches import Caches
from emf.data.draws import BLOCK, Draws, even_shares
from emf.data.feed import check_sources, feed
from emf.data.images import Images, centre_crop, part_of
from emf.data.inspect import inspect
from emf.data.mixture import BucketOrder, Dataset, Mixture
from emf.data.sources import Source
from emf.files import image_size, open_image
from emf.recipes import sana_1600m

SHAPES = {"square": (40, 40), "wide": (60, 30), "tall": (24, 60)}
PICTURES = ["square"] * 6 + ["wide"] * 5 + ["tall"] * 3


def members(names: list[str], first: int = 0) -> dict[str, bytes]:
    found = {}
    for i, name in enumerate(names, first):
        found |= {f"{i:04d}.png": encoded(noise(i, *SHAPES[name])), f"{i:04d}.txt": f"{name} {i}".encode()}
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """A tar with a picture without a size and one that is cut short, and a folder."""
    root = tmp_path_factory.mktemp("data")
    cut = encoded(noise(2, *SHAPES["square"]))[:300]
    tar = write_tar(root / "a.tar", members(PICTURES) | {"0001.png": b"broken", "0002.png": cut})
    return [Source(str(tar), 2.0), Source(str(write_folder(root / "b", members(["wide", "tall", "wide"], 20))), 1.0)]


def bucketed(sources: list[Source], size: int = 16) -> Images:
    return Images(sources, size, buckets=True)


def seen(dataset: Dataset, step: int, part: int = 0, parts: int = 1) -> list[tuple[str, str, str]]:
    return [(s.key, s.source, s.caption) for s in dataset.batch(step, 4, part, parts)]


@pytest.mark.parametrize("base", [512, 1024])
def test_the_sizes_are_those_of_diffusers(base: int) -> None:
    """Whose list for generation leaves some ratios out. Read and not imported, which takes seconds."""
    package = find_spec("diffusers")
    assert package is not None and package.origin is not None
    text = (Path(package.origin).parent / "pipelines/pixart_alpha/pipeline_pixart_alpha.py").read_text()
    bins = ast.literal_eval(text.partition(f"ASPECT_RATIO_{base}_BIN = ")[2].partition("}")[0] + "}")
    ours = {ratio: size for (ratio, *_), size in zip(LIST, sizes(base), strict=True)}
    assert len(ours) == 40 and len(bins) == 33
    for ratio, (height, width) in bins.items():
        assert ours[float(ratio)] == (width, height)
    assert all(0.9 * base**2 < width * height <= base**2 for width, height in ours.values())
    assert all(abs(height / width - ratio) < 0.012 for ratio, (width, height) in ours.items() if 0.3 < ratio < 3.5)
    assert [ratio for ratio, *_ in LIST] == sorted(ours)


def test_a_picture_goes_to_the_nearest_ratio() -> None:
    from diffusers.image_processor import PixArtImageProcessor

    table = {str(ratio): [16 * height, 16 * width] for ratio, height, width in LIST}
    random = np.random.default_rng(0)
    for width, height in [(16, 16), (1, 999), (999, 1), *random.integers(1, 3000, (50, 2)).tolist()]:
        want = PixArtImageProcessor.classify_height_width_bin(height, width, table)
        assert sizes(256)[nearest(width, height)] == want[::-1]
    with pytest.raises(ValueError, match="size 18 have no whole sides; expected a multiple of 16, as 16"):
        sizes(18)
    with pytest.raises(ValueError, match=r"config: data.buckets needs a data.size that is a multiple of 16, not 24"):
        DataConfig(("x",), 24, buckets=True)


def test_the_crop_is_the_largest_of_its_ratio() -> None:
    picture = noise(0, 50, 40)
    assert part_of(picture.size, (20, 10)) == (50, 25) and part_of(picture.size, (10, 20)) == (20, 40)
    pixels = torch.from_numpy(np.array(picture).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    assert torch.equal(centre_crop(picture, (50, 20)), pixels[:, 10:30])  # nothing to resize
    assert torch.equal(centre_crop(picture, (10, 40)), pixels[:, :, 20:30])
    assert torch.equal(centre_crop(picture, (16, 16)), centre_crop(picture, 16))


def test_code_that_is_made_for_one_size_is_refused() -> None:
    config = sana_1600m()
    data, sizes = DataConfig(("x",), 512, buckets=True), replace(config.transformer, sample_size=16)
    for name in ("compile", "graphs"):
        with pytest.raises(ValueError, match=f"config: {name} True makes its code for one size of picture"):
            replace(config, data=data, transformer=sizes, **{name: True})


def test_a_size_is_known_where_a_png_says_compressed_how_it_is_turned() -> None:
    xmp = '<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    for how in (False, True):
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp, zip=how)
        data = encoded(noise(0, 300, 200), "png", pnginfo=text)
        assert image_size(data) == open_image(data).size == (200, 300)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_size_is_that_of_the_upright_picture(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(0, 300, 200), kind, exif=exif)
    assert image_size(data) == open_image(data).size == ((200, 300) if orientation == 6 else (300, 200))
    large = encoded(noise(0, 600, 400), kind, exif=exif, comment=b"x" * 60_000) if kind == "jpeg" else data
    folder = write_folder(tmp_path / "x", {f"a.{kind}": large, "a.txt": b"a"})
    images = bucketed([Source(str(folder))])
    sample = images.get(0, 0)
    assert images.buckets is not None and images.buckets[0].tolist() == [nearest(sample.width, sample.height)]


def test_every_step_has_one_size_and_any_ranks_share_it(sources: list[Source]) -> None:
    one, *several = (Dataset(bucketed(sources), seed=5) for _ in range(4))
    of_size = Counter[tuple[int, ...]]()
    for step in range(40):
        batch = one.batch(step, 4)
        shapes = {tuple(s.image.shape) for s in batch if s.image is not None}
        assert len(shapes) == 1 and len(batch) == 4
        of_size[shapes.pop()] += 1
        whole = seen(one, step)
        for parts in (2, 4):
            for part in range(parts):
                assert seen(several[part % 3], step, part, parts) == whole[part::parts]
    # 2/3 of the tar's 13 with a size, 1/3 of the folder's 3
    tall = 2 / 3 * 3 / 13 + 1 / 3 * 1 / 3
    want = {(3, 16, 16): 2 / 3 * 5 / 13, (3, 11, 22): 1 - tall - 2 / 3 * 5 / 13, (3, 25, 10): tall}
    assert of_size.keys() == want.keys()
    assert all(abs(of_size[shape] - 40 * share) < 2 for shape, share in want.items())
    late = Dataset(bucketed(sources), seed=5)  # as after --resume: no step before it was asked for
    assert seen(late, 37) == seen(one, 37) != seen(Dataset(bucketed(sources), seed=6), 37)
    assert len(one.drops) == 2  # what has no size is dropped at once, what is cut short when it is met


def test_nothing_is_left_over_when_a_bucket_has_been_gone_through(tmp_path: Path) -> None:
    """A batch goes on into the next permutation, so all pictures of a bucket are seen as often, up to one time."""
    images = bucketed([Source(str(write_folder(tmp_path / "x", members(PICTURES))))])
    dataset = Dataset(images, 1)
    assert isinstance(dataset.order, BucketOrder)
    counts = Counter[str]()
    for step in range(70):
        counts.update(key for key, *_ in seen(dataset, step))
        for name in SHAPES:
            often = [counts[f"{i:04d}"] for i, other in enumerate(PICTURES) if other == name]
            assert max(often) - min(often) <= 1
    assert 18 <= min(counts.values()) <= max(counts.values()) <= 22  # 280 of 14
    orders = [dataset.order.permutation(0, int(dataset.order.present[0]), epoch).tolist() for epoch in range(4)]
    assert len({*map(tuple, orders)}) > 1 == len({*map(frozenset, orders)})  # in another order each time


def test_a_share_of_the_steps_is_kept_to_a_few() -> None:
    weights = [0.001, 0.199, 0.5, 0.3]
    draws = Draws(weights, even_shares(3))
    counts = np.zeros(4)
    for position in range(70_000):
        number, before = draws[position]
        assert before == counts[number]
        counts[number] += 1
        assert abs(counts - np.array(weights) * (position + 1)).max() < 4, position
    assert Draws(weights, even_shares(3))[69_999] == (number, before)  # asked for alone
    numbers = [[Draws(weights, even_shares(seed))[i][0] for i in range(20)] for seed in (3, 4)]
    assert numbers[0] != numbers[1]


def test_the_memory_of_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of 40 buckets may keep its blocks, on every rank: 16 MiB in all."""
    kept: list[np.ndarray] = []
    draw = Draws._draw
    monkeypatch.setattr(Draws, "_draw", lambda self, block: (kept.extend(drawn := draw(self, block)), drawn)[1])
    draws = Draws([0.5, 0.5], even_shares(3))
    assert draws[0][1] == 0
    blocks = draws._block.cache_info().maxsize
    assert blocks and 40 * blocks * sum(array.nbytes for array in kept) <= 16 << 20
    # the last rank of a block is the largest that there can be
    assert Draws([1.0], even_shares(3))[BLOCK - 1] == (0, BLOCK - 1)


def test_another_of_its_bucket_takes_the_place_of_what_cannot_be_used(tmp_path: Path) -> None:
    cut = encoded(noise(0, *SHAPES["tall"]))[:300]
    first = write_folder(tmp_path / "a", members(["tall", "wide", "tall"]) | {"0000.png": cut, "0002.png": cut})
    second = write_folder(tmp_path / "b", members(["wide", "tall"], 10))
    both = Dataset(bucketed([Source(str(first)), Source(str(second))]), 0)
    keys = {key for step in range(30) for key, *_ in seen(both, step)}
    assert keys == {"0001", "0010", "0011"} and sum(both.drops.counts.values()) == 2
    alone = Dataset(bucketed([Source(str(first))]), 0)  # no tall picture is left: another bucket's step
    assert {key for step in range(30) for key, *_ in seen(alone, step)} == {"0001"}
    ranks = [Dataset(bucketed([Source(str(first))]), 0) for _ in range(2)]
    assert all(seen(d, step, part, 2) for step in range(9) for part, d in enumerate(ranks))
    nothing = write_folder(tmp_path / "c", members(["tall"]) | {"0000.png": b"no"})
    beside = bucketed([Source(str(second)), Source(str(nothing))])
    told = f"{nothing}: none of 1 samples has a size that can be read; emf data inspect names them; leave that source"
    with pytest.raises(ValueError, match=told):
        Dataset(beside, 0)
    with pytest.raises(ValueError, match=told):
        write_cache(beside, encode, tmp_path / "cache", encoder="s")
    broken = write_folder(tmp_path / "d", members(["tall"]) | {"0000.png": cut})
    with pytest.raises(ValueError, match="none of 1 samples can be used"):
        Dataset(bucketed([Source(str(broken))]), 0).batch(0, 2)


def test_rows_that_are_read_together_come_together() -> None:
    mixture = Mixture([4000], [1.0], 0, [[1000] * 4])
    bucket = (np.arange(4000) % 4 == 0).astype(np.int16)
    order = BucketOrder(mixture, [bucket], [1.0])
    places = [order.place(1, position) for position in range(1000)]
    assert sorted(index for _, index, _ in places) == list(range(0, 4000, 4))
    groups = [index // 1000 for _, index, _ in places]
    assert len(set(groups[:500])) == len(set(groups[500:])) == 2 and len(set(groups)) == 4


def encode(images: Tensor) -> Tensor:
    return images[:, :, ::2, ::2]


def test_a_cache_gives_the_batches_of_its_images(sources: list[Source], tmp_path: Path) -> None:
    for part in (1, 0):
        write_cache(bucketed(sources, 32), encode, tmp_path / "c", encoder="s", shard=2, part=part, parts=2)
    live, cached = Dataset(bucketed(sources, 32), 3), Dataset(Cache(tmp_path / "c"), 3)
    several = Dataset(Caches([Source(str(tmp_path / "c"))]), 3)
    for step in range(20):
        assert seen(live, step) == seen(cached, step) == seen(several, step)
        for image, latent in zip(live.batch(step, 4), cached.batch(step, 4), strict=True):
            assert image.image is not None and latent.mean is not None
            assert torch.equal(encode(image.image[None])[0], latent.mean)
    assert live.drops.counts == cached.drops.counts == several.drops.counts and len(live.drops) == 2
    again = bucketed(sources, 32)
    write_cache(again, encode, tmp_path / "c", encoder="s", shard=2)  # nothing is left to do
    assert read_settings(tmp_path / "c")["buckets"][nearest(60, 30)] == 7
    with pytest.raises(ValueError, match="choose another --out"):
        write_cache(Images(sources, 32), encode, tmp_path / "c", encoder="s", shard=2)


def test_a_cache_of_pictures_that_changed_their_ratio_says_which_sizes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", members(["square", "wide", "wide"]))
    write_cache(bucketed([Source(str(folder))], 32), encode, tmp_path / "c", encoder="s")
    (folder / "0001.png").write_bytes(encoded(noise(1, *SHAPES["square"])))
    with pytest.raises(ValueError) as refused:
        write_cache(bucketed([Source(str(folder))], 32), encode, tmp_path / "c", encoder="s")
    assert str(refused.value) == (
        f"cache: the sizes of samples changed since {tmp_path / 'c'} was made: 44x22 (2 then, 1 now), 32x32 (1 then, 2 "
        "now); choose another --out"
    )


def test_shards_are_of_one_bucket() -> None:
    buckets = [np.array([3, UNREAD, 1, 3]), np.array([3, 1])]
    assert [list(part) for part in parts_of(buckets, 6, 2)] == [[2, 5], [0, 3], [4], [1]]
    assert [list(part) for part in parts_of(None, 5, 2)] == [[0, 1], [2, 3], [4]]


class Words:
    """An encoder that keeps captions as they are."""

    def tokenize(self, captions: list[str], ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(captions), 1), torch.ones(len(captions), 1, dtype=torch.bool)


def test_a_feed_takes_them_and_refuses_what_does_not_fit(
    sources: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    write_cache(bucketed(sources, 32), encode, out, encoder="s", shard=4)
    write_cache(Images(sources, 32), encode, tmp_path / "square", encoder="s", shard=4)
    named = tuple(f"{s.path}@{s.weight}" for s in sources)

    def batches(*paths: str, side: int = 16, **how: Any) -> Batches:
        return Batches(5, 4, (3, side, side), DataConfig(paths, **how))

    cpu = torch.device("cpu")
    live = feed(batches(*named, side=32, size=32, buckets=True), Words(), cpu)
    said = capsys.readouterr().out
    assert "data: 3 of 40 sizes by ratio have pictures, 44x22 the most (7)" in said
    cached = feed(batches(str(out), buckets=True), Words(), cpu)
    for step in range(6):
        x, z = live(step, 0, 1)[0], cached(step, 0, 1)[0]
        assert torch.equal(encode(x), z) and torch.equal(live(step, 1, 2)[0], x[1::2])
    with pytest.raises(ValueError, match="holds pictures of many sizes; say --data.buckets True"):
        check_sources(batches(str(out)))
    with pytest.raises(ValueError, match="holds squares; leave out data.buckets, or cache it again with --buckets"):
        check_sources(batches(str(tmp_path / "square"), buckets=True))
    with pytest.raises(ValueError, match="holds sizes by ratio, and .*square squares"):
        Caches([Source(str(out)), Source(str(tmp_path / "square"))])
    with pytest.raises(ValueError, match=r"the model takes \(3, 32, 32\)"):
        feed(batches(str(out), side=32, buckets=True), Words(), cpu)


def test_rows_of_a_parquet_file_have_buckets(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from parquet_files import write_parquet

    pictures = [*members(PICTURES).values()]
    file = tmp_path / "a.parquet"
    write_parquet(file, {"image": [*pictures[::2], b"no"], "text": [*map(bytes.decode, pictures[1::2]), "x"]}, group=4)
    images = bucketed([Source(str(file))])
    folder = bucketed([Source(str(write_folder(tmp_path / "x", members(PICTURES))))])
    assert images.buckets is not None and folder.buckets is not None and len(images.drops) == 1
    assert images.buckets[0].tolist() == [*folder.buckets[0].tolist(), UNREAD]
    dataset = Dataset(images, 2)
    often = Counter(caption for step in range(35) for *_, caption in seen(dataset, step))
    assert len(often) == 14 and max(often.values()) - min(often.values()) <= 2


def test_inspect_counts_them(sources: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = inspect(sources, 32, tmp_path / "out")
    assert figures["buckets"] == {"44x22": 7, "32x32": 4, "20x50": 4}
    assert "no sizes by ratio" not in capsys.readouterr().out
    assert inspect(sources[1:], 30, tmp_path / "other")["buckets"] == {}
    said = " ".join(capsys.readouterr().out.split())
    assert "no sizes by ratio: --data.buckets True needs a --size that is a multiple of 16" in said
