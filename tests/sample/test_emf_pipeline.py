"""EMFPipeline: the sampler of a folder that was exported, in diffusers' arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")
import sana
from digits_run import small_config, small_run
from exported import CONFIG, network, pipeline, write_base, write_published, write_start
from same_pictures import assert_same_pictures

from emf.cli.generate import generate
from emf.config import to_json
from emf.flow import guided, sample
from emf.weights.export import export, write_export
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


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    write_export(network().state_dict(), CONFIG, tmp_path / "out")
    z, _, c = sana.inputs()
    pipe = pipeline(tmp_path / "out")
    for wrong, message in (
        (dict(prompt="a"), "no text encoder reads prompts here; give prompt_embeds"),
        (dict(), "either prompt or prompt_embeds"),
        (dict(prompt_embeds=c[:0], output_type="latent"), "no prompts; expected at least one"),
        (dict(prompt="a", prompt_embeds=c), "either prompt or prompt_embeds"),
        (dict(prompt_embeds=c), "no vae to decode with"),
        (dict(prompt_embeds=c, output_type="jpg"), "'jpg'; expected pil, np, pt or latent"),
        (dict(prompt_embeds=c, latents=z[:2], output_type="latent"), "expected \\(3, 4, 8, 8\\)"),
        (dict(prompt_embeds=c, num_inference_steps=0, output_type="latent"), "steps 0"),
        (dict(prompt_embeds=c, generator=[torch.Generator()], output_type="latent"), "1 generators; expected one, or"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**wrong)
    pipe.scale = 2  # as with an autoencoder
    with pytest.raises(ValueError, match=r"size 16x5 \(width x height\); expected multiples of 2, as 16x4"):
        pipe(prompt_embeds=c, height=5, output_type="latent")
    for wrong in (dict(text_encoder=torch.nn.Linear(1, 1)), dict(tokenizer=object()), dict(torch_dtype="auto")):
        with pytest.raises(ValueError, match=f"pipeline: .*{next(iter(wrong)).split('_')[-1]}"):
            pipeline(tmp_path / "out", **wrong)


CAPTIONS = ["a red cat", "two dogs and a very long caption", "x", "a green apple on a table", "a red cat"]
"""More than are computed at once, so that the batches must be the same too."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the encoder: SANA's with a T5, whose null has a mask of its own; BLIP3o-NEXT, which draws image tokens; a run
    of the digits, whose encoder has a mask too, and one that was trained with guidance."""
    root = tmp_path_factory.mktemp("exports")
    published = write_published(root / "published")
    write_export(network().state_dict(), CONFIG, root / "t5", base=published)
    how = {"kind": "blip3o", "scale": 3, "window": "inference"}
    start = write_start(root / "start", root / "blip3o")
    write_export(network().state_dict(), CONFIG, root / "next", base=published, text=start, condition=how)
    export(small_run(root / "run"), root / "digits", dtype="float32")
    guided = replace(small_config(), flow=replace(small_config().flow, guidance=1.25))
    run = small_run(root / "guided-run")
    (run / "config.json").write_text(to_json(guided))
    export(run, root / "guided", dtype="float32")
    return {name: root / name for name in ("t5", "next", "digits", "guided")}


def drawn(folder: Path) -> list[np.ndarray]:
    """What `emf generate` wrote, in the pixels that it drew: it enlarges small pictures eight times."""
    return [np.asarray(Image.open(file))[::8, ::8] for file in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("guidance", [None, 1.0, 2.0, 4.5])
@pytest.mark.parametrize("kind", ["t5", "next", "digits", "guided"])
def test_a_picture_is_that_of_generate(
    exports: dict[str, Path], tmp_path: Path, kind: str, guidance: float | None
) -> None:
    """Bit for bit, by the same seed, at its default guidance too."""
    captions = ["a red seven", "two blue threes", "one two"] if kind in ("digits", "guided") else CAPTIONS
    captions = captions[:2] if kind == "next" else captions  # it draws 81 image tokens of each
    generate(tuple(captions), exports[kind], tmp_path / "pictures", steps=2, guidance=guidance, seed=7)
    pipe = pipeline(exports[kind])
    call: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=guidance)
    images = pipe(captions, generator=torch.Generator().manual_seed(7), **call).images
    want = drawn(tmp_path / "pictures")
    assert len(images) == len(want) and np.ptp(want[0]) > 10
    assert all(np.array_equal(np.asarray(image), picture) for image, picture in zip(images, want, strict=True))


def test_an_export_of_the_digits_has_its_encoder_and_its_guidance(exports: dict[str, Path], tmp_path: Path) -> None:
    run = exports["guided"].with_name("guided-run")
    for name, folder in (("run", run), ("export", exports["guided"])):
        generate(("a red seven",), folder, tmp_path / name, guidance=1.5)
    assert_same_pictures(tmp_path / "run", tmp_path / "export", levels=0)
    pipe = pipeline(exports["guided"])
    pipe.save_pretrained(tmp_path / "again")
    generate(("a red seven",), tmp_path / "again", tmp_path / "saved", guidance=1.5)
    assert_same_pictures(tmp_path / "run", tmp_path / "saved", levels=0)


def test_a_generator_gives_its_pictures_once(exports: dict[str, Path]) -> None:
    pipe, generator = pipeline(exports["t5"]), torch.Generator().manual_seed(3)
    call: dict[str, Any] = dict(prompt=CAPTIONS[:2], output_type="latent")
    first, second = (pipe(generator=generator, **call).images for _ in range(2))
    again = pipe(generator=torch.Generator().manual_seed(3), **call).images
    assert torch.equal(first, again) and not torch.equal(first, second)
    one_each = [torch.Generator().manual_seed(n) for n in (5, 3)]
    apart = pipe(generator=one_each, **{**call, "prompt": CAPTIONS[:1] * 2}).images
    torch.testing.assert_close(apart[1], first[0], rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    random = [pipe(**call).images for _ in range(2)]
    torch.manual_seed(0)
    assert not torch.equal(*random) and torch.equal(pipe(**call).images, random[0])


@torch.no_grad()
def test_the_null_states_have_their_own_mask(exports: dict[str, Path]) -> None:
    """Given by hand as the encoder gives them; and where none is given, all of them are attended to."""
    pipe, z = pipeline(exports["t5"]), sana.inputs()[0][:2]
    ids, mask = pipe.text_encoder.tokenize(CAPTIONS[:2])
    (c, kept), (null, null_kept) = (pipe.text_encoder(ids, mask, drop) for drop in (None, torch.ones(2).bool()))
    assert not torch.equal(kept, null_kept)
    call: dict[str, Any] = dict(latents=z, output_type="latent", guidance_scale=4.5, num_inference_steps=2)
    want = pipe(CAPTIONS[:2], **call).images
    given: dict[str, Any] = dict(prompt_embeds=c, prompt_attention_mask=kept, **call)
    own = pipe(negative_prompt_embeds=null, negative_prompt_attention_mask=null_kept, **given).images
    one = pipe(negative_prompt_embeds=null[:1], negative_prompt_attention_mask=null_kept[:1], **given).images
    assert torch.equal(own, want)
    torch.testing.assert_close(one, want)
    bare = pipe(negative_prompt_embeds=null, **given).images
    every = pipe(negative_prompt_embeds=null, negative_prompt_attention_mask=null_kept | True, **given).images
    assert torch.equal(bare, every) and not torch.allclose(bare, want, rtol=1e-3)


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
