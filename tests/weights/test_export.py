"""An exported folder: diffusers' class reads the transformer, our pipeline samples from it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")
import diffusers
import sana

from emf.flow import guided, sample
from emf.model.transformer import Transformer, TransformerConfig
from emf.sample.emf_pipeline import EMFPipeline
from emf.weights.convert import convert
from emf.weights.converted import load_converted
from emf.weights.export import write_export
from emf.weights.layouts import read_config

CONFIG = TransformerConfig(**sana.OURS, dual_time=True, time_scale=10.0)


def network(config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(config)
    sana.randomize(net)
    return net.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with an autoencoder, a tokenizer's and a text encoder's file, some of them links."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    )
    vae.save_pretrained(folder / "vae")
    (folder / "blob").write_text("{}")
    for name in ("tokenizer", "text_encoder"):
        (folder / name).mkdir()
        (folder / name / "config.json").symlink_to(folder / "blob")
    index = {
        "_class_name": "SanaPipeline",
        "vae": ["diffusers", "AutoencoderDC"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(qk_norm=False),
        dict(patch_size=2, interpolation_scale=1.0),
        dict(dual_time=False),
        dict(out_channels=8),
        dict(num_layers=1, mlp_ratio=3.0),
    ],
    ids=str,
)
@torch.no_grad()
def test_diffusers_class_reads_it(tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Every key, no other, and our velocity in flow-matching mode."""
    ours = network(replace(CONFIG, **changes))
    write_export(ours.state_dict(), ours.config, tmp_path / "out")
    logging.getLogger("diffusers").propagate = True
    theirs, info = diffusers.SanaTransformer2DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    z, t, c = sana.inputs()
    want = ours(z, t, None, c)
    assert (sana.velocity(theirs.eval()) - want).norm() / want.norm() < 1e-5
    again = read_config(tmp_path / "out" / "transformer" / "config.json")
    assert asdict(again) == asdict(replace(ours.config, dual_time=False, time_scale=1.0))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert scheduler.config.shift == 1.0


def pipeline(folder: Path, **kwargs: Any) -> EMFPipeline:
    pipe: EMFPipeline = EMFPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def test_other_parts_come_from_the_base(tmp_path: Path, base: Path) -> None:
    write_export(network().state_dict(), CONFIG, tmp_path / "out", base=base)
    for file in base.rglob("*/*"):
        copy = tmp_path / "out" / file.relative_to(base)
        assert copy.read_bytes() == file.read_bytes() and not copy.is_symlink()
        assert copy.stat().st_ino == file.stat().st_ino  # the same file system: not a byte is copied
    pipe = pipeline(tmp_path / "out", text_encoder=None, tokenizer=None)
    z, _, c = sana.inputs()
    image = pipe(prompt_embeds=c, latents=z, output_type="pt").images
    latents = pipe(prompt_embeds=c, latents=z, output_type="latent").images
    with torch.no_grad():
        want = pipe.vae.decode(latents / 0.5).sample
    torch.testing.assert_close(image, (want / 2 + 0.5).clamp(0, 1))
    assert image.shape == (3, 3, 16, 16)
    assert [p.size for p in pipe(prompt_embeds=c, height=8, width=12).images] == [(12, 8)] * 3


def test_text_parts_of_a_converted_blip3o_next(tmp_path: Path, base: Path) -> None:
    theirs = sana.diffusers_model()
    theirs.save_config(tmp_path / "sana")
    sana.blip3o(tmp_path / "a", theirs, tied=True, extras=False)
    text = tmp_path / "text"
    convert(tmp_path / "a", text, config=tmp_path / "sana" / "config.json")
    write_export(network().state_dict(), CONFIG, tmp_path / "out", base=base, text=text)
    for file in (text / "connector.safetensors", *(text / "language_model").iterdir()):
        assert (tmp_path / "out" / file.relative_to(text)).read_bytes() == file.read_bytes()
    assert not (tmp_path / "out" / "tokenizer").exists()  # the base's encoder is another
    pipe = pipeline(tmp_path / "out")
    assert pipe.text_encoder is None and pipe.vae is not None
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "language_model" / "config.json").exists()
    with pytest.raises(ValueError, match="expected a converted BLIP3o-NEXT checkpoint"):
        write_export(network().state_dict(), CONFIG, tmp_path / "no", base=base, text=base)


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
    for name in ("diffusion_pytorch_model", "time_embed_dual"):
        a, b = (load_file(tmp_path / d / "transformer" / f"{name}.safetensors") for d in ("out", "again"))
        assert a.keys() == b.keys() and all(torch.equal(a[k].bfloat16(), b[k]) for k in a)


def test_published_to_ours_to_diffusers_is_the_identity(tmp_path: Path) -> None:
    theirs = sana.diffusers_model()
    theirs.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    ours, checkpoint = load_converted(tmp_path / "b")
    write_export(ours.state_dict(), checkpoint.transformer, tmp_path / "c")
    state = load_file(tmp_path / "c" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items())


def test_what_does_not_fit_is_one_line(tmp_path: Path, base: Path) -> None:
    state = network().state_dict()
    (tmp_path / "taken").mkdir()
    half = tmp_path / "half"
    half.mkdir()
    (half / "model_index.json").write_text((base / "model_index.json").read_text())
    for out, where, weights, config, message in (
        ("taken", None, state, CONFIG, "taken exists"),
        ("out", tmp_path, state, CONFIG, "has no model_index.json"),
        ("out", half, state, CONFIG, "has no vae, which its model_index.json names"),
        ("out", None, state, replace(CONFIG, dual_time=False), "dual_time False"),
        ("out", None, {f"transformer.{k}": v for k, v in state.items()}, CONFIG, "expected a Transformer's state dict"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            write_export(weights, config, tmp_path / out, base=where)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_pipeline_of_another_folder_is_one_line(tmp_path: Path) -> None:
    net = network(replace(CONFIG, dual_time=False))
    write_export(net.state_dict(), net.config, tmp_path / "single")
    with pytest.raises(ValueError, match="has no time_embed_dual.safetensors"):
        pipeline(tmp_path / "single")
    write_export(network().state_dict(), CONFIG, tmp_path / "out")
    dual = tmp_path / "out" / "transformer" / "time_embed_dual.safetensors"
    state = load_file(dual)
    save_file(state, dual)
    with pytest.raises(ValueError, match="does not say its time_scale"):
        pipeline(tmp_path / "out")
    state.pop("time_embed_t.linear.bias")
    save_file(state, dual, {"time_scale": "1", "base_time_scale": "1000"})
    with pytest.raises(ValueError, match="missing time_embed_t.linear.bias"):
        pipeline(tmp_path / "out")
