"""Pixels to latents and back, with a small real AutoencoderDC."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import small_autoencoder
from safetensors.torch import load_file, save_file

from emf.model.autoencoder import DCAE, Identity, load_dcae, posterior_sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers saves a pipeline's autoencoder."""
    root = tmp_path_factory.mktemp("pipeline")
    small_autoencoder().save_pretrained(root / "vae")
    return root


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_identity() -> None:
    x = torch.tensor([-2.0, 0.5, 2.0]).view(1, 3, 1, 1).to(torch.bfloat16)
    latent = Identity()
    assert torch.equal(latent.encode(x), x.float()) and (latent.channels, latent.scale) == (3, 1)
    assert latent.decode(x).flatten().tolist() == [-1.0, 0.5, 1.0]


@pytest.mark.parametrize("sub", ["", "vae"])
def test_latents_are_diffusers_times_the_factor(sub: str, folder: Path, images: torch.Tensor) -> None:
    from diffusers import AutoencoderDC

    latent = load_dcae(folder / sub)
    reference = AutoencoderDC.from_pretrained(folder / "vae")
    z = latent.encode(images)
    assert z.shape == (2, 4, 4, 6) and z.dtype == torch.float32 and not z.requires_grad
    assert (latent.channels, latent.scale, latent.scaling_factor) == (4, 4, 0.41407)
    with torch.no_grad():
        torch.testing.assert_close(z, reference.encode(images).latent * 0.41407)
        decoded = reference.decode(z / 0.41407).sample
    assert decoded.abs().max() > 1  # the clamp has something to do
    torch.testing.assert_close(latent.decode(z), decoded.clamp(-1, 1))
    assert all(not p.requires_grad for p in latent.module.parameters()) and not latent.module.training


def test_half_precision_gives_float32_latents(folder: Path, images: torch.Tensor) -> None:
    z, half = load_dcae(folder).encode(images), load_dcae(folder, torch.bfloat16)
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}
    assert half.encode(images).dtype == half.decode(z).dtype == torch.float32
    assert (half.encode(images) - z).norm() < 0.05 * z.norm()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 16, 16), (1, 3, 18, 16), (1, 3, 16, 17), (1, 3, 0, 16)])
def test_wrong_images_are_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        DCAE(small_autoencoder()).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 3, 4, 4)])
def test_wrong_latents_are_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\]"):
        DCAE(small_autoencoder()).decode(torch.zeros(shape))


def edit(**fields: Any) -> Any:
    def change(vae: Path) -> None:
        config = json.loads((vae / "config.json").read_text())
        kept = {k: v for k, v in (config | fields).items() if v is not None}
        (vae / "config.json").write_text(json.dumps(kept))

    return change


def lose_a_weight(vae: Path) -> None:
    file = vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, {"format": "pt"})


def tear(vae: Path) -> None:
    file = vae / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: (vae / "config.json").unlink(), "holds no autoencoder"),
        (lambda vae: (vae / "config.json").write_text("{"), "config.json is JSON that ends too early"),
        (lambda vae: (vae / "config.json").write_text("[]"), "no JSON object"),
        (edit(_class_name="AutoencoderKL"), "class AutoencoderKL"),
        (edit(scaling_factor=None), "scaling_factor"),
        (edit(scaling_factor=0), "scaling_factor"),
        (edit(latent_channels=8), "cannot be loaded"),
        (lambda vae: (vae / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded"),
        (tear, "cannot be loaded"),
        (lose_a_weight, "lacks 1 weights"),
    ],
)
def test_a_broken_folder_is_one_line(change: Any, message: str, tmp_path: Path) -> None:
    small_autoencoder().save_pretrained(tmp_path / "vae")
    change(tmp_path / "vae")
    with pytest.raises(ValueError, match=message) as caught:
        load_dcae(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and str(tmp_path) in str(caught.value)


def test_draw() -> None:
    mean, std = torch.full((1000,), 3.0), torch.full((1000,), 0.5)
    assert posterior_sample(mean, None) is mean
    z = posterior_sample(mean, std, torch.Generator().manual_seed(0))
    assert torch.equal(z, posterior_sample(mean, std, torch.Generator().manual_seed(0)))
    assert not torch.equal(z, posterior_sample(mean, std, torch.Generator().manual_seed(1)))
    assert abs(z.mean() - 3) < 0.06 and abs(z.std() - 0.5) < 0.04
    assert posterior_sample(mean.bfloat16(), std.bfloat16()).dtype == torch.bfloat16
