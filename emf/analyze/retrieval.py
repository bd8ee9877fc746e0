"""The captions nearest to a caption, of hundreds of thousands, without the matrix of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emf.show.progress import track

BLOCK = 2048
"""Captions compared at once, with four times as many queries: three matrices of 134 MB."""
SCALE = 2**30  # cosines are compared to 1e-9: of equal captions the first wins, whatever the blocks
LAST = 2**31 - 1
NONE = torch.iinfo(torch.int64).min


def mean_vector(embeddings: Any, block: int = BLOCK) -> np.ndarray:
    """Mean [C] float64 of embeddings [N, C], an array or alike that can be sliced."""
    total = sum(np.asarray(embeddings[i : i + block], np.float64).sum(0) for i in range(0, len(embeddings), block))
    return np.asarray(total / len(embeddings))


def unit(x: Any, mean: np.ndarray | None = None, device: str = "cpu") -> Tensor:
    """x [n, C] less mean [C], at unit length, float64; a zero vector stays zero."""
    rows = torch.as_tensor(np.asarray(x, np.float64), device=device)
    if mean is not None:
        rows = rows - torch.as_tensor(mean, device=device)
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-30)


def nearest(
    embeddings: Any,
    image: Sequence[int] | np.ndarray,
    queries: Sequence[int] | np.ndarray,
    k: int = 1,
    *,
    mean: np.ndarray | None = None,
    block: int = BLOCK,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """R_k(q): for each query the k captions of other images with the highest cosine, (numbers [Q, k] int64, cosines
    [Q, k] float64), best first (EMF, arXiv 2604.18168, its comparison of text encoders).

    embeddings [N, C]: an array or alike that can be sliced and indexed, of which blocks are taken in float64. Cosines
               are compared to 1e-9; of equal ones the caption with the lower number goes first.
    image [N]: number of each caption's image; captions of a query's own image, itself first of all, are left out.
    queries [Q]: numbers of captions. mean [C]: subtracted from all embeddings first.
    Raises ValueError where a query has fewer than k captions of other images.
    """
    image, queries = np.asarray(image, np.int64), np.asarray(queries, np.int64)
    n = len(embeddings)
    others = n - np.unique(image, return_inverse=True, return_counts=True)[2][np.unique(image, return_inverse=True)[1]]
    if len(image) != n or k < 1 or block < 1 or not len(queries) or n > LAST:
        raise ValueError(
            f"retrieval: {n} captions, {len(image)} image numbers, {len(queries)} queries, k {k}, block {block}; "
            "expected a number for every caption, and at least 1 of each"
        )
    if (fewest := int(others[queries].min())) < k:
        raise ValueError(f"retrieval: {fewest} captions of other images, k is {k}; give more captions, or a smaller k")
    own, numbers, found = torch.as_tensor(image, device=device), torch.arange(n, device=device), []
    parts = [(i, j) for i in range(0, len(queries), 4 * block) for j in range(0, n, block)]
    best = q = mine = torch.empty(0)
    for i, start in track(parts, description="retrieve", disable=not progress):
        here = slice(start, start + block)
        if not start:
            asked = queries[i : i + 4 * block]
            q, mine = unit(embeddings[asked], mean, device), own[asked][:, None]
            best = torch.full((len(asked), k), NONE, device=device)
        cosine = q @ unit(embeddings[here], mean, device).T
        # one whole number says cosine and caption: there are no ties, hence one answer
        key = (cosine * SCALE).round_().long() * (LAST + 1) + (LAST - numbers[here])
        key.masked_fill_(mine == own[here], NONE)
        best = torch.cat([best, key], 1).topk(k, 1).values
        if start + block >= n:
            found.append(best.cpu())
    keys = torch.cat(found)
    index = LAST - (keys & LAST)
    return index.numpy(), ((keys >> 31).double() / SCALE).numpy()


def cosine(a: Any, b: Any) -> np.ndarray:
    """Cosine [...] float64 of a and b [..., C]; 0 where one is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.where(norm > 0, norm, 1.0))
