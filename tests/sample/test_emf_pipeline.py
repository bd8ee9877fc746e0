"""EMFPipeline: the sampler of a folder that was exported, in diffusers' arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")
import sana
from exported import CONFIG, network, pipeline, write_base

from emf.flow import guided, sample
from emf.weights.export import write_export
from emf.weights.layouts import DUAL


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@torch.no_grad()
def test_the_pipeline_samples_with_both_embedders(tmp_path: Path, steps: int, guidance: float) -> None:
    ours = network()
    write_export(ours.state_dict(), CONFIG, tmp_path / "out")
    pipe = pipeline(tmp_path / "out")
    z, _, c = sana.inputs()
    velocity = lambda states: lambda z, t, r: ours(z, t, r, states)  # noqa: E731
    call: dict[str, Any] = dict(num_inference_steps=steps, guidance_scale=guidance, output_type="latent")
    want = sample(guided(velocity(c), velocity(torch.zeros_like(c)), guidance), z, steps)
    torch.testing.assert_close(pipe(prompt_embeds=c, latents=z, **call).images, want)
    null = torch.full_like(c[:1], 0.3)
    want = sample(guided(velocity(c), velocity(null.expand_as(c)), guidance), z, steps)
    torch.testing.assert_close(pipe(prompt_embeds=c, negative_prompt_embeds=null, latents=z, **call).images, want)


def test_noise_comes_from_the_generator(tmp_path: Path) -> None:
    write_export(network().state_dict(), CONFIG, tmp_path / "out")
    pipe, c = pipeline(tmp_path / "out"), sana.inputs()[2]

    def draw(seed: int, **more: Any) -> Tensor:
        out: Tensor = pipe(
            prompt_embeds=c, generator=torch.Generator().manual_seed(seed), output_type="latent", **more
        )[0]
        return out

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0, height=4, width=6).shape == (3, 4, 4, 6)
    states = sana.inputs()[2]
    mask = torch.arange(5)[None].expand(3, -1) < 3
    changed = torch.where(mask[..., None], states, 9.0)
    call: dict[str, Any] = dict(output_type="latent", latents=torch.ones(3, 4, 8, 8), prompt_attention_mask=mask)
    torch.testing.assert_close(pipe(prompt_embeds=states, **call)[0], pipe(prompt_embeds=changed, **call)[0])


def test_arguments_by_position_are_those_of_before(tmp_path: Path) -> None:
    write_export(network().state_dict(), CONFIG, tmp_path / "out")
    pipe, (z, _, c) = pipeline(tmp_path / "out"), sana.inputs()
    call: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=1.5, output_type="latent")
    want = pipe(prompt_embeds=c, latents=z, **call).images
    (images,) = pipe(None, c, None, None, 2, 1.5, 8, 8, None, z, "latent", False)
    assert torch.equal(images, want)


def test_prompts_need_a_conditioning(tmp_path: Path) -> None:
    write_export(network().state_dict(), CONFIG, tmp_path / "out")
    z, _, c = sana.inputs()
    null = torch.full_like(c, 0.3)
    pipe = pipeline(tmp_path / "out", conditioning=lambda prompts: (c[: len(prompts)], null[: len(prompts)], None))
    call: dict[str, Any] = dict(latents=z[:2], output_type="latent")
    want = pipe(prompt_embeds=c[:2], negative_prompt_embeds=null[:2], **call).images
    torch.testing.assert_close(pipe(["a", "b"], **call).images, want)
    pipe.conditioning = None
    for wrong, message in (
        (dict(prompt="a"), "no conditioning reads prompts"),
        (dict(), "either prompt or prompt_embeds"),
        (dict(prompt="a", prompt_embeds=c), "either prompt or prompt_embeds"),
        (dict(prompt_embeds=c), "no vae to decode with"),
        (dict(prompt_embeds=c, latents=z[:2], output_type="latent"), "expected \\(3, 4, 8, 8\\)"),
        (dict(prompt_embeds=c, num_inference_steps=0, output_type="latent"), "0 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**wrong)


def test_a_pipeline_is_saved_again(tmp_path: Path, base: Path) -> None:
    ours = network()
    write_export(ours.state_dict(), CONFIG, tmp_path / "out", base=base)
    pipe = pipeline(tmp_path / "out", text_encoder=None, tokenizer=None, torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.transformer.network.config == CONFIG
    z, _, c = sana.inputs()
    few = pipe(prompt_embeds=c, latents=z, output_type="latent", num_inference_steps=2).images
    assert few.dtype == torch.float32 and few.isfinite().all()
    pipe.save_pretrained(tmp_path / "again")
    names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))  # noqa: E731
    assert names(tmp_path / "again") == names(tmp_path / "out")
    for name in ("diffusion_pytorch_model.safetensors", DUAL):
        a, b = (load_file(tmp_path / d / "transformer" / name) for d in ("out", "again"))
        assert a.keys() == b.keys() and all(torch.equal(a[k].bfloat16(), b[k]) for k in a)


def test_pipeline_of_another_folder_is_one_line(tmp_path: Path) -> None:
    net = network(replace(CONFIG, dual_time=False))
    write_export(net.state_dict(), net.config, tmp_path / "single")
    with pytest.raises(ValueError, match=f"has no {DUAL}"):
        pipeline(tmp_path / "single")
    write_export(network().state_dict(), CONFIG, tmp_path / "out")
    dual = tmp_path / "out" / "transformer" / DUAL
    state = load_file(dual)
    save_file(state, dual)
    with pytest.raises(ValueError, match="does not say its time_scale"):
        pipeline(tmp_path / "out")
    state.pop("time_embed_t.linear.bias")
    save_file(state, dual, {"time_scale": "1", "base_time_scale": "1000"})
    with pytest.raises(ValueError, match="missing time_embed_t.linear.bias"):
        pipeline(tmp_path / "out")
