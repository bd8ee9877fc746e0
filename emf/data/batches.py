"""What a run's feed is asked for, without what makes it: a config and its help need no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from emf.data.buckets import PARTS
from emf.data.world import World
from emf.limits import Within, check_limits


@dataclass(frozen=True)
class DataConfig:
    """Images with captions; without sources the digits."""

    sources: tuple[str, ...] = ()
    """Tars of webdataset, Parquet files, folders of images and texts: PATH, PATH@WEIGHT or PATH@WEIGHT@CAPTION, where
    the caption is a key of JSON or a column (emf.data.sources); or folders that emf cache wrote, PATH or PATH@WEIGHT,
    of one encoder."""
    size: Annotated[int, Within(1, 65_536)] = 1024
    """Pixels along a side of the centre crop."""
    buckets: bool = False
    """Train at SANA's sizes by aspect ratio (emf.data.buckets), of about size x size pixels: each picture at that of
    the nearest ratio, each step at one."""
    vae: Path | None = None
    """A diffusers folder with the autoencoder (DC-AE), or its OWNER/NAME on the Hugging Face Hub; none: the flow works
    on pixels."""
    ta_tok: Path | None = None
    """BLIP3o-NEXT: ta_tok.pth, for images whose tokens no cache holds."""
    workers: Annotated[int, Within(1, 1024)] = 4
    """How many threads of a rank read and decode images."""
    listings: Path | None = None
    """A file that keeps what is in the tars, so that the next start need not read them."""

    def __post_init__(self) -> None:
        check_limits(self, "config: data.")
        if self.buckets and self.size % PARTS:
            raise ValueError(f"config: data.buckets needs a data.size that is a multiple of {PARTS}, not {self.size}")


@dataclass(frozen=True)
class Batches:
    """Which batches a run takes, and what its network expects in them."""

    seed: int
    size: int
    """Samples a step, over all ranks."""
    latent: tuple[int, int, int]
    """[C, H, W] of a latent."""
    data: DataConfig = field(default_factory=DataConfig)
    world: World = field(default_factory=World)
    """The digits', where there are no sources."""
    token_scale: int | None = None
    """Pooling of the image's tokens, where the text encoder reads them (BLIP3o-NEXT)."""
