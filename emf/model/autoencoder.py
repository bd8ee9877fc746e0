"""Pixels <-> latents: identity, or SANA's deep-compression autoencoder (DC-AE, diffusers' AutoencoderDC).

Latents are what the flow works on: already times scaling_factor (0.41407 for the f32c32 autoencoder of SANA; there is
no shift).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from emf.files import check_readable, read_object, why
from emf.model.state import variant


class Latent(Protocol):
    """An autoencoder."""

    channels: int
    """Of a latent."""
    scale: int
    """Pixels along a side for each latent."""
    name: str
    """What made the latents, for a cache's settings."""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> latents [B, channels, S / scale, S / scale] float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, S, S] float32, clamped to [-1, 1]."""
        ...


class Identity:
    """Pixels as they are: the small worlds, which have no autoencoder."""

    channels, scale, name = 3, 1, "identity"

    def encode(self, images: Tensor) -> Tensor:
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        return unit(latents.float())


class DCAE:
    """A frozen AutoencoderDC. It is deterministic: there is no posterior to sample from."""

    def __init__(self, module: Any) -> None:
        self.module = module.eval().requires_grad_(False)
        self.channels = int(module.config.latent_channels)
        self.scale = int(module.spatial_compression_ratio)
        self.scaling_factor = float(module.config.scaling_factor)
        # no path: a cache may be continued, and checked, where the same weights lie elsewhere
        self.name = f"AutoencoderDC f{self.scale}c{self.channels}, scaling_factor {self.scaling_factor}"

    @property
    def _place(self) -> dict[str, Any]:
        weight = next(self.module.parameters())
        return dict(device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See Latent; on the autoencoder's device. Raises ValueError on images of another shape than [B, 3, S, S'] with
        sides that are multiples of scale."""
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.scale or not side for side in images.shape[2:]):
            raise ValueError(
                f"latent: images {list(images.shape)}; expected [B, 3, H, W], H and W multiples of {self.scale}"
            )
        return self.module.encode(images.to(**self._place), return_dict=False)[0].float() * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """See Latent; on the autoencoder's device. Raises ValueError on latents of another shape."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latent: latents {list(latents.shape)}; expected [B, {self.channels}, h, w]")
        return decode(self.module, latents.to(self._place["device"]))


def dcae_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(file, contents) of the config of the autoencoder in a diffusers folder; see load_dcae."""
    expected = "a diffusers folder with vae/config.json, or an autoencoder's own with config.json"
    config = next((f for f in (folder / "vae" / "config.json", folder / "config.json") if f.is_file()), None)
    if config is None:
        raise ValueError(f"latent: {folder} holds no autoencoder; expected {expected}")
    settings = read_object(config, "latent", expected)
    kind, factor = settings.get("_class_name"), settings.get("scaling_factor")
    if kind != "AutoencoderDC":
        raise ValueError(f"latent: {config} is of class {kind}; expected AutoencoderDC")
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise ValueError(f"latent: {config} names no scaling_factor above 0 (SANA's f32c32 has 0.41407)")
    return config, settings


def load_dcae(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> DCAE:
    """The autoencoder in a diffusers folder: the folder itself, or its subfolder `vae`.

    Raises ValueError where there is none, where weights are missing, and where its config names no scaling_factor
    (diffusers would take 1).
    """
    config, _ = dcae_config(folder)
    from diffusers import AutoencoderDC

    try:
        check_readable(config.parent)
        module, found = AutoencoderDC.from_pretrained(
            str(config.parent),
            torch_dtype=dtype,
            variant=variant(config.parent),
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a config with a value of another kind fails wherever that is used
        raise ValueError(f"latent: {config.parent} cannot be loaded: {why(error)}") from None
    if found["missing_keys"]:
        missing = found["missing_keys"]
        raise ValueError(f"latent: {config.parent} lacks {len(missing)} weights, {sorted(missing)[0]} the first")
    return DCAE(module.to(device))


@torch.no_grad()
def decode(module: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> images [B, 3, S, S] float32, clamped to [-1, 1], by a diffusers autoencoder. What is not
    finite is NaN.

    The latents lie on the device that the module computes on, which need not be where its weights are at the moment:
    diffusers moves those when they are needed.
    """
    z = (latents.float() / float(module.config.scaling_factor)).to(module.dtype)
    images: Tensor = module.decode(z, return_dict=False)[0]
    return unit(images.float())


def unit(images: Tensor) -> Tensor:
    """Images clamped to [-1, 1]. An infinity becomes NaN, for clamped it would pass as black or white."""
    return torch.where(images.isfinite(), images.clamp(-1, 1), torch.nan)


def posterior_sample(mean: Tensor, std: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
    """A latent of the posterior N(mean, std^2), drawn anew at every step; the mean where the autoencoder is
    deterministic (std None)."""
    if std is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32)
    return mean + std * noise.to(mean.device, mean.dtype)
