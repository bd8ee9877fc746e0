"""`emf data` and `emf cache`: what the commands do, one function each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from emf.config import Scale
from emf.limits import Within

Pixels = Annotated[int, Within(1, 65_536)]
Sources = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCES")]


def inspect(
    sources: Sources,
    out: Path,
    size: Pixels = 1024,
    limit: Annotated[int | None, Within(1, 1_000_000_000)] = None,
    listings: Path | None = None,
) -> None:
    """What is in image-text data: counts, drops with reasons, sizes, caption lengths, a contact sheet.

    Args:
        sources: tars of webdataset, Parquet files, folders of images and texts: PATH, PATH@WEIGHT or
            PATH@WEIGHT@CAPTION, where the caption is a key of JSON or a column
        out: folder for inspect.json and contact.png
        size: pixels along a side of the crop that training will use
        limit: how many samples of each source are read; default: all
        listings: a file that keeps what is in the tars, so that the next start need not read them
    """
    from emf.data import inspect as inspecting
    from emf.data.sources import parse_source

    inspecting.inspect([parse_source(text) for text in sources], size, out, limit, listings=listings)
    print(f"open {out / 'contact.png'}")


def cache(
    sources: Sources,
    vae: Path,
    out: Path,
    ta_tok: Path | None = None,
    scale: Scale = 1,
    size: Pixels = 1024,
    *,
    buckets: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    shard: Annotated[int, Within(1, 1_000_000)] = 512,
    batch: Annotated[int, Within(1, 65_535)] = 1,
    workers: Annotated[int, Within(1, 1024)] = 4,
    part: Annotated[int, Within(0, 99_999)] = 0,
    parts: Annotated[int, Within(1, 100_000)] = 1,
    listings: Path | None = None,
    device: str = "auto",
) -> None:
    """Encode image-text data once: latents, and image tokens for BLIP3o-NEXT. Called again it goes on.

    Args:
        sources: tars of webdataset, Parquet files, folders of images and texts: PATH, PATH@WEIGHT or
            PATH@WEIGHT@CAPTION, where the caption is a key of JSON or a column
        vae: a diffusers folder with the autoencoder (DC-AE), or its OWNER/NAME on the Hugging Face Hub
        out: folder of the cache, for --data.sources
        ta_tok: ta_tok.pth, to keep the image tokens too
        scale: side of the square of image tokens that is pooled into one
        size: pixels along a side of the centre crop
        buckets: crop each picture to the size of the nearest of SANA's ratios instead, of about size x size pixels; for
            --data.buckets True
        dtype: number format that the latents are kept in
        shard: how many samples a file of the cache holds; a kill loses one file's work
        batch: how many images are encoded at once; above 1 a latent may round otherwise, by the company it is in
        workers: how many threads read images
        part: number of this process, from 0, where several share the work
        parts: how many processes share the work, each called with its own --part
        listings: a file that keeps what is in the tars, so that the next start need not read them
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
    """
    from emf.conditioning.ta_tok import load_ta_tok
    from emf.data.buckets import PARTS
    from emf.data.cache import write_cache
    from emf.data.feed import TOKEN_PIXELS
    from emf.data.images import Images
    from emf.data.sources import parse_source
    from emf.device import device as find_device
    from emf.files import check_writable
    from emf.idle import refuse_idle, unless
    from emf.model.autoencoder import load_dcae
    from emf.train.paths import whole_source
    from emf.weights.hub import AUTOENCODER, named

    if ta_tok is None:
        refuse_idle("cache", {"scale": unless(scale, 1)}, "it pools image tokens, which need --ta-tok")
    place = find_device(device)
    check_writable(out, "cache: ")
    autoencoder = load_dcae(named(vae, AUTOENCODER, "latent"), device=place)
    if buckets and size % (PARTS * autoencoder.scale):
        of = PARTS * autoencoder.scale
        raise ValueError(f"cache: --size {size} gives buckets that are no whole latents; expected a multiple of {of}")
    further: dict[str, Any] = {}
    if ta_tok is not None:
        tokenizer = load_ta_tok(ta_tok, scale=scale).to(place)
        further = dict(tokenize=lambda x: tokenizer(x.to(place)), tokenizer=f"TA-Tok, pooled {scale} x {scale}")
    small = TOKEN_PIXELS if ta_tok is not None else None
    by_ratio: Any = dict(buckets=buckets, workers=workers)
    images = Images([parse_source(whole_source(text)) for text in sources], size, small, listings, **by_ratio)
    further |= dict(dtype=dtype, shard=shard, batch=batch, workers=workers, part=part, parts=parts)
    write_cache(images, autoencoder.encode, out, encoder=autoencoder.name, **further)
