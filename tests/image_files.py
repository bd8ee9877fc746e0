"""Small pictures, tars and folders of them, for the tests of the data."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emf.data.drops import Drops
from emf.data.sources import Source


def noise(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A picture that only its seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members))
    return path


def pairs(n: int, first: int = 0) -> dict[str, bytes]:
    """Members of n samples: `0003.png` of seed 3 with the caption `picture 3`."""
    members = {}
    for i in range(first, first + n):
        members |= {f"{i:04d}.png": encoded(noise(i)), f"{i:04d}.txt": f"picture {i}\n".encode()}
    return members


def write_folder(folder: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder


def tar_and_folder(root: Path) -> list[Source]:
    """A tar with two broken pictures side by side, and a folder with an empty caption."""
    tar = write_tar(root / "a.tar", pairs(9) | {"0003.png": b"broken", "0004.png": b""})
    folder = write_folder(root / "b", pairs(7, 20) | {"0026.txt": b""})
    return [Source(str(tar), 2.0), Source(str(folder), 1.0)]


def small_autoencoder() -> Any:
    """An AutoencoderDC of random weights, 4 pixels along a side to a latent of 4 channels."""
    import torch
    from diffusers import AutoencoderDC

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(4, 8, 8),
            decoder_block_out_channels=(4, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41407,
        )
        # random weights of this size give pictures that are nearly grey
        module.decoder.conv_out.weight.data *= 20
    return module


def by_reason(drops: Drops) -> dict[str, int]:
    """How many samples were dropped for each reason, over all sources."""
    total: dict[str, int] = {}
    for (_, reason), count in drops.counts.items():
        total[reason] = total.get(reason, 0) + count
    return total
