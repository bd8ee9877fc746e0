"""Captions of whole words from a short list: the tokenizer of a small world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Words:
    """The words that a small world's captions are made of. A word's id is its place."""

    world: str
    """The world's name, for errors."""
    vocabulary: tuple[str, ...]
    """The first stands for padding and is no word."""
    length: int
    """Most words of a caption."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Words that a blurred reading takes for one and the same, the first of the two."""

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids [B, length] int64, mask [B, length] bool, False at padding), right-padded with 0.

        Raises ValueError on an unknown word, an empty caption or one of more than `length` words.
        """
        ids = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for row, caption in zip(ids, captions, strict=True):
            words = caption.lower().split()
            unknown = [w for w in words if not self._ids.get(w)]
            if unknown:
                raise ValueError(
                    f"{self.world}: word {unknown[0]!r} of caption {caption!r} is unknown; known words: "
                    f"{' '.join(self.vocabulary[1:])}"
                )
            if not 0 < len(words) <= self.length:
                raise ValueError(
                    f"{self.world}: caption {caption!r} has {len(words)} words; expected 1 to {self.length}"
                )
            row[: len(words)] = torch.tensor([self._ids[w] for w in words])
        return ids, ids > 0

    def blurred(self) -> Tensor:
        """[vocabulary] int64: each word's id, of a pair the first one's."""
        ids = torch.arange(len(self.vocabulary))
        for first, second in self.pairs:
            ids[self._ids[second]] = self._ids[first]
        return ids
