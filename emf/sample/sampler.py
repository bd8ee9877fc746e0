"""Captions to images with a trained network."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from emf.config import Config
from emf.flow import guided, sample
from emf.model.autoencoder import load_dcae
from emf.model.text_to_image import TextToImage

GUIDANCE = 1.25  # suits the digits (profiles/LOG.md)
GUIDANCE_PRETRAINED = 2.0  # of EMF's inference script; its function's default is 1.5
SMALL = 64  # pixels along a side below which a picture is enlarged for the eye


def default_guidance(config: Config) -> float:
    return GUIDANCE if config.condition.kind == "small" else GUIDANCE_PRETRAINED


@torch.no_grad()
def generate(
    network: TextToImage,
    config: Config,
    captions: list[str],
    steps: int,
    *,
    average: bool = True,
    guidance: float = GUIDANCE,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch: int = 64,
    seconds: dict[str, float] | None = None,
) -> Tensor:
    """Latents [n, C, size, size] float32 on the CPU; of a network without autoencoder images in about [-1, 1]. Image i
    depends on (seed, numbers[i], caption) and the settings, not on the batch; so do the image tokens that BLIP3o-NEXT
    draws before it.

    average: few-step EMF sampling with u(z, r, t); else Euler on v(z, t) with the pretrained time embedding (the
             flow-matching baseline).
    guidance: classifier-free; 1 is none. A network trained with guidance inside its target (config.flow.built_in) has
              that part already: at just this guidance it is evaluated once a step.
    numbers:  of the images, which seed their noise; None: 0, 1, ...
    seconds:  gets what the stages took, under `text` and `transformer`, added to what it has.
    Raises ValueError on a caption the encoder cannot read.
    """
    if not captions or not math.isfinite(guidance) or seed < 0:
        raise ValueError(
            f"generate: {len(captions)} images, guidance {guidance}, seed {seed}; expected at least one, a number, and "
            "at least 0"
        )
    model, seconds = config.transformer, {} if seconds is None else seconds
    weight = next(network.transformer.parameters())
    device, dtype = weight.device, weight.dtype
    shape = (model.in_channels, model.sample_size, model.sample_size)
    w = guidance / config.flow.built_in if average else guidance
    latents = []
    for part in range(0, len(captions), batch):
        here = captions[part : part + batch]
        seeds = [seed * 1_000_003 + n for n in (numbers or range(len(captions)))[part : part + batch]]
        with timed(seconds, "text", device):
            # The condition is the same at every step: encode it once, with and without.
            ids, mask = (x.to(device) for x in tokenize(network.encoder, here, seeds))
            states = network.encoder(ids, mask)
            null = network.encoder(ids, mask, torch.ones(len(here), dtype=torch.bool, device=device))

        def velocity(c: tuple[Tensor, Tensor | None]) -> Any:
            cast = c[0].to(dtype), c[1]
            return lambda now, t, r: network.transformer(now.to(dtype), t, r, *cast).float()

        with timed(seconds, "transformer", device):
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in seeds])
            z = sample(guided(velocity(states), velocity(null), w), noise.to(device), steps, average)
            latents.append(z.cpu())
    return torch.cat(latents)


class Sampler:
    """A checkpoint that draws: network and autoencoder. Use Sampler.load()."""

    def __init__(self, config: Config, network: TextToImage, autoencoder: Any, average: bool, stamp: str) -> None:
        self.config, self.network, self.autoencoder, self.average = config, network, autoencoder, average
        self.stamp = stamp
        """Of the weights: another one means other images."""
        self.seconds: dict[str, float] = {}
        """What the stages took so far: text, transformer, decoder."""

    @classmethod
    def load(
        cls,
        run: Path,
        vae: Path | None = None,
        dtype: str | None = None,
        device: str | None = None,
        flow_matching: bool = False,
    ) -> Sampler:
        """run: a run, one of its checkpoints, or an export. vae: a diffusers folder with the autoencoder; None: that of
        the run's data, or of the export. dtype: None is float32 on a CPU, bfloat16 on a GPU. flow_matching: sample the
        instantaneous velocity by Euler's method. Raises ValueError on what does not fit."""
        from emf.weights.folders import load_any

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"generate: --device {device}, but no GPU is there")
        config, network = load_any(run)
        if config.objective == "flow_matching" and not flow_matching:
            raise ValueError(f"generate: {run} was trained for flow matching alone; say --flow-matching")
        network = network.to(place, getattr(torch, dtype or ("float32" if place.type == "cpu" else "bfloat16")))
        folder, channels = vae or config.data.vae, config.transformer.in_channels
        if folder is None and channels != 3:
            raise ValueError(f"generate: {run} gives latents of {channels} channels; name their autoencoder with --vae")
        autoencoder = None if folder is None else load_dcae(folder, device=place)
        return cls(config, network, autoencoder, not flow_matching, weights_stamp(run))

    @property
    def guidance(self) -> float:
        """The default of its world."""
        return default_guidance(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.transformer.parameters()).dtype

    def images(self, captions: list[str], steps: int, **settings: Any) -> Tensor:
        """[n, 3, H, W] float32 in about [-1, 1]; settings as of generate."""
        images = generate(
            self.network, self.config, captions, steps, average=self.average, seconds=self.seconds, **settings
        )
        if self.autoencoder is None:
            return images
        device = next(self.network.transformer.parameters()).device
        with timed(self.seconds, "decoder", device):
            return torch.cat([self.autoencoder.decode(z[None].to(device)).cpu() for z in images])

    def pictures(self, captions: list[str], steps: int, **settings: Any) -> list[Image.Image]:
        """The same as 8-bit RGB."""
        return [Image.fromarray(x) for x in to_uint8(self.images(captions, steps, **settings))]


def weights_stamp(run: Path) -> str:
    """A digest of a run's newest weights, or an export's: of names, sizes, and both ends of each file."""
    from emf.weights.folders import newest

    folder = run if (run / "model_index.json").is_file() else newest(run)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as opened:
            ends = opened.read(2**16)
            opened.seek(max(0, size - 2**16))
            ends += opened.read()
        digest.update(f"{file.relative_to(folder)} {size} ".encode() + ends)
    return digest.hexdigest()[:16]


def tokenize(encoder: Any, captions: list[str], seeds: list[int]) -> tuple[Tensor, Tensor]:
    """ids and mask of captions; BLIP3o-NEXT draws the image tokens first, each caption's by its own seed."""
    if not hasattr(encoder, "generate"):
        pair: tuple[Tensor, Tensor] = encoder.tokenize(captions)
        return pair
    generators = [torch.Generator().manual_seed(2**40 + n) for n in seeds]
    tokens = encoder.generate(captions, generators, progress=encoder.image_tokens > 100)
    pair = encoder.tokenize(captions, tokens.cpu())
    return pair


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the time that a block takes on its device."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def to_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """Images [n, C, H, W] in about [-1, 1] -> [n, H, W, C] uint8."""
    return ((np.asarray(images) + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def write_images(images: Tensor, captions: list[str], out: Path, settings: dict[str, Any]) -> list[Path]:
    """PNG files with caption and settings in their metadata; small ones eight times as large. A name that is taken
    gets the next number."""
    out.mkdir(parents=True, exist_ok=True)
    taken, paths = len(list(out.glob("*.png"))), []
    for image, caption in zip(to_uint8(images), captions, strict=True):
        while (path := out / f"{taken:05d}.png").exists():
            taken += 1
        note = PngInfo()
        for key, value in {"caption": caption, **settings}.items():
            note.add_text(key, str(value))
        picture = Image.fromarray(image)
        zoom = 8 if picture.width < SMALL else 1
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path, pnginfo=note)
        paths.append(path)
    return paths
