"""Discriminability of text embeddings: how alike are the images of captions that a text encoder holds for alike?

Caption -> the k nearest captions of other images, by the cosine of their embeddings -> mean cosine of the DINO features
of the query's image and theirs (EMF, arXiv 2604.18168, its comparison of text encoders; higher is better).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emf.analyze.bootstrap import Interval, bootstrap
from emf.analyze.choices import DINO, RESAMPLES, Computing, Embedding, Protocol
from emf.analyze.digit_pairs import DIGITS, PIXELS, Pixels
from emf.analyze.dino import Dino
from emf.analyze.encoders import CUT, TextVectors
from emf.analyze.figures import plot_scores
from emf.analyze.names import EncoderName, folder_stamp
from emf.analyze.outcome import Outcome, Row, check_out, claimed
from emf.analyze.pairs import Pairs, choose_captions, choose_queries, read_pairs, readable
from emf.analyze.retrieval import BLOCK, cosine, mean_vector, nearest
from emf.analyze.vectors import Gathered, VectorCache
from emf.device import device as checked
from emf.evaluate.published import ENCODERS
from emf.files import place_or_name, whole_path
from emf.show.sheet import Cell, write_sheet

PLOT, SHEET = "discriminability.png", "retrieved.png"
SHOWN = 8  # queries on the sheet


@dataclass(frozen=True)
class Discriminability:
    """A score with what it is made of."""

    score: Interval
    each: np.ndarray
    """[Q] float64: mean cosine of image features, by query."""
    queries: np.ndarray
    """[Q] int64: numbers of captions."""
    retrieved: np.ndarray
    """[Q, k] int64: numbers of captions, nearest first."""
    text_cosine: np.ndarray
    """[Q, k] float64: of the embeddings."""


def discriminability(
    embeddings: Any,
    image: Sequence[int] | np.ndarray,
    features: Any,
    queries: Sequence[int] | np.ndarray | None = None,
    k: int = 1,
    *,
    centred: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    block: int = BLOCK,
) -> Discriminability:
    """The score of text embeddings [N, C] of captions, whose images are numbered image [N], by image features [M, D].

    queries: numbers of captions; None: one random caption of every image. centred: subtract the embeddings' mean first:
             mean-pooled states of a language model share a large component, which says nothing of a caption.
    The interval is over queries. Raises ValueError, see emf.analyze.retrieval.nearest.
    """
    image = np.asarray(image, np.int64)
    chosen = choose_queries(image, None, seed) if queries is None else np.asarray(queries, np.int64)
    mean = mean_vector(embeddings, block) if centred else None
    found, near = nearest(embeddings, image, chosen, k, mean=mean, block=block)
    each = image_similarity(features, image[chosen], image[found])
    return Discriminability(bootstrap(each, resamples=resamples, seed=seed), each, chosen, found, near)


def image_similarity(features: Any, query: np.ndarray, retrieved: np.ndarray) -> np.ndarray:
    """Mean over the k retrieved images [Q, k] of their cosine with the query's image [Q], [Q] float64; features [M, D]
    by image number."""
    return cosine(features[query][:, None], features[retrieved]).mean(1)


def chance(features: Any, query: np.ndarray, seed: int = 0) -> float:
    """Mean cosine of the queries' images [Q] with another query's image, drawn at random: what retrieval by nothing
    would give. nan of a single one."""
    if len(query) < 2:
        return float("nan")
    order = np.random.default_rng(seed).permutation(len(query))
    return float(cosine(features[query[order]], features[query[np.roll(order, 1)]]).mean())


@dataclass(frozen=True)
class Retrieved:
    """What was searched, and what was found."""

    pairs: Pairs
    chosen: np.ndarray
    """[N] int64: which of the pairs' captions are retrieved from and queried."""
    image: np.ndarray
    """[N] int64: number of each one's image."""
    queries: np.ndarray
    """[Q] int64: places in chosen."""
    hits: dict[str, tuple[np.ndarray, np.ndarray]]
    """By encoder: places in chosen [Q, k], of embeddings as they are and of centred ones."""

    def caption(self, place: int) -> str:
        """The caption at a place in chosen."""
        return self.pairs.captions[self.chosen[place]]

    def picture(self, place: int) -> Image.Image:
        """The image that belongs to it."""
        return self.pairs.open(int(self.image[place]))


def assumed(protocol: Protocol, how: Embedding, dino: str, found: Retrieved) -> list[str]:
    """A sentence for each choice that the paper does not state."""
    choice = {
        "first": "the first caption",
        "random": f"one random caption (seed {protocol.seed})",
        "all": "all captions",
    }
    images = len({*found.image.tolist()})
    return [
        f"k = {protocol.k}: so many captions are retrieved by query",
        f"{len(found.queries)} queries: one caption each of so many random images (seed {protocol.seed})",
        f"{choice[protocol.captions]} of each image: {len(found.chosen)} captions of {images} images to retrieve from",
        "captions of the query's own image are never retrieved",
        f"text embedding: {how.pooling} over the last hidden states, `{how.states}`",
        f"image feature: {dino}" + f", {protocol.image_pooling}" * (dino != PIXELS),
        "the encoders' sizes: the paper names families alone",
    ]


def run_discriminability(
    encoders: Sequence[EncoderName],
    data: Path | None,
    out: Path,
    protocol: Protocol | None = None,
    how: Embedding | None = None,
    dino: str = DINO,
    *,
    compute: Computing | None = None,
) -> list[Row]:
    """Every encoder's score on COCO, or other images with captions (None: the digits' scenes, whose features are their
    smoothed pixels instead of DINO's): results.json, results.md, a plot and a sheet of retrieved images in `out`.
    Vectors are kept there (cache/): stopped, it goes on.

    Raises ValueError where something is missing or `out` holds something else."""
    protocol, how, compute = protocol or Protocol(), how or Embedding(), compute or Computing()
    device = str(checked(compute.device))
    check_out(out, (PLOT, SHEET))
    pairs = read_pairs(data, protocol.split)
    network: Dino | Pixels
    if data is None:
        network, dino, source = Pixels(), PIXELS, DIGITS
    else:
        network, source = Dino.load(dino, protocol.image_pooling, device), str(whole_path(data))
    settings: dict[str, Any] = {"analysis": "discriminability", "data": source}
    settings |= {"dino": place_or_name(dino), "dtype": compute.dtype} | asdict(protocol) | {"text": asdict(how)}
    named = {e.name: e.place for e in encoders}
    with claimed(out, settings | {"encoders": named}, "encoders", (PLOT, SHEET)):
        pairs = readable(pairs, str(data or DIGITS))
        chosen = choose_captions(pairs.image, protocol.captions, protocol.seed)
        captions, image = [pairs.captions[i] for i in chosen], pairs.image[chosen]
        queries = choose_queries(image, protocol.queries or None, protocol.seed)
        found = Retrieved(pairs, chosen, image, queries, {})
        for encoder in encoders:
            vectors = TextVectors(encoder, how, out, compute.dtype, device)(captions, compute.batch)
            plain, centred = (
                nearest(vectors, image, queries, protocol.k, mean=mean, device=device, progress=True)[0]
                for mean in (None, mean_vector(vectors))
            )
            found.hits[encoder.name] = plain, centred
        features = _features(found, network, dino, out, compute.batch)
        rows, further = [], {}
        for name, hits in found.hits.items():
            each = [image_similarity(features, image[queries], image[index]) for index in hits]
            means = [bootstrap(x, resamples=protocol.resamples, seed=protocol.seed) for x in each]
            rows.append(Row(name, means[0], means[1], (each[0], each[1])))
            further[name] = [
                {"query": int(chosen[q]), "plain": chosen[a].tolist(), "centred": chosen[b].tolist()}
                for q, a, b in zip(queries[:1000], *hits, strict=False)
            ]
        random = chance(features, image[queries], protocol.seed)
        notes = [
            *pairs.notes,
            f"a random image instead of the retrieved one's gives {random:.3f}",
            "an interval holds the chance of the queries alone, not of the encoders' training",
            f"{SHEET}: the image of the nearest caption by encoder, of embeddings as they are",
            CUT,
        ]
        shared = {"queries": len(queries), "captions": len(captions), "chance": random, "retrieved": further}
        told, settings = assumed(protocol, how, dino, found), settings | {"encoders": named}
        Outcome("discriminability", rows, settings, told, notes, shared).write(out)
        label = f"mean cosine of {'smoothed pixels' if data is None else 'DINO features'}, query and retrieved"
        plot_scores(out / PLOT, rows, ENCODERS["discriminability"], label, random)
        _write_sheet(out / SHEET, found, features, "pixels" if data is None else "DINO")
        return rows


class _ByImage:
    """Features [.., D] by image number, of those images that have one."""

    def __init__(self, vectors: Gathered, needed: np.ndarray, images: int) -> None:
        self.vectors, self.place = vectors, np.full(images, -1, np.int64)
        self.place[needed] = np.arange(len(needed))

    def __getitem__(self, images: np.ndarray) -> np.ndarray:
        where = self.place[images]
        assert (where >= 0).all()
        return self.vectors[where]


def _features(found: Retrieved, network: Dino | Pixels, dino: str, out: Path, batch: int) -> _ByImage:
    """DINO's features of the images that are asked for, not of all."""
    pairs, image = found.pairs, found.image
    asked = [image[found.queries], *(image[index].ravel() for hits in found.hits.values() for index in hits)]
    needed = np.unique(np.concatenate(asked))
    said = [folder_stamp(Path(dino)) if Path(dino).is_dir() else dino, network.pooling]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]

    def compute(part: list[int]) -> np.ndarray:
        return network.features([pairs.open(int(needed[i])) for i in part]).numpy()

    keys = [pairs.keys[i] for i in needed]
    vectors = VectorCache(out / "cache" / f"image-{digest}").fill(keys, compute, batch, "image features")
    return _ByImage(vectors, needed, len(pairs.keys))


def _write_sheet(path: Path, found: Retrieved, features: _ByImage, measure: str) -> None:
    """Queries down; across the query, then by encoder what is nearest to it, with the cosine of the images by the
    measure."""
    places = np.unique(np.linspace(0, len(found.queries) - 1, SHOWN).round().astype(int))
    rows = []
    for place in places:
        q = found.queries[place]
        row = [Cell(found.caption(q), found.picture(q))]
        for plain, _ in found.hits.values():
            hit = plain[place, 0]
            alike = float(image_similarity(features, found.image[[q]], found.image[[[hit]]])[0])
            row.append(Cell(f"{measure} {alike:.3f}\n{found.caption(hit)}", found.picture(hit)))
        rows.append(row)
    write_sheet(path, rows, ["query", *found.hits])
