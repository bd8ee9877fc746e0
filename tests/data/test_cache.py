"""A cache: the samples, the order and the losses of its images; what a kill leaves; what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import by_reason, pairs, small_autoencoder, write_folder, write_tar
from torch import Tensor

from emf.data import cache as caching
from emf.data import shards
from emf.data.cache import Cache, encode_samples, places, write_cache
from emf.data.drops import Dropped
from emf.data.images import Images, Sample
from emf.data.mixture import Dataset
from emf.data.sources import Source
from emf.model.autoencoder import DCAE, posterior_sample

SIZE, TOKEN_SIZE = 16, 6


@pytest.fixture(scope="module")
def autoencoder() -> DCAE:
    return DCAE(small_autoencoder())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """13 + 6 samples, three of them broken."""
    root = tmp_path_factory.mktemp("data")
    tar = write_tar(root / "a.tar", pairs(13) | {"0003.png": b"broken", "0004.txt": b"", "0005.txt": "猫 é".encode()})
    return [Source(str(tar), 2.0), Source(str(write_folder(root / "b", pairs(6, 20) | {"0020.png": b""})))]


def images(sources: list[Source]) -> Images:
    return Images(sources, SIZE, TOKEN_SIZE)


def tokenize(small: Tensor) -> Tensor:
    """As many ids as pixels; int64, as an argmax gives them."""
    return ((small.mean(1).flatten(1) + 1) * 30000).long()


def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :, ::4, ::4] * 0.5, x[:, :, 1::4, 1::4].abs() + 0.1


def write(sources: list[Source], encode: Any, out: Path, **settings: Any) -> None:
    write_cache(images(sources), encode, out, **(dict(encoder="small", shard=5) | settings))


def same(a: Sample, b: Sample) -> bool:
    """In all that training sees."""
    tensors = [(a.mean, b.mean), (a.std, b.std), (a.ids, b.ids)]
    equal = all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in tensors)
    return equal and (a.key, a.source, a.caption) == (b.key, b.source, b.caption)


@pytest.mark.parametrize("kind", ["latents", "posterior", "ids", "bfloat16"])
def test_a_cache_gives_the_batches_of_its_images(
    kind: str, sources: list[Source], autoencoder: DCAE, tmp_path: Path
) -> None:
    encode: Any = posterior if kind == "posterior" else autoencoder.encode
    tokens = tokenize if kind == "ids" else None
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    write(sources, encode, tmp_path / "c", tokenize=tokens, dtype=dtype)
    live, cached = Dataset(images(sources), seed=3), Dataset(Cache(tmp_path / "c"), seed=3)
    for step in range(10):
        wanted = encode_samples(live.batch(step, 4), encode, tokens, getattr(torch, dtype))
        assert all(map(same, wanted, cached.batch(step, 4)))
        assert all(map(same, wanted[1::2], cached.batch(step, 4, 1, 2)))
    sample = cached.batch(0, 1)[0]
    assert sample.mean is not None and sample.mean.dtype == getattr(torch, dtype)
    assert (sample.std is not None) == (kind == "posterior") and (sample.ids is not None) == (kind == "ids")
    if sample.ids is not None:
        assert sample.ids.shape == (TOKEN_SIZE**2,) and sample.ids.dtype == torch.int32
    assert {s.caption for step in range(10) for s in cached.batch(step, 4)} >= {"猫 é", "picture 1", "picture 21"}
    assert by_reason(cached.drops) == {"corrupt image": 1, "empty caption": 1, "empty image file": 1}
    assert len(cached) == len(live) == 19


def test_a_cache_drops_what_its_images_drop(sources: list[Source], tmp_path: Path) -> None:
    write(sources, posterior, tmp_path / "c")
    told: list[list[tuple[Any, ...]]] = []
    for store in (images(sources), Cache(tmp_path / "c")):
        told.append([])
        for place in places(store.counts):
            try:
                store.get(*place)
            except Dropped as drop:
                told[-1].append((place, drop.key, drop.source, drop.reason, drop.detail))
    assert told[0] == told[1] and [place for place, *_ in told[0]] == [(0, 3), (0, 4), (1, 0)]


def losses(batch: Callable[[int], list[Sample]], steps: int = 6) -> list[float]:
    """Of a small flow-matching run whose noise comes from the step."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    values = []
    for step in range(steps):
        noise = torch.Generator().manual_seed(step)
        x = torch.stack([posterior_sample(s.mean, s.std, noise) for s in batch(step) if s.mean is not None])
        e = torch.randn(x.shape, generator=noise)
        loss = (network((x + e) / 2) - (e - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def test_losses_are_identical(sources: list[Source], tmp_path: Path) -> None:
    """Of an autoencoder with a posterior: its noise is drawn at training, and differs from step to step."""
    write(sources, posterior, tmp_path / "c")
    live, cached = Dataset(images(sources), 1), Dataset(Cache(tmp_path / "c"), 1)
    wanted = losses(lambda step: encode_samples(live.batch(step, 4), posterior))
    assert losses(lambda step: cached.batch(step, 4)) == wanted
    assert losses(lambda step: cached.batch(step + 1, 4)) != wanted


class Killed(Exception):
    pass


def counting(encode: Callable[[Tensor], Any], calls: list[int], die_at: int = 0) -> Callable[[Tensor], Any]:
    """An encoder that notes its calls, and is killed at one of them."""

    def counted(x: Tensor) -> Any:
        calls.append(len(x))
        if len(calls) == die_at:
            raise Killed
        return encode(x)

    return counted


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("die_at", [1, 2, 6, 9, 17])
def test_a_killed_cache_goes_on(die_at: int, sources: list[Source], tmp_path: Path) -> None:
    whole, out, calls = tmp_path / "whole", tmp_path / "out", []
    write(sources, posterior, whole)
    with pytest.raises(Killed):
        write(sources, counting(posterior, [], die_at), out)
    before = contents(out) if out.exists() else {}
    if before and die_at > 2:
        with pytest.raises(ValueError, match="holds . of 4 shards; run emf cache again"):
            Cache(out)
    write(sources, counting(posterior, calls), out)
    assert contents(out) == contents(whole)
    shards = sum(name.endswith(".safetensors") for name in before)
    assert sum(calls) == 1 + 16 - sum([3, 5, 4][:shards])  # the probe, and what whole shards do not hold


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_torn_shard_is_written_again(left: int, sources: list[Source], tmp_path: Path) -> None:
    out, calls = tmp_path / "out", []
    write(sources, posterior, out)
    whole = contents(out)
    last = out / "shard-00003.safetensors"
    last.write_bytes(whole[last.name][:left])
    with pytest.raises(ValueError, match="torn"):
        Cache(out)
    write(sources, counting(posterior, calls), out)
    assert contents(out) == whole and sum(calls) == 1 + 4
    write(sources, counting(posterior, calls), out)  # nothing left to do
    assert contents(out) == whole and sum(calls) == 1 + 4 + 1


def test_processes_share_the_work(sources: list[Source], tmp_path: Path) -> None:
    write(sources, posterior, tmp_path / "one")
    for part in (1, 0, 2):
        write(sources, posterior, tmp_path / "three", part=part, parts=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


@pytest.mark.parametrize(
    ("batch", "expected"), [(2, [1, 2, 1, 2, 2, 1, 2, 1, 1, 2, 2]), (3, [1, 3, 3, 2, 3, 1, 3, 1])], ids=["2", "3"]
)
def test_a_batch_of_images_at_once(batch: int, expected: list[int], sources: list[Source], tmp_path: Path) -> None:
    calls: list[int] = []
    write(sources, posterior, tmp_path / "one")
    write(sources, counting(posterior, calls), tmp_path / "many", batch=batch)
    assert calls == expected  # the probe; a dropped sample and a shard's end make smaller ones
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_a_kill_while_writing_leaves_no_shard(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict[str, Tensor], file: Path) -> None:
        file.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards, "save_file", half)
        write(sources, posterior, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.safetensors"))
    write(sources, posterior, tmp_path / "c")
    assert list(contents(tmp_path / "c")) == ["settings.json", *(f"shard-{k:05d}.safetensors" for k in range(4))]


def test_a_disk_that_fills_up_is_one_line(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, Tensor], file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ValueError, match="cannot be written.*No space"):
        write(sources, posterior, tmp_path / "c")


def test_it_says_the_size_first(sources: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Killed):
        write(sources, counting(posterior, [], 2), tmp_path / "c", tokenize=tokenize)
    each = 2 * 3 * 4 * 4 * 4 + 36 * 4
    text = capsys.readouterr().out
    assert f"19 samples x {each:,} bytes" in text and "4 shards" in text and "free" in text
    write(sources, posterior, tmp_path / "d")
    text = capsys.readouterr().out
    assert "4 shards" in text and "corrupt image: a.tar:0003" in text
    write(sources, posterior, tmp_path / "d")
    text = capsys.readouterr().out
    assert "0 samples" in text and "4 shards are there" in text and "corrupt image: a.tar:0003" in text


def test_a_full_disk_is_refused_before_anything_is_written(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: usage._replace(free=3000))
    with pytest.raises(ValueError, match="do not fit"):
        write(sources, posterior, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [dict(dtype="bfloat16"), dict(shard=6), dict(encoder="other"), dict(tokenize=tokenize), dict(tokenizer="t")],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_refused(change: dict[str, Any], sources: list[Source], tmp_path: Path) -> None:
    write(sources, posterior, tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(ValueError, match="other settings"):
        write(sources, posterior, tmp_path / "c", **change)
    assert contents(tmp_path / "c") == before


def test_other_data_is_refused(sources: list[Source], tmp_path: Path) -> None:
    write(sources, posterior, tmp_path / "c")
    for other in (sources[:1], sources[::-1], [sources[0], Source(sources[1].path, 3.0)]):
        with pytest.raises(ValueError, match="other settings"):
            write(other, posterior, tmp_path / "c")
    with pytest.raises(ValueError, match="size was 16, is 32"):
        write_cache(Images(sources, 32), posterior, tmp_path / "c", encoder="small", shard=5)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_caption_or_a_picture_that_changed_is_noticed(kind: str, tmp_path: Path) -> None:
    """By what is in it, not by when it was written; a sample that was dropped too, and the key of the captions."""
    data = pairs(7) | {"0002.png": b"broken"} | {"0004.json": b'{"caption": "a", "other": "b"}'}
    data.pop("0004.txt")

    def source(changed: dict[str, bytes], key: str | None = None) -> list[Source]:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        (tmp_path / "d").mkdir()
        place = tmp_path / "d" / ("a.tar" if kind == "tar" else "a")
        return [Source(str((write_tar if kind == "tar" else write_folder)(place, data | changed)), caption=key)]

    calls: list[int] = []
    write(source({}), counting(posterior, calls), tmp_path / "c", shard=3)
    before, drawn = contents(tmp_path / "c"), len(calls)
    write(source({}), counting(posterior, calls), tmp_path / "c", shard=3)  # written anew with other times
    assert len(calls) == drawn + 1  # the probe alone
    caption = data["0005.txt"]
    picture = bytearray(data["0000.png"])
    picture[-20] ^= 1
    for changed, key, file in (
        ({"0005.txt": bytes([caption[0] ^ 1]) + caption[1:]}, None, 1),  # of the same length
        ({"0000.png": bytes(picture)}, None, 0),
        ({"0002.png": data["0001.png"]}, None, 0),
        ({}, "other", 0),
    ):
        with pytest.raises(ValueError, match=rf"changed since they were encoded .*move away shard-0000{file}.saf") as e:
            write(source(changed, key), posterior, tmp_path / "c", shard=3)
        assert "\n" not in str(e.value) and contents(tmp_path / "c") == before
    fresh = source({"0005.txt": b"another caption"})
    (tmp_path / "c" / "shard-00001.safetensors").unlink()
    write(fresh, posterior, tmp_path / "c", shard=3)
    assert [Cache(tmp_path / "c").get(0, i).caption for i in (0, 5)] == ["picture 0", "another caption"]
    write(fresh, posterior, tmp_path / "c", shard=3)


def test_another_encoder_of_the_same_name_is_refused(sources: list[Source], tmp_path: Path) -> None:
    write(sources, posterior, tmp_path / "c", tokenize=tokenize)
    (tmp_path / "c" / "shard-00002.safetensors").unlink()

    def other(x: Tensor) -> tuple[Tensor, Tensor]:
        return posterior(x.flip(1))

    with pytest.raises(ValueError, match="another latent"):
        write(sources, other, tmp_path / "c", tokenize=tokenize)
    with pytest.raises(ValueError, match="another set of image tokens"):
        write(sources, posterior, tmp_path / "c", tokenize=lambda x: tokenize(-x))
    write(sources, lambda x: tuple(y * 1.001 for y in posterior(x)), tmp_path / "c", tokenize=tokenize)


def test_a_folder_of_the_users_is_left_alone(sources: list[Source], tmp_path: Path) -> None:
    for name, text in (("mine.txt", "mine"), ("settings.json", "{"), ("settings.json", '{"version": 7}')):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        (out / name).write_text(text)
        for use in (lambda out=out: write(sources, posterior, out), lambda out=out: Cache(out)):
            with pytest.raises(ValueError, match="cache: ") as caught:
                use()
            assert len(str(caught.value).splitlines()) == 1
        assert contents(out) == {name: text.encode()}
    with pytest.raises(ValueError, match="holds no cache"):
        Cache(tmp_path / "none")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="cache: .*file is no folder; choose another --out"):
        write(sources, posterior, tmp_path / "file")


def test_a_latent_that_is_not_finite_is_named(sources: list[Source], tmp_path: Path) -> None:
    def nan(x: Tensor) -> Tensor:
        return x / 0

    with pytest.raises(ValueError, match="a.tar:0000 is not finite"):
        write(sources, nan, tmp_path / "c")


def test_wrong_arguments_are_one_line(sources: list[Source], tmp_path: Path) -> None:
    for wrong in (dict(shard=0), dict(batch=0), dict(part=2, parts=2), dict(part=-1)):
        with pytest.raises(ValueError, match="expected at least 1"):
            write(sources, posterior, tmp_path / "c", **wrong)
    with pytest.raises(ValueError, match="token_size"):
        write_cache(Images(sources, SIZE), posterior, tmp_path / "c", encoder="small", tokenize=tokenize)
    nothing = write_folder(tmp_path / "n", {"a.png": b"", "a.txt": b"a"})
    with pytest.raises(ValueError, match="none of 1 samples"):
        write([Source(str(nothing))], posterior, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_weights_may_change_when_a_cache_is_read(sources: list[Source], tmp_path: Path) -> None:
    write(sources, posterior, tmp_path / "c")
    assert Cache(tmp_path / "c").weights == [2.0, 1.0]
    only = Dataset(Cache(tmp_path / "c", weights=[1e-9, 1.0]))
    assert {s.source for s in only.batch(0, 64)} == {sources[1].path}
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="weights"):
            Cache(tmp_path / "c", weights=weights)


def test_settings_say_what_is_in_it(sources: list[Source], autoencoder: DCAE, tmp_path: Path) -> None:
    write(sources, autoencoder.encode, tmp_path / "c", encoder=autoencoder.name)
    settings = json.loads((tmp_path / "c" / "settings.json").read_text())
    assert settings["encoder"] == "AutoencoderDC f4c4, scaling_factor 0.41407"
    assert (settings["size"], settings["dtype"], settings["counts"]) == (16, "float32", [13, 6])
