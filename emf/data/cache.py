"""Encoded once, trained on often: latents and image-token ids of a data set as shards.

A cache is a folder of `settings.json` and `shard-00000.safetensors`, ... Shard k belongs to samples k n .. (k + 1) n of
all sources in turn, the unusable among them, so that a cache gives the batches that its images give. Safetensors and
not tars: all of a shard's latents have one shape, a row is one seek in a file that stays mapped, bfloat16 is kept as it
is, and a torn file is known by its header. A shard holds
    mean  [m, C, h, w]  the latents, in the dtype that the caller chose
    std   [m, C, h, w]  only of an autoencoder with a posterior: see autoencoder.posterior_sample
    ids   [m, N] int32  only with a tokenizer
    row   [n] int32     row of each sample, -1 where it was dropped
    number [n] int64    only with buckets (emf.data.buckets): place of each sample among all. A shard then holds samples
                        of one bucket, so shard k belongs to the k'th part of n or fewer, bucket by bucket; what has no
                        size comes last
    mark  [n] int64     of each sample: Images.mark, by which a source that has changed is noticed
    text  [bytes] uint8 JSON: keys and captions of the m rows; (key, source, reason, detail) of the others; `several`,
                        where a row has several captions, are all captions of each that has
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from emf.data.buckets import LIST, UNREAD, sizes
from emf.data.drops import Dropped, Drops
from emf.data.images import Images, Sample, check_sizes, count_buckets, fetch, marks, turned
from emf.data.shards import Shard, is_whole, shard_file, write_shard
from emf.files import SETTINGS, check_claim, claim, filled, read_object
from emf.show.progress import bars, track

Encode = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
"""Images [B, 3, size, size] in [-1, 1] -> latents [B, C, h, w], or (mean, std) of a posterior, of that shape each."""
Tokenize = Callable[[Tensor], Tensor]
"""Images [B, 3, token_size, token_size] in [-1, 1] -> ids [B, N]."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VERSION = 1


def encode_samples(
    samples: Sequence[Sample],
    encode: Encode,
    tokenize: Tokenize | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> list[Sample]:
    """Samples with pixels -> samples with mean, std and ids (on the CPU) in their place: what a cache stores, and what
    training without a cache does.

    batch: images an encoder gets at once. With 1 a latent is a function of its image alone; a larger batch may round
    otherwise, by the company an image is in. Raises ValueError on samples without pixels, on a tokenizer without small
    crops, and on a latent that is not finite.
    """
    done: list[Sample] = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        images, small = [s.image for s in part], [s.small for s in part]
        if any(x is None for x in images) or (tokenize and any(x is None for x in small)):
            raise ValueError("cache: samples without pixels to encode; an image tokenizer needs Images(token_size=...)")
        latents = encode(torch.stack([x for x in images if x is not None]))
        mean, std = latents if isinstance(latents, tuple) else (latents, None)
        ids = tokenize(torch.stack([x for x in small if x is not None])) if tokenize else None
        for i, sample in enumerate(part):
            if not torch.isfinite(mean[i]).all():
                raise ValueError(f"cache: the latent of {sample.key} is not finite; run the encoder in float32")
            done.append(
                replace(
                    sample,
                    image=None,
                    small=None,
                    mean=mean[i].to("cpu", dtype),
                    std=None if std is None else std[i].to("cpu", dtype),
                    ids=None if ids is None else ids[i].to("cpu", torch.int32),
                )
            )
    return done


def places(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(source, index) of every sample, source by source: the order of the shards."""
    return [(source, index) for source, count in enumerate(counts) for index in range(count)]


def parts_of(buckets: Sequence[np.ndarray] | None, total: int, shard: int) -> list[Sequence[int]]:
    """The numbers of the samples of each shard. buckets: of the samples of each source; none: all have one size."""
    if buckets is None:
        return [range(first, min(first + shard, total)) for first in range(0, total, shard)]
    every, parts = np.concatenate(buckets), list[Sequence[int]]()
    for bucket in (*range(len(LIST)), UNREAD):
        held = np.flatnonzero(every == bucket).tolist()
        parts += [held[first : first + shard] for first in range(0, len(held), shard)]
    return parts


def first_usable(images: Images, workers: int) -> Sample:
    """The first sample that can be decoded. Raises ValueError where there is none."""
    for sample in fetch(images, places(images.counts), workers):
        if not isinstance(sample, Dropped):
            return sample
    raise ValueError(f"cache: none of {sum(images.counts)} samples of {', '.join(images.names)} can be used")


def digest(images: Images) -> str:
    """Of the keys of all samples, in order, and their buckets: other data has another one."""
    text = "\0".join(key for index in images.indices for key in index.keys)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape"))
    for buckets in images.buckets or []:
        digest.update(buckets.astype("<i2").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Settings:
    """What a cache's settings.json holds."""

    version: int
    encoder: str
    tokenizer: str | None
    dtype: Literal["float32", "bfloat16"]
    shard: int
    size: int
    token_size: int | None
    keys: str
    names: list[str]
    counts: list[int]
    weights: list[float]
    runs: list[list[int] | None] | None = None
    buckets: list[int] | None = None
    """How many samples each bucket has; none: the crops are squares."""

    def __post_init__(self) -> None:
        if self.buckets is not None:
            known = len(self.buckets) == len(LIST) and min(self.buckets) >= 0
            if not known or not 0 < sum(self.buckets) <= sum(self.counts):
                raise ValueError("buckets do not fit counts")
        fit = len(self.names) == len(self.counts) == len(self.weights) > 0
        if not fit or min(self.shard, *self.counts, *self.weights) <= 0:
            raise ValueError(f"names, counts and weights of {len(self.names)} sources, or shard, do not fit")
        for run, count in zip(self.runs or [], self.counts, strict=False):
            fit &= run is None or (sum(run) == count and min(run) > 0)
        if not fit or len(self.runs or self.names) != len(self.names):
            raise ValueError("runs do not add up to counts")


def read_settings(folder: Path) -> dict[str, Any]:
    """A cache's settings. Raises ValueError where the folder is no cache."""
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(f"cache: {folder} holds no cache; expected a folder that emf cache wrote")
    settings = read_object(file, "cache", "the settings of a cache")
    if settings.get("version") != VERSION:
        raise ValueError(f"cache: {file} is not of version {VERSION} of the cache; make it again with this emf")
    filled(_Settings, settings, f"cache: {file}")
    return settings


def check_same_encoder(out: Path, shards: Iterable[int], probe: Sample) -> None:
    """Raises ValueError where a whole shard holds another latent of the probed sample than the encoder gives now: a
    name in the settings does not tell one encoder's weights from another's."""
    for shard in shards:
        opened = Shard(shard_file(out, shard))
        if probe.key not in opened.keys:
            continue
        there = opened.sample(opened.keys.index(probe.key), probe.source)
        assert there.mean is not None and probe.mean is not None
        # another device or batch rounds otherwise; other weights are far beyond 10 %
        error = float((there.mean.float() - probe.mean.float()).norm() / probe.mean.float().norm().clamp(min=1e-12))
        swapped = (
            there.ids is not None and probe.ids is not None and float((there.ids != probe.ids).float().mean()) > 0.1
        )
        if error > 0.1 or swapped:
            what = f"latent (relative error {error:.2g})" if error > 0.1 else "set of image tokens"
            raise ValueError(f"cache: {out} holds another {what} of {probe.key} than is computed now; same weights?")
        return


def check_same_sizes(out: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where the folder holds a cache of as many samples of other sizes by ratio."""
    if not (out / SETTINGS).is_file():
        return
    old = read_settings(out)
    there, now = old.get("buckets"), settings["buckets"]
    same = all(old[name] == settings[name] for name in ("names", "counts", "size"))
    if there is None or not same or there == now:
        return
    told = [
        f"{width}x{height} ({a} then, {b} now)"
        for (width, height), a, b in zip(sizes(old["size"]), there, now, strict=True)
        if a != b
    ]
    raise ValueError(
        f"cache: the sizes of samples changed since {out} was made: {', '.join(told[:5])}{', ...' * (len(told) > 5)}; "
        "choose another --out"
    )


def check_unchanged(
    out: Path, images: Images, whole: Sequence[int], parts: Sequence[Sequence[int]], workers: int
) -> None:
    """Raises ValueError where a sample of a whole shard has another caption or image than the shard was made of. Shards
    of earlier versions do not say what they were made of, and are kept."""
    every, changed = places(images.counts), dict[int, list[str]]()
    for k in track(whole, "compare with the sources", disable=not whole):
        made, here = Shard(shard_file(out, k)).marks, [every[n] for n in parts[k]]
        if made and (differ := [p for p, a, b in zip(here, marks(images, here, workers), made, strict=True) if a != b]):
            changed[k] = [images.key(*place) for place in differ]
    if changed:
        names = [shard_file(out, k).name for k in changed]
        count, first = sum(map(len, changed.values())), next(iter(changed.values()))[0]
        said = f"{', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
        raise ValueError(
            f"cache: caption or image of {count} samples, {first} the first, changed since they were encoded into "
            f"{out}; choose another --out, or move away {said} to have them made anew"
        )


def write_cache(
    images: Images,
    encode: Encode,
    out: Path,
    *,
    encoder: str,
    tokenize: Tokenize | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard: int = 512,
    batch: int = 1,
    workers: int = 4,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Encode every sample of images into folder out. Called again it goes on: whole shards are kept.

    encoder, tokenizer: what they are, for settings.json (an autoencoder's `name`). shard: samples a file; a kill loses
    one shard's work. batch: see encode_samples. part of parts: this process writes shards part, part + parts, ..., so
    that several can share the work. Prints what it will write before it starts, and what was dropped.
    Raises ValueError where out holds something else, a cache of other settings, or one of captions or images that have
    changed since, and where the disk is too small.
    """
    if min(shard, batch, workers) < 1 or not 0 <= part < parts:
        raise ValueError(
            f"cache: shard {shard}, batch {batch}, {workers} workers, part {part} of {parts}; expected at least 1, and "
            "part < parts"
        )
    total = sum(images.counts)
    settings: dict[str, Any] = dict(version=VERSION, encoder=encoder, tokenizer=tokenizer, dtype=dtype, shard=shard)
    settings |= dict(size=images.size, token_size=images.token_size if tokenize else None, keys=digest(images))
    settings |= dict(names=images.names, counts=images.counts, weights=images.weights)
    if any(images.runs):
        settings["runs"] = images.runs
    if images.buckets is not None:
        check_sizes(images)
        settings["buckets"] = count_buckets(images.buckets)
        check_same_sizes(out, settings)
    how: Any = dict(own=None, who="cache: ", advice="choose another --out")
    check_claim(out, settings, **how)
    probe = encode_samples([first_usable(images, workers)], encode, tokenize, DTYPES[dtype])[0]
    numbers = parts_of(images.buckets, total, shard)
    shards = range(part, len(numbers), parts)
    whole = [k for k in shards if is_whole(shard_file(out, k))]
    check_unchanged(out, images, whole, numbers, workers)
    check_same_encoder(out, whole, probe)
    todo = [k for k in shards if k not in set(whole)]
    remaining = sum(len(numbers[k]) for k in todo)
    each = sum(x.numel() * x.element_size() for x in (probe.mean, probe.std, probe.ids) if x is not None)
    captions = int(sum(index.caption_bytes for index in images.indices) * remaining / total)
    check_room(out, remaining, each, captions, len(todo), len(whole))
    claim(out, settings, **how, writer=part)
    every = places(images.counts)
    with bars() as progress:
        task = progress.add_task("cache", total=remaining)

        def encoded(where: list[tuple[int, int]]) -> Iterator[Sample | Dropped]:
            waiting: list[Sample] = []
            for sample in fetch(images, where, workers):
                progress.advance(task)
                if isinstance(sample, Dropped):
                    images.drops.add(sample.key, sample.source, sample.reason, sample.detail)
                    yield from encode_samples(waiting, encode, tokenize, DTYPES[dtype], batch)
                    waiting = []
                    yield sample
                    continue
                waiting.append(sample)
                if len(waiting) == batch:
                    yield from encode_samples(waiting, encode, tokenize, DTYPES[dtype], batch)
                    waiting = []
            yield from encode_samples(waiting, encode, tokenize, DTYPES[dtype], batch)

        for k in whole:
            for drop in Shard(shard_file(out, k)).drops:
                images.drops.add(*drop)
        for k in todo:
            here = [every[n] for n in numbers[k]]
            made_of = marks(images, here, workers)  # before they are encoded: what changes meanwhile is noticed later
            write_shard(shard_file(out, k), encoded(here), made_of, numbers[k] if images.buckets is not None else ())
    for line in images.drops.lines():
        print(f"cache: {line}", flush=True)


def check_room(out: Path, samples: int, each: int, captions: int, todo: int, whole: int) -> None:
    """Say what will be written. Raises ValueError where the disk has less room."""
    needed = samples * (each + 12) + captions
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    kept = f"; {whole} shards are there" if whole else ""
    print(
        f"cache: {samples:,} samples x {each:,} bytes + captions = {decimal(needed)} in {todo} shards to {out} "
        f"({decimal(free)} free{kept})",
        flush=True,
    )
    if needed > free:
        raise ValueError(
            f"cache: {decimal(needed)} do not fit into the {decimal(free)} free at {place}; choose another --out, "
            "--dtype bfloat16, or fewer samples"
        )


class Cache:
    """A whole cache as a store of samples, for emf.data.mixture.Dataset. Raises ValueError on one that is not whole."""

    def __init__(self, folder: Path, weights: Sequence[float] | None = None) -> None:
        """weights: of the sources, where they are to be others than at caching."""
        settings = read_settings(folder)
        self.settings, self.folder, self.drops = settings, folder, Drops()
        self.names: list[str] = settings["names"]
        self.counts: list[int] = settings["counts"]
        self.runs: list[list[int] | None] = settings.get("runs") or [None] * len(self.counts)
        self.weights = list(settings["weights"] if weights is None else weights)
        if len(self.weights) != len(self.counts) or not min(self.weights) > 0:
            raise ValueError(f"cache: weights {self.weights}; {folder} has {len(self.counts)} sources")
        self._first = np.concatenate([[0], np.cumsum(self.counts)])
        total, shard = sum(self.counts), int(settings["shard"])
        held = settings.get("buckets")
        each = [total] if held is None else [*held, total - sum(held)]
        files = [shard_file(folder, k) for k in range(sum(-(-n // shard) for n in each))]
        if missing := [f.name for f in files if not f.exists()]:
            raise ValueError(
                f"cache: {folder} holds {len(files) - len(missing)} of {len(files)} shards; run emf cache again to "
                "complete it"
            )
        self._shards = [Shard(f) for f in files]
        for opened in self._shards:
            for drop in opened.drops:
                self.drops.add(*drop)
        self.buckets: list[np.ndarray] | None = None
        if held is not None:
            self.buckets = self._placed([*range(len(LIST)), UNREAD], each, shard)

    def _placed(self, buckets: Sequence[int], each: Sequence[int], shard: int) -> list[np.ndarray]:
        """The buckets of the samples of each source, and where they lie: by the numbers that the shards hold. Raises
        ValueError where the shards are not those of one cache."""
        total = int(self._first[-1])
        found, self._where = np.full(total, UNREAD, np.int16), np.full((total, 2), -1, np.int64)
        of_shard = [bucket for bucket, n in zip(buckets, each, strict=True) for _ in range(-(-n // shard))]
        for k, (opened, bucket) in enumerate(zip(self._shards, of_shard, strict=True)):
            numbers = np.array(opened.numbers, np.int64)
            if len(numbers) != len(opened.rows) or not ((numbers >= 0) & (numbers < total)).all():
                raise ValueError(f"cache: {shard_file(self.folder, k)} holds no numbers of buckets; cache it again")
            found[numbers], self._where[numbers, 0] = bucket, k
            self._where[numbers, 1] = np.arange(len(numbers))
        if (self._where < 0).any():
            raise ValueError(f"cache: the shards of {self.folder} do not hold every sample; run emf cache again")
        return np.split(found, self._first[1:-1])

    def get(self, source: int, index: int, turn: int = 0) -> Sample:
        """See Store."""
        number = int(self._first[source]) + index
        if self.buckets is None:
            shard, place = divmod(number, self.settings["shard"])
        else:
            shard, place = self._where[number].tolist()
        opened = self._shards[shard]
        row = opened.rows[place]
        if row >= 0:
            sample = opened.sample(row, self.names[source])
            return replace(sample, caption=turned(sample.captions or [sample.caption], index, turn))
        raise Dropped(*opened.drops[sum(r < 0 for r in opened.rows[:place])])
