"""Disentanglement of text embeddings: how much of a prompt's embedding is left when parts of it are removed?

The cosine between the embeddings of a prompt and of the prompt without a random subset of its parts (EMF, arXiv
2604.18168, its comparison of text encoders, on DPG-Bench's prompts). The paper reads more as better; an encoder that
maps everything to one vector has 1, so the cosine of mean-centred embeddings is given beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emf.analyze.bootstrap import Interval, bootstrap
from emf.analyze.choices import RESAMPLES, Computing, Embedding, Shortening
from emf.analyze.digit_pairs import DIGITS, SCENES, scenes
from emf.analyze.encoders import CUT, TextVectors, embed_texts
from emf.analyze.figures import plot_scores
from emf.analyze.names import EncoderName
from emf.analyze.outcome import Outcome, Row, check_out, claimed
from emf.analyze.prompts import read_prompts, shortened
from emf.analyze.retrieval import cosine, mean_vector
from emf.conditioning.encoder import Encoder
from emf.device import device as checked
from emf.evaluate.published import ENCODERS
from emf.files import whole_path
from emf.show.progress import track
from emf.show.sheet import Cell, write_sheet
from emf.show.table import markdown

PLOT, SHEET = "disentanglement.png", "shortened.png"
SHOWN = 6  # prompts on the sheet and below the table


@dataclass(frozen=True)
class Disentanglement:
    """An encoder's scores with what they are made of."""

    plain: Interval
    centred: Interval
    """Of embeddings less the full prompts' mean; nan of fewer than two prompts."""
    each: np.ndarray
    """[P, R] float64: by prompt that can be shortened, and its shortened version."""
    each_centred: np.ndarray
    used: list[int]
    """[P]: which of the prompts these are."""
    versions: list[list[str]]
    """The shortened prompts, by prompt used."""


def disentanglement(
    encoder: Encoder,
    prompts: Sequence[str],
    how: Shortening | None = None,
    embedding: Embedding | None = None,
    *,
    resamples: int = RESAMPLES,
    batch: int = 32,
) -> Disentanglement:
    """An encoder's score over prompts. The interval is over prompts. Raises ValueError where none has two units."""
    how = how or Shortening()
    used, versions = usable(prompts, how)
    texts = _texts(prompts, used, versions)
    parts = range(0, len(texts), batch)
    done = [
        embed_texts(encoder, texts[i : i + batch], embedding) for i in track(parts, "embed", disable=len(parts) < 9)
    ]
    return summarize(np.concatenate([x.numpy() for x in done]), used, versions, resamples, how.seed)


def usable(prompts: Sequence[str], how: Shortening) -> tuple[list[int], list[list[str]]]:
    """(numbers of the prompts that can be shortened, their shortened versions). Raises ValueError where none can."""
    every = shortened(list(prompts), how)
    used = [i for i, versions in enumerate(every) if versions]
    if not used:
        raise ValueError(
            f"analyze: none of {len(prompts)} prompts has two of the unit {how.unit!r}; choose a smaller --unit"
        )
    return used, [every[i] for i in used]


def _texts(prompts: Sequence[str], used: Sequence[int], versions: Sequence[Sequence[str]]) -> list[str]:
    return [prompts[i] for i in used] + [text for some in versions for text in some]


def similarities(full: Any, short: Any, mean: np.ndarray | None = None) -> np.ndarray:
    """Cosine of embeddings [P, C] with those of the shortened prompts [P, R, C], both less mean [C]: [P, R]."""
    shift = 0.0 if mean is None else mean
    return cosine((np.asarray(full, np.float64) - shift)[:, None], np.asarray(short, np.float64) - shift)


def summarize(
    embeddings: Any, used: list[int], versions: list[list[str]], resamples: int = RESAMPLES, seed: int = 0
) -> Disentanglement:
    """Scores from embeddings [P + P R, C]: those of the full prompts, then those of the R versions of each."""
    p, r = len(used), len(versions[0])
    full, short = np.asarray(embeddings[:p]), np.asarray(embeddings[p:]).reshape(p, r, -1)
    plain, centred = similarities(full, short), np.full((p, r), np.nan)
    if p > 1:
        centred = similarities(full, short, mean_vector(full))
    scores = [bootstrap(x.mean(1), resamples=resamples, seed=seed) for x in (plain, centred)]
    return Disentanglement(scores[0], scores[1], plain, centred, used, versions)


def run_disentanglement(
    encoders: Sequence[EncoderName],
    prompts: Path | None,
    out: Path,
    how: Shortening | None = None,
    embedding: Embedding | None = None,
    *,
    limit: int | None = None,
    resamples: int = RESAMPLES,
    compute: Computing | None = None,
) -> list[Row]:
    """Every encoder's score over a file's prompts (None: the digits' captions): results.json, results.md, a plot and a
    sheet of examples in `out`. Vectors are kept there (cache/): stopped, it goes on.

    Raises ValueError where something is missing or `out` holds something else."""
    how, embedding, compute = how or Shortening(), embedding or Embedding(), compute or Computing()
    device = str(checked(compute.device))
    if resamples < 1:
        raise ValueError(f"analyze: --resamples {resamples} must be at least 1")
    check_out(out, (PLOT, SHEET))
    if prompts is None:
        texts = scenes(SCENES)[0]
        names = [str(n) for n in range(len(texts))]
    else:
        texts, names = read_prompts(prompts)
    if limit is not None and limit < 1:
        raise ValueError(f"analyze: --limit {limit} must be at least 1")
    texts, names = texts[:limit], names[:limit]
    used, versions = usable(texts, how)
    source = DIGITS if prompts is None else str(whole_path(prompts))
    settings: dict[str, Any] = {"analysis": "disentanglement", "prompts": source, "limit": limit}
    settings |= asdict(how) | {"resamples": resamples, "dtype": compute.dtype, "text": asdict(embedding)}
    named = {e.name: e.place for e in encoders}
    with claimed(out, settings | {"encoders": named}, "encoders", (PLOT, SHEET)):
        every = _texts(texts, used, versions)
        results = {}
        for encoder in encoders:
            vectors = TextVectors(encoder, embedding, out, compute.dtype, device)(every, compute.batch)
            results[encoder.name] = summarize(vectors[:], used, versions, resamples, how.seed)
        rows = [
            Row(name, result.plain, result.centred, (result.each.mean(1), result.each_centred.mean(1)))
            for name, result in results.items()
        ]
        assumed = [
            f"what is removed: {how.fraction:g} of the {how.unit}s, at random, the others in order (seed {how.seed})",
            f"{how.repeats} removals of each prompt; the interval is over prompts",
            f"text embedding: {embedding.pooling} over the last hidden states, `{embedding.states}`",
            "the encoders' sizes: the paper names families alone",
        ]
        notes = [
            f"{len(used)} of {len(texts)} prompts"
            + f"; the others have a single {how.unit}" * (len(used) < len(texts)),
            "centred: less the mean embedding of the full prompts. An encoder that gives every prompt nearly the same "
            "vector has a plain score near 1",
        ]
        if embedding.states == "prompt":
            own = "the tokens of an encoder's own prompt, where it has one, are in the mean: they are never removed"
            notes.append(own)
        notes.append(CUT)
        each = {
            name: [
                {"prompt": names[i], "plain": float(a), "centred": float(b)}
                for i, a, b in zip(used, result.each.mean(1), result.each_centred.mean(1), strict=True)
            ]
            for name, result in results.items()
        }
        places = np.unique(np.linspace(0, len(used) - 1, SHOWN).round().astype(int)).tolist()
        examples = [
            [texts[used[p]], versions[p][0], *(f"{result.each[p, 0]:.3f}" for result in results.values())]
            for p in places
        ]
        tail, settings = markdown(["prompt", "shortened", *results], examples), settings | {"encoders": named}
        Outcome("disentanglement", rows, settings, assumed, notes, {"each": each}, tail).write(out)
        plot_scores(out / PLOT, rows, ENCODERS["disentanglement"], "cosine of the prompt and the shortened prompt")
        sheet = []
        for p in places:
            scored = [Cell(f"{r.each[p, 0]:.3f}\ncentred {r.each_centred[p, 0]:.3f}") for r in results.values()]
            sheet.append([Cell(texts[used[p]]), Cell(versions[p][0]), *scored])
        write_sheet(out / SHEET, sheet, ["prompt", "shortened", *results], lines=9)
        return rows
