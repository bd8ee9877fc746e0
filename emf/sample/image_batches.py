"""Captions in batches, each of which is computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emf.files import check_text
from emf.flow import seed_of
from emf.sample.sampling_settings import Settings


@dataclass(frozen=True)
class Batch:
    """Captions whose images are computed at once. Raises ValueError on a caption that no tokenizer takes."""

    captions: Sequence[str]
    numbers: Sequence[int]
    """Of the images, which seed them together with the settings' seed."""
    how: Settings

    def __post_init__(self) -> None:
        for caption in self.captions:
            check_text(caption, f"sample: caption {caption!r}")

    @property
    def seeds(self) -> list[int]:
        return [seed_of(self.how.seed, n) for _, n in zip(self.captions, self.numbers, strict=True)]


def batches_of(captions: Sequence[str], how: Settings, numbers: Sequence[int] | None = None) -> list[Batch]:
    """The batches of captions, of at most how.batch images each. numbers: None: 0, 1, ... Raises ValueError where there
    are not as many numbers as captions."""
    every = range(len(captions)) if numbers is None else numbers
    if len(every) != len(captions):
        raise ValueError(f"sample: {len(every)} numbers of {len(captions)} images; expected one of each caption")
    parts = [slice(i, i + how.batch) for i in range(0, len(captions), how.batch)]
    return [Batch(captions[part], every[part], how) for part in parts]
