"""The digits world's scorer: GenEval's rules on the detections of a learned detector.

Detector: connected components of what is not background; the palette colour that explains a component best; a support
vector machine on its ink, trained on the training scans and on what no digit is (blends of digits, pieces, noise), so
that it can say no. Held to real scenes, noise and shuffled captions by `calibrate`; never fitted to a model's images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.svm import SVC

from emf.data.digits import BACKGROUND, CLASSES, GLYPH, PALETTE, TAGS, Spec, World, prompts, render, scans
from emf.evaluate.rules import Detection, evaluate

INK = 0.35  # of the way from background to a colour: below is background
SOLID = 0.7  # a stroke comes this near its colour somewhere; a faint ghost does not
UNEXPLAINED = 0.15  # share of a component's energy that its one colour may leave over
SPECK = 12  # pixels: a component this small may be a piece of its neighbour
NOTHING = len(CLASSES)  # the SVM's class of what no digit is
_COLORS = np.array(list(PALETTE.values()), np.float32) / 127.5 - 1
_DIRECTIONS = _COLORS - (BACKGROUND / 127.5 - 1)  # from background to colour
_NAMES = tuple(PALETTE)


class Scorer:
    """Use Scorer.fit()."""

    def __init__(self, svm: SVC) -> None:
        self.svm = svm

    @classmethod
    def fit(cls, seed: int = 0) -> Scorer:
        """Train the detector's classifier on the training scans (seconds on one core)."""
        rng = np.random.default_rng(seed)
        pools = scans("train")
        glyphs, labels = np.concatenate(pools), np.repeat(np.arange(10), [len(p) for p in pools])
        noisy = [np.clip(glyphs + rng.normal(0, s, glyphs.shape), 0, 1) for s in (0.04, 0.1)]
        blurred = np.stack([ndimage.gaussian_filter(g, 0.4) for g in glyphs])
        x = np.concatenate([glyphs, *noisy, blurred / blurred.max((1, 2), keepdims=True)])
        y = np.tile(labels, 4)
        nothing = _not_digits(glyphs, labels, rng)
        features = np.stack([normalize(g) for g in np.concatenate([x, nothing])])
        # C and gamma by validation on a fifth of the training scans
        svm = SVC(C=3, gamma=0.12, cache_size=500)
        return cls(svm.fit(features, np.concatenate([y, np.full(len(nothing), NOTHING)])))

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """Objects in each of images [n, 3, H, W], float; clipped to [-1, 1]. Raises ValueError on another shape."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"scorer: images have shape {images.shape}; expected [n, 3, height, width]")
        found = [components(image) for image in np.clip(images, -1, 1)]
        features = [ink for parts in found for ink, *_ in parts]
        if not features:
            return [[] for _ in images]
        margins = self.svm.decision_function(np.stack([normalize(f) for f in features]))
        guess, score = margins.argmax(1), margins.max(1)
        detections, i = [], 0
        for parts in found:
            here = []
            for _, box, color in parts:
                if guess[i] != NOTHING:
                    here.append(Detection(CLASSES[guess[i]], float(score[i]), box, color))
                i += 1
            detections.append(here)
        return detections

    def score(self, images: np.ndarray, specs: Sequence[Spec]) -> dict[str, Any]:
        """Images [n, 3, H, W] against their n descriptions.

        by_tag: each tag's share of correct images; overall: mean of those (not of the images); images: GenEval's row of
        each image (tag, prompt, correct, reason, metadata, details; the last two are JSON strings).
        Raises ValueError on none or another number of images.
        """
        if len(images) != len(specs) or not len(specs):
            raise ValueError(
                f"scorer: {len(images)} images for {len(specs)} descriptions; expected one each, one at least"
            )
        rows = [_row(spec, found) for spec, found in zip(specs, self.detect(images), strict=True)]
        correct = {tag: [r["correct"] for r in rows if r["tag"] == tag] for tag in TAGS}
        by_tag = {tag: float(np.mean(c)) for tag, c in correct.items() if c}
        return {"overall": float(np.mean(list(by_tag.values()))), "by_tag": by_tag, "images": rows}


def _row(spec: Spec, found: Sequence[Detection]) -> dict[str, Any]:
    correct, reason = evaluate(spec, found)
    details: dict[str, list[list[float]]] = {}
    for d in found:
        details.setdefault(d.label, []).append([*d.box, d.score])
    row = {"tag": spec["tag"], "prompt": spec["prompt"], "correct": correct, "reason": reason}
    return row | {"metadata": json.dumps(spec), "details": json.dumps(details)}


def components(image: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int, int, int], str]]:
    """(ink [h, w], box, colour) of each object-like component of image [3, H, W]."""
    away = image - (BACKGROUND / 127.5 - 1)
    # per pixel and colour: how much ink of that colour explains the pixel best, and what stays unexplained
    ink = np.einsum("chw,kc->khw", away, _DIRECTIONS) / np.square(_DIRECTIONS).sum(1)[:, None, None]
    rest = np.square(away[None] - np.clip(ink, 0, 1.15)[:, None] * _DIRECTIONS[:, :, None, None]).sum(1)
    best = np.take_along_axis(ink, rest.argmin(0)[None], 0)[0]
    labels, n = ndimage.label(best > INK, np.ones((3, 3)))
    found = []
    for mask in _join([labels == i + 1 for i in range(n)]):
        color = int((rest * mask).sum((1, 2)).argmin())
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        own = np.clip(ink[color] * mask, 0, 1)[y0:y1, x0:x1]
        unexplained = (rest[color] * mask).sum() / max(np.square(away * mask).sum(), 1e-9)
        fits = 5 <= y1 - y0 <= GLYPH + 1 and x1 - x0 <= GLYPH + 1
        if fits and np.sort(own.ravel())[-3:].mean() >= SOLID and unexplained <= UNEXPLAINED:
            found.append((own, (int(x0), int(y0), int(x1), int(y1)), _NAMES[color]))
    return found


def _join(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Strokes of one digit that do not touch: pieces are joined where one is small and both fit into one glyph."""
    parts = sorted((p for p in parts if p.sum() > 1), key=np.sum)  # a lone pixel is dirt
    done = []
    for i, piece in enumerate(parts):
        hosts = (j for j in range(i + 1, len(parts)) if _one_glyph(piece | parts[j]))
        host = next(hosts, None) if piece.sum() <= SPECK else None
        if host is None:
            done.append(piece)
        else:
            parts[host] = piece | parts[host]
    return done


def _one_glyph(mask: np.ndarray) -> bool:
    return all(np.ptp(np.flatnonzero(mask.any(axis))) < GLYPH for axis in (0, 1))


def normalize(ink: np.ndarray) -> np.ndarray:
    """An inked region [h, w] centred in 10 x 10 by its bounding box, as a feature vector: position plays no part."""
    mask = ink > INK
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    out = np.zeros((10, 10), np.float32)
    if len(rows):
        crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][:10, :10]
        y, x = (10 - crop.shape[0]) // 2, (10 - crop.shape[1]) // 2
        out[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return out.ravel()


def _not_digits(glyphs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n, 8, 8] of what must be rejected: blends of different digits, averages of many, halves, blobs of noise."""
    n = len(glyphs)
    other = rng.permutation(n)
    different = labels != labels[other]
    blends = np.maximum(glyphs, glyphs[other])[different]
    means = np.stack([glyphs[rng.integers(n, size=int(k))].mean(0) for k in rng.integers(2, 8, size=n // 2)])
    halves = glyphs[rng.permutation(n)[: n // 2]].copy()
    halves[:, 4:] *= rng.random((len(halves), 1, 1)) < 0.5
    halves[:, :, 4:] *= (halves[:, 4:].sum((1, 2)) == 0)[:, None, None]
    noise = ndimage.gaussian_filter(rng.random((n // 2, GLYPH, GLYPH)), (0, 0.7, 0.7))
    noise = (noise - noise.min((1, 2), keepdims=True)) / np.ptp(noise, axis=(1, 2))[:, None, None]
    raw = rng.random((n // 2, GLYPH, GLYPH)) * (rng.random((n // 2, GLYPH, GLYPH)) < 0.6)
    stacks = [blends, means / means.max((1, 2), keepdims=True), halves, noise, raw]
    return np.concatenate([s[s.max((1, 2)) > INK] for s in stacks])


def calibrate(scorer: Scorer, per_tag: int = 50, seed: int = 1, world: World | None = None) -> dict[str, float]:
    """Overall scores that say whether the scorer can be trusted.

    ceiling: real held-out scenes; noise: uniform and Gaussian noise, the larger of the two; shuffled: real scenes, each
    scored with the next caption of its task.
    """
    specs, rng = prompts(per_tag, seed), np.random.default_rng(seed)
    scenes = np.stack([render(s, rng, "held_out", world) for s in specs])
    uniform = rng.uniform(-1, 1, scenes.shape).astype(np.float32)
    gaussian = np.clip(rng.normal(0, 0.5, scenes.shape), -1, 1).astype(np.float32)
    order = np.concatenate([i * per_tag + np.roll(np.arange(per_tag), 1) for i in range(len(TAGS))])
    return {
        "ceiling": scorer.score(scenes, specs)["overall"],
        "noise": max(scorer.score(x, specs)["overall"] for x in (uniform, gaussian)),
        "shuffled": scorer.score(scenes[order], specs)["overall"],
    }
