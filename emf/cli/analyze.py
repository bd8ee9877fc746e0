"""`emf analyze`: what its commands do, one function each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from emf.analyze.choices import (
    DINO,
    RESAMPLES,
    Computing,
    DrawSeed,
    DType,
    Embedding,
    Protocol,
    Resamples,
    Sampling,
    Shortening,
)
from emf.idle import refuse_idle, unless
from emf.limits import Within

Encoders = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=][KIND:]FOLDER")]
Runs = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FOLDER")]
# their fields are flags of the command itself
Retrieving = Annotated[Protocol, tyro.conf.arg(name="")]
Removing = Annotated[Shortening, tyro.conf.arg(name="")]
Reading = Annotated[Embedding, tyro.conf.arg(name="")]
Running = Annotated[Computing, tyro.conf.arg(name="")]
Drawing = Annotated[Sampling, tyro.conf.arg(name="")]


def compare(
    encoders: Encoders,
    out: Path,
    data: Path | None = None,
    prompts: Path | None = None,
    *,
    split: str = Protocol.split,
    dino: str = DINO,
    seed: DrawSeed = 0,
    embedding: Reading = Embedding(),  # noqa: B008 (frozen)
    compute: Running = Computing(),  # noqa: B008
) -> None:
    """Which text encoder to train with? Discriminability and disentanglement of each in one table, ranked, and which of
    them are told apart; on the digits' scenes where no data is given. Goes on where it was stopped; more encoders can
    be named later.

    Args:
        encoders: any text encoder's folder that transformers reads, a run or an export; digits:trained, digits:blurred,
            digits:bag-of-words and digits:random are the digits' own; NAME= says what the table calls it, KIND
            (blip3o, gemma, clip, t5, text) how it is read, where config.json does not say it
        out: folder for results.json and results.md, and the two analyses' own folders
        data: for discriminability, see emf analyze discriminability; default: the digits' scenes
        prompts: for disentanglement, see emf analyze disentanglement; default: the digits' captions
        split: which of COCO's splits is read; the paper reads train2017
        dino: folder or Hub name of a DINOv3 or DINOv2, for data that is given
        seed: seed of the queries, the removals and the bootstrap
    """
    from emf.analyze.comparison import compare_encoders
    from emf.analyze.names import parse_encoders

    _check_dino(data, dino)
    how: Any = dict(split=split, dino=dino, seed=seed, embedding=embedding, compute=compute)
    compare_encoders(parse_encoders(encoders), out, data, prompts, **how)
    print(f"open {out / 'results.md'}")


def _check_dino(data: Path | None, dino: str) -> None:
    if data is None:
        refuse_idle("analyze", {"dino": unless(dino, DINO)}, "the digits' scenes are compared by their pixels")


def discriminability(
    encoders: Encoders,
    out: Path,
    data: Path | None = None,
    *,
    dino: str = DINO,
    protocol: Retrieving = Protocol(),  # noqa: B008 (frozen)
    embedding: Reading = Embedding(),  # noqa: B008
    compute: Running = Computing(),  # noqa: B008
) -> None:
    """Are the images of captions that a text encoder holds for alike alike? Goes on where it was stopped; more encoders
    can be named later.

    Args:
        encoders: see emf analyze encoders
        out: folder for results.json, results.md, discriminability.png, retrieved.png and cache/
        data: COCO 2017 (annotations/captions_SPLIT.json and SPLIT/), or tars or a folder of images with texts;
            default: the digits' scenes, by their smoothed pixels
        dino: folder or Hub name of a DINOv3 or DINOv2, for data that is given
    """
    from emf.analyze.discriminability import run_discriminability
    from emf.analyze.names import parse_encoders

    _check_dino(data, dino)
    for row in run_discriminability(parse_encoders(encoders), data, out, protocol, embedding, dino, compute=compute):
        print(f"{row.name}: discriminability {row.plain}, centred {row.centred}")
    print(f"open {out / 'results.md'}")


def disentanglement(
    encoders: Encoders,
    out: Path,
    prompts: Path | None = None,
    *,
    how: Removing = Shortening(),  # noqa: B008 (frozen)
    limit: Annotated[int | None, Within(1, 10_000_000)] = None,
    embedding: Reading = Embedding(),  # noqa: B008
    resamples: Resamples = RESAMPLES,
    compute: Running = Computing(),  # noqa: B008
) -> None:
    """How much of a prompt's embedding is left when parts of the prompt are removed? Goes on where it was stopped; more
    encoders can be named later.

    Args:
        encoders: see emf analyze encoders
        out: folder for results.json, results.md, disentanglement.png, shortened.png and cache/
        prompts: a folder of texts (DPG-Bench's prompts), a jsonl file, or a text file with a prompt a line; default:
            the digits' captions
        limit: take only the first so many prompts
        resamples: how often the bootstrap draws anew, for the intervals
    """
    from emf.analyze.disentanglement import run_disentanglement
    from emf.analyze.names import parse_encoders

    named = parse_encoders(encoders)
    for row in run_disentanglement(
        named, prompts, out, how, embedding, limit=limit, resamples=resamples, compute=compute
    ):
        print(f"{row.name}: disentanglement {row.plain}, centred {row.centred}")
    print(f"open {out / 'results.md'}")


def steps(
    runs: Runs,
    out: Path,
    *,
    sampling: Drawing = Sampling(),  # noqa: B008 (frozen)
    prompts: Path | None = None,
    dino: str | None = None,
    vae: Path | None = None,
    text: Path | None = None,
    dtype: DType = "float32",
    device: str = "auto",
) -> None:
    """Flow-matching backbones with the same prompts and noise at few steps. Digits are scored; of other images it says
    how near each comes to the same backbone's image of most steps. Goes on where it was stopped.

    Args:
        runs: two or more flow-matching runs, exports or folders from emf convert
        out: folder for results.json, results.md, steps.png, samples.png and images/
        prompts: what to draw where the runs are not of the digits: a folder of texts, a jsonl file, or a text file
        dino: folder or Hub name of a DINO, for the similarity; none: PSNR alone
        vae: a diffusers folder with the autoencoder; default: that of the run's data, or of the export
        text: the folder of the text encoder, where it was moved; default: each backbone's
        dtype: number format that the backbones compute in
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
    """
    from emf.analyze.names import parse_runs
    from emf.analyze.steps import run_steps

    how: Any = dict(prompts=prompts, vae=vae, text=text, dino=dino, dtype=dtype, device=device)
    run_steps(parse_runs(runs), out, sampling, **how)
    print(f"open {out / 'results.md'}")
