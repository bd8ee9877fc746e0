"""What a step is trained on: (latents, token ids, key mask) of any step's batch, dealt out to any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from emf.data import digits
from emf.data.batches import Batches, DataConfig
from emf.data.buckets import sizes, told_of
from emf.data.cache import read_settings
from emf.data.caches import Caches, is_cache
from emf.data.drops import Drops
from emf.data.sources import Source, find_files, parse_source
from emf.flow import seed_of
from emf.model.autoencoder import Identity, dcae_config, load_dcae

TOKEN_PIXELS = 384  # of the crop that BLIP3o-NEXT's image tokenizer sees


class Feed(Protocol):
    """Rows part, part + parts, ... of step's batch: x [n, C, H, W] float32 latents, ids [n, M], mask [n, M] bool."""

    samples: int | None
    """How many there are, the unusable among them; None: there is no end."""
    stamps: list[tuple[str, str]]
    """Of each source its name and a digest of what its order hangs on (emf.data.images.stamps)."""

    def __call__(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor, Tensor]: ...


class Digits:
    """The small world."""

    samples: int | None = None

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.stamps: list[tuple[str, str]] = []

    def __call__(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        b = self.batches
        x, captions = digits.make_batch(seed_of(b.seed, step), b.size, "train", b.world)
        mine = slice(part, None, parts)
        return x[mine].contiguous(), *digits.WORDS.encode(captions[mine])


class Pictures:
    """Images with captions, from their files or from a cache; encoded here where no cache has done it."""

    def __init__(self, batches: Batches, encoder: Any, device: torch.device) -> None:
        from emf.data.images import Images, count_buckets, stamps
        from emf.data.mixture import Dataset

        b, d = batches, batches.data
        self.batches, self.encoder, self.device = batches, encoder, device
        self.latent: Any = None
        self.tokenizer: Any = None
        self.base = d.size
        sources = [parse_source(text) for text in d.sources]
        if cached := caches_of(d):
            store: Any = Caches(cached)
            self.base = int(store.settings["size"])
        else:
            self.latent = load_dcae(d.vae, device=device) if d.vae else Identity()
            if b.token_scale:
                from emf.conditioning.ta_tok import load_ta_tok

                assert d.ta_tok is not None  # see check_sources
                self.tokenizer = load_ta_tok(d.ta_tok, scale=b.token_scale).to(device)
            small = TOKEN_PIXELS if b.token_scale else None
            store = Images(sources, d.size, small, d.listings, buckets=d.buckets, workers=d.workers)
        self.dataset = Dataset(store, b.seed, d.workers)
        self.samples: int | None = len(self.dataset)
        self.stamps = list(zip(store.names, stamps(store), strict=True))
        self.check(self.dataset.batch(0, b.size, 0, b.size)[0].mean)
        if os.environ.get("RANK", "0") == "0":  # every rank has the same to say
            dropped = self.dataset.drops.news()
            counts = None if store.buckets is None else count_buckets(store.buckets)
            told = [] if counts is None else [told_of(counts, self.base, b.size)]
            for line in (*dropped, *told):
                print(f"data: {line}", flush=True)

    def check(self, cached: Tensor | None) -> None:
        """Raises ValueError where the latents, of which one may be given, are not what the model takes."""
        shape: tuple[int, ...]
        channels, side, _ = wanted = self.batches.latent
        if cached is None:
            own = self.batches.data.size // self.latent.scale
            shape = (self.latent.channels, own, own)
        else:
            shape = tuple(cached.shape)
        if self.batches.data.buckets and cached is not None:  # whichever bucket it is of
            at_side = [(channels, height, width) for width, height in sizes(side)]
            fits = shape in at_side
        else:
            fits = shape == wanted
        if not fits:
            raise ValueError(
                f"data: latents are {shape}, the model takes {wanted}; set data.size, data.vae or "
                "transformer.sample_size to fit"
            )

    def __call__(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        from emf.data.cache import encode_samples
        from emf.model.autoencoder import posterior_sample

        samples = self.dataset.batch(step, self.batches.size, part, parts)
        for line in self.dataset.drops.news():
            print(f"data: {line}", flush=True)
        if samples[0].mean is None:
            encode = lambda images: self.latent.encode(images.to(self.device)).cpu()  # noqa: E731
            tokenize = (lambda images: self.tokenizer(images.to(self.device)).cpu()) if self.tokenizer else None
            samples = encode_samples(samples, encode, tokenize)
        latents = []
        for row, s in enumerate(samples):  # a posterior is drawn from by the row's place, whatever the ranks
            generator = torch.Generator().manual_seed(seed_of(self.batches.seed, step) * 65_537 + part + row * parts)
            assert s.mean is not None
            latents.append(posterior_sample(s.mean.float(), s.std, generator))
        x = torch.stack(latents)
        tokens = [s.ids for s in samples if s.ids is not None]
        ids = self.encoder.from_codes(torch.stack(tokens)) if tokens and self.batches.token_scale else None
        return x, *self.encoder.tokenize([s.caption for s in samples], ids)


def caches_of(data: DataConfig) -> list[Source]:
    """The sources, where they are folders that emf cache wrote; none where they are others. Raises ValueError where
    they are of either kind."""
    sources = [parse_source(text) for text in data.sources]
    cached = [source for source in sources if is_cache(source)]
    if cached and len(cached) < len(sources):
        other = next(source for source in sources if source not in cached)
        raise ValueError(f"data: {cached[0].path} is a cache, and {other.path} is none; cache that one too")
    return cached


def check_sources(batches: Batches) -> None:
    """Raises ValueError, before any network is built, where the sources are not there, need an autoencoder or an image
    tokenizer that was not given, or are a cache, which has been given one in vain."""
    d, channels = batches.data, batches.latent[0]
    if not d.sources:
        return
    if cached := caches_of(d):
        for source in cached:
            _check_cache(Path(source.path), batches)
        return
    for path in (parse_source(text).path for text in d.sources):
        if not os.path.isdir(path):
            find_files(path, Drops())
    if d.vae is not None:
        if not d.vae.is_dir():
            raise ValueError(f"data: no folder {d.vae}, where the autoencoder should lie; name it with --data.vae")
        dcae_config(d.vae)
    elif channels != Identity.channels:
        raise ValueError(
            f"data: the model takes latents of {channels} channels, and {d.sources[0]} holds images; give --data.vae, "
            "which makes them, or a folder from emf cache"
        )
    if batches.token_scale and d.ta_tok is None:
        raise ValueError("data: BLIP3o-NEXT reads the image's tokens; give --data.ta-tok or a cache")
    if d.ta_tok is not None and not d.ta_tok.is_file():
        raise ValueError(f"ta_tok: no file {d.ta_tok}; expected TA-Tok's ta_tok.pth")


def _check_cache(folder: Path, batches: Batches) -> None:
    """Raises ValueError where a cache lacks the image tokens, and on settings of what it has decided already."""
    d, settings = batches.data, read_settings(folder)
    if batches.token_scale and settings["tokenizer"] is None:
        raise ValueError(f"data: {folder} holds no image tokens; cache it again with --ta-tok")
    if d.buckets != (settings.get("buckets") is not None):
        raise ValueError(
            f"data: {folder} holds squares; leave out data.buckets, or cache it again with --buckets"
            if d.buckets
            else f"data: {folder} holds pictures of many sizes; say --data.buckets True"
        )
    if d.size not in (DataConfig().size, settings["size"]):
        raise ValueError(f"config: data.size {d.size} has no effect: {folder} holds crops of {settings['size']} pixels")
    for name in ("ta_tok", "listings"):
        if (value := getattr(d, name)) is not None:
            raise ValueError(f"config: data.{name} {value} has no effect: {folder} is a cache; leave it out")


def feed(batches: Batches, encoder: Any, device: torch.device) -> Feed:
    """The feed of these batches. encoder: what tokenizes the captions (emf.conditioning.encoder.Encoder).

    Raises ValueError on sources that hold no samples or do not fit.
    """
    return Pictures(batches, encoder, device) if batches.data.sources else Digits(batches)
