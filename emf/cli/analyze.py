"""`emf analyze`: what its commands do, one function each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from emf.analyze.dino import DINO

Encoders = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=KIND:FOLDER")]
Runs = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FOLDER")]
States = Literal["prompt", "caption", "condition", "connector"]


def discriminability(
    encoders: Encoders,
    data: Path,
    out: Path,
    dino: str = DINO,
    split: str = "train2017",
    k: int = 1,
    queries: int = 5000,
    captions: Literal["first", "random", "all"] = "first",
    pooling: Literal["mean", "last"] = "mean",
    states: States = "prompt",
    image_pooling: Literal["cls", "pooler", "mean"] = "cls",
    resamples: int = 2000,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> None:
    """Are the images of captions that a text encoder holds for alike alike? Goes on where it was stopped; more encoders
    can be named later.

    Args:
        encoders: KIND is blip3o, gemma, clip or t5; NAME=FOLDER alone is a run or an export
        data: COCO 2017 (annotations/captions_SPLIT.json and SPLIT/), or tars or a folder of images with texts
        out: folder for results.json, results.md, discriminability.png, retrieved.png and cache/
        dino: folder or Hub name of a DINOv3 or DINOv2
        split: COCO's, train2017 in the paper
        k: captions retrieved by query
        queries: one caption each of so many random images; 0: of every image
        captions: of an image's several: the first, a random one, or all are retrieved from
        pooling: of the text states: mean over the tokens, or the last token
        states: prompt: of the caption in the encoder's own prompt; caption: of the bare caption; condition: those that
            the transformer's condition is made of (BLIP3o-NEXT: of image tokens, drawn first: slow); connector: after
            the connector
        image_pooling: cls token, the model's pooler output, or the mean over patches
        resamples: of the bootstrap
        seed: of queries, random captions and bootstrap
        dtype: of the text encoder
        device: cpu or cuda
        batch: captions, or images, at once
    """
    from emf.analyze.discriminability import Protocol, run_discriminability
    from emf.analyze.encoders import Embedding, parse_encoders

    named, protocol = parse_encoders(encoders), Protocol(split, k, queries, captions, image_pooling, resamples, seed)
    how = Embedding(pooling, states)
    rows = run_discriminability(
        named, data, out, protocol, how, dino, dtype=dtype, device=device, batch=positive(batch)
    )
    for row in rows:
        print(f"{row.name}: discriminability {row.plain}, centred {row.centred}")
    print(f"open {out / 'results.md'}")


def disentanglement(
    encoders: Encoders,
    prompts: Path,
    out: Path,
    unit: Literal["word", "phrase", "sentence"] = "word",
    fraction: float = 0.5,
    repeats: int = 4,
    limit: int | None = None,
    pooling: Literal["mean", "last"] = "mean",
    states: States = "prompt",
    resamples: int = 2000,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    batch: int = 32,
) -> None:
    """How much of a prompt's embedding is left when parts of the prompt are removed? Goes on where it was stopped; more
    encoders can be named later.

    Args:
        encoders: KIND is blip3o, gemma, clip or t5; NAME=FOLDER alone is a run or an export
        prompts: a folder of texts (DPG-Bench's prompts), a jsonl file, or a text file with a prompt a line
        out: folder for results.json, results.md, disentanglement.png, shortened.png and cache/
        unit: what is removed: words, phrases (between commas, semicolons, colons, sentence ends) or sentences
        fraction: of a prompt's units that are removed; one is removed and one is left at least
        repeats: random removals of each prompt
        limit: only the first prompts
        pooling: of the text states: mean over the tokens, or the last token
        states: as of discriminability
        resamples: of the bootstrap
        seed: of removals and bootstrap
        dtype: of the text encoder
        device: cpu or cuda
        batch: prompts at once
    """
    from emf.analyze.disentanglement import run_disentanglement
    from emf.analyze.encoders import Embedding, parse_encoders
    from emf.analyze.prompts import Shortening

    named, how = parse_encoders(encoders), Shortening(unit, fraction, repeats, seed)
    settings = dict(limit=limit, resamples=positive(resamples), dtype=dtype, device=device, batch=positive(batch))
    for row in run_disentanglement(named, prompts, out, how, Embedding(pooling, states), **settings):  # type: ignore[arg-type]
        print(f"{row.name}: disentanglement {row.plain}, centred {row.centred}")
    print(f"open {out / 'results.md'}")


def steps(
    runs: Runs,
    out: Path,
    steps: tuple[int, ...] = (1, 2, 4, 8, 30),
    prompts: Path | None = None,
    dino: str | None = None,
    vae: Path | None = None,
    guidance: float | None = None,
    seed: int = 0,
    per_tag: int = 50,
    batch: int = 4,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
) -> None:
    """Flow-matching backbones with the same prompts and noise at few steps. Digits are scored; of other images it says
    how near each comes to the same backbone's image of most steps. Goes on where it was stopped.

    Args:
        runs: two or more flow-matching runs or exports
        out: folder for results.json, results.md, steps.png, samples.png and images/
        steps: of Euler's method
        prompts: of other worlds than the digits': a folder of texts, a jsonl file, or a text file
        dino: folder or Hub name of a DINO, for the similarity; none: PSNR alone
        vae: a diffusers folder with the autoencoder; default: that of the run's data, or of the export
        guidance: classifier-free, 1 is none; default: 1.25 for the digits, else 2
        seed: of the noise
        per_tag: digits: prompts of each of the six tasks
        batch: images at once
        dtype: of the backbones
        device: cpu or cuda
    """
    from emf.analyze.steps import Sampling, parse_runs, run_steps

    sampling = Sampling(tuple(steps), guidance, seed, per_tag, batch)
    run_steps(parse_runs(runs), out, sampling, prompts=prompts, vae=vae, dino=dino, dtype=dtype, device=device)
    print(f"open {out / 'results.md'}")


def positive(n: int) -> int:
    if n < 1:
        raise ValueError(f"analyze: {n} must be at least 1")
    return n
