"""Whatever bytes a caption or a tar holds: a sample, a drop with its reason, or a ValueError of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from damaged import changed, damaged, holds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_files import encoded, noise, pairs, tar_of

from emf.data.cache import Cache
from emf.data.drops import Dropped
from emf.data.images import Images, Sample, read_caption
from emf.data.shards import Shard, shard_file, write_shard
from emf.data.sources import Source, parse_source
from emf.data.tars import TarListings, read_tar

WHOLE = [
    b'{"caption": "a dog \\ud83d\\ude00", "text": null}',
    b"\xef\xbb\xbfa caf\xc3\xa9\r\nin two lines",
    "a cat".encode("utf-16"),
]


@given(data=st.one_of(st.binary(max_size=60), damaged(WHOLE, 600)), is_json=st.booleans())
@example(data=b'{"caption": "a dog \\ud83d"}', is_json=True)  # cut in the middle of a letter
def test_any_caption_is_text_or_a_reason(data: bytes, is_json: bool) -> None:
    try:
        text = read_caption(data, is_json, None)
    except ValueError as error:
        assert ":" in str(error) and len(str(error).splitlines()) == 1
    else:
        assert text == text.strip() and text.encode() and text and "\r" not in text and not text.startswith("\ufeff")


TARS = [tar_of(pairs(2)), tar_of(pairs(2)) + tar_of(pairs(1, 5))]


@given(data=st.one_of(st.binary(max_size=60), damaged(TARS, 600)))
def test_any_tar_gives_what_is_whole_in_it(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.tar"
    file.write_bytes(data)
    members, problem = read_tar(str(file))
    assert all(offset + size <= len(data) for _, offset, size in members) and len(problem.splitlines()) <= 1
    try:
        images = Images([Source(str(file))], 8)
    except ValueError as error:
        assert "any.tar" in str(error) and len(str(error).splitlines()) == 1
        return
    for i in range(images.counts[0]):
        try:
            assert images.get(0, i).caption
        except Dropped as drop:
            assert drop.reason


@given(tree=changed([{"caption": "a dog", "text": "a cat", "id": 3}]))
def test_any_json_gives_a_caption_that_is_there_or_a_reason(tree: Any) -> None:
    """null is absent, so that the next key is taken."""
    texts = [tree[k] for k in ("caption", "text") if tree.get(k) is not None] if isinstance(tree, dict) else []
    try:
        text = read_caption(json.dumps(tree).encode(), True, None)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert not texts or not isinstance(texts[0], str) or not texts[0].strip() or "\ud83d" in texts[0]
    else:
        assert text == texts[0].strip() and "\ud83d" not in text


MEMBER = dict(pairs(1))
LARGE = encoded(noise(0, 400, 400))
SECOND = LARGE.index(b"IDAT", LARGE.index(b"IDAT") + 4)
BETWEEN = LARGE[: SECOND - 4] + bytes(8) + LARGE[SECOND + 4 :]
"""Damaged between two chunks, for which Pillow has a SyntaxError."""


@settings(max_examples=60)
@given(data=st.binary(max_size=60) | damaged([MEMBER["0000.png"], encoded(noise(1), "jpeg")], 400))
@example(data=BETWEEN)
def test_any_picture_in_a_tar_is_a_sample_or_a_drop(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "member.tar"
    file.write_bytes(tar_of(MEMBER | {"0000.png": data}))
    images = Images([Source(str(file))], 8)
    try:
        assert images.get(0, 0).image.shape == (3, 8, 8)  # type: ignore[union-attr]
    except Dropped as drop:
        assert drop.reason in ("corrupt image", "empty image file", "image too large") and drop.key == "member.tar:0000"


LISTED = {"kind": TarListings.KIND, "tars": {"/a.tar": [10, 10, "", [["0.png", 512, 3], ["0.txt", 1536, 1]]]}}


@given(tree=changed([LISTED]))
def test_any_listing_is_read_or_refused(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "listings.json"
    file.write_text(json.dumps(tree))
    holds(lambda: [listed[3][0] for listed in TarListings(file).tars.values() if listed[3]], "listings.json")


def small_cache(folder: Path) -> Path:
    """A cache of two samples and a drop."""
    samples = [Sample(f"k{i}", "s", "a cat", mean=torch.zeros(1, 2, 2)) for i in range(2)]
    folder.mkdir(exist_ok=True)
    write_shard(shard_file(folder, 0), [samples[0], Dropped("k1", "s", "corrupt image", ""), samples[1]])
    return folder


SETTINGS = dict(version=1, encoder="identity", tokenizer=None, dtype="float32", shard=4, size=2, token_size=None)
SETTINGS |= dict(keys="0", names=["s"], counts=[3], weights=[1.0])


def read_cache(folder: Path) -> None:
    cache = Cache(folder)
    for source, count in enumerate(cache.counts):
        for i in range(count):
            try:
                assert cache.get(source, i).mean is not None
            except Dropped as drop:
                assert drop.reason


@given(tree=changed([SETTINGS]))
def test_any_settings_of_a_cache(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = small_cache(tmp_path_factory.getbasetemp() / "cache")
    (folder / "settings.json").write_text(json.dumps(tree))
    holds(lambda: read_cache(folder), "cache")


TOLD = {"keys": ["k0", "k2"], "captions": ["a cat", "a cat"], "drops": [["k1", "s", "corrupt image", ""]]}


@given(tree=changed([TOLD]), row=st.just([0, -1, 1]) | st.lists(st.integers(-2, 3), max_size=4), n=st.integers(1, 3))
def test_any_shard_of_a_cache(tree: Any, row: list[int], n: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    text = torch.from_numpy(np.frombuffer(json.dumps(tree).encode(), np.uint8).copy())
    tensors = {"row": torch.tensor(row, dtype=torch.int32), "text": text, "mean": torch.zeros(n, 1, 2, 2)}
    shard_file(folder, 0).write_bytes(safetensors.torch.save(tensors))
    holds(lambda: read_cache(folder), "shard-00000")


SHARD = safetensors.torch.save({"row": torch.zeros(1, dtype=torch.int32), "text": torch.zeros(3, dtype=torch.uint8)})


@given(data=st.just(b"") | damaged([SHARD], 60))
def test_any_bytes_of_a_shard(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "shard-00000.safetensors"
    file.write_bytes(data)
    holds(lambda: Shard(file), file.name)


@given(text=st.text(st.sampled_from("a@1.-e/n*{}[],:"), max_size=12))
def test_any_words_name_a_source_or_are_refused(text: str) -> None:
    holds(lambda: parse_source(text), "data: ")
