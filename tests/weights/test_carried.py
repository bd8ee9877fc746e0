"""An export without emf: diffusers draws from the folder by the modules that it carries, what `emf generate` draws."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")
import diffusers
import sana
import text_models
from digits_run import small_run
from exported import CONFIG, network, write_base
from fake_hub import Hub, serving

from emf.cli.weights import export as export_command
from emf.conditioning.blip3o import Blip3oNext
from emf.conditioning.load import load as load_encoder
from emf.conditioning.sampling import Sampling
from emf.data.digits import TAGS
from emf.data.scores_file import CHECKS
from emf.model.autoencoder import decode, load_dcae
from emf.recipes import digits
from emf.sample.emf_pipeline import EMFTransformer
from emf.sample.sampler import Sampler, latents_of
from emf.weights import carried
from emf.weights.card import base_model
from emf.weights.convert import convert
from emf.weights.export import export, write_export
from emf.weights.hub import push

ALONE = """
import json, sys
sys.modules["emf"] = sys.modules["emf_kernels"] = None  # as where they are not installed
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

drawn = {}
for name, (folder, loaded, called) in json.load(open(sys.argv[1])).items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **loaded)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(called.pop("seed"))
    given = {k: torch.tensor(v) if k.endswith("embeds") else v for k, v in called.items()}
    drawn[name] = pipe(**given, generator=seed, output_type="pt").images.float().contiguous()
    assert type(pipe.transformer).__module__.startswith("diffusers_modules."), type(pipe.transformer)
save_file(drawn, sys.argv[2])
print(sorted(name for name in sys.modules if name.split(".")[0] in ("emf", "emf_kernels")))
"""
WORDS = ["two red sevens", "a blue three"]
CAPTIONS = ["A red cat ", "two dogs"]
C = sana.inputs()[2]
STATES: dict[str, Any] = dict(prompt_embeds=C.tolist(), negative_prompt_embeds=(0.3 * C).tolist())
GENERAL = dict(prompt=CAPTIONS, num_inference_steps=2, seed=5)


def drawn_alone(folder: Path, jobs: dict[str, Any], **environment: str) -> dict[str, Tensor]:
    """The pictures [n, 3, H, W] in [0, 1] that each job gives in a process that cannot import emf."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    arguments = [sys.executable, "-c", ALONE, str(folder / "jobs.json"), str(folder / "drawn.safetensors")]
    whole = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"} | environment
    whole.pop("PYTHONPATH", None)
    done = subprocess.run(arguments, env=whole, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "['emf', 'emf_kernels']"  # the two that say so, and no module of theirs
    return load_file(folder / "drawn.safetensors")


def by_emf(folder: Path, prompts: list[str], **settings: Any) -> Tensor:
    """The same by `emf generate`'s sampler."""
    return (Sampler.load(folder).images(prompts, **settings) / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports with every kind of text stage, by kind, and the run that the small one is of."""
    root = tmp_path_factory.mktemp("exports")
    made = {kind: root / kind for kind in ("run", "small", "gemma", "blip3o")}
    export(small_run(made["run"]), made["small"], dtype="float32")

    base = write_base(root / "base")
    model, tokenizer = text_models.gemma()
    for part, saved in (("text_encoder", model), ("tokenizer", tokenizer)):
        (base / part / "config.json").unlink()
        saved.save_pretrained(base / part)
    index = json.loads((base / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", type(tokenizer).__name__]
    (base / "model_index.json").write_text(json.dumps(index))
    net = network(replace(CONFIG, caption_channels=16))
    told = carried.settings_of(load_encoder("gemma", base), 1.0)
    write_export(net.state_dict(), net.config, made["gemma"], base=base, settings=told)

    encoder = text_models.blip3o(image_tokens=81, scale=3)
    encoder.save(root / "text")
    told = carried.settings_of(encoder, 1.6) | {"top_k": 4}  # few likely tokens, so that rounding tips no draw
    how = dict[str, Any](condition={"kind": "blip3o", "scale": 3, "window": "inference"})
    write_export(network().state_dict(), CONFIG, made["blip3o"], base=base, text=root / "text", settings=told, **how)
    return made


@pytest.fixture(scope="module")
def uploaded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    """A Hub with one repository, me/digits, and the folder that was pushed there."""
    out = tmp_path_factory.mktemp("pushed") / "digits"
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        patch.setenv("HF_TOKEN", "hf_of_a_test")
        export_command(folders["run"], out, dtype="float32", push="me/digits")
        yield hub, out


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], uploaded: tuple[Hub, Path], tmp_path_factory: Any) -> dict[str, Tensor]:
    """Every picture that the tests ask of a process without emf; it is one, for importing takes most of its time."""
    small, blip3o = str(folders["small"]), str(folders["blip3o"])
    jobs: dict[str, Any] = {kind: (str(folders[kind]), {}, GENERAL) for kind in ("gemma", "blip3o")}
    words = dict(prompt=WORDS, num_inference_steps=2, seed=5)
    jobs["small"] = (small, {}, words)
    jobs["from the Hub"] = ("me/digits", {"token": "hf_of_a_test"}, words)
    jobs["unguided"] = (small, {}, dict(prompt=WORDS, guidance_scale=1.0, seed=0))
    jobs["states"] = (blip3o, {}, STATES | dict(num_inference_steps=4, guidance_scale=2.4, seed=1))
    jobs["wide"] = (blip3o, {}, STATES | dict(height=8, width=12, seed=1))
    folder = tmp_path_factory.mktemp("alone")
    return drawn_alone(folder, jobs, HF_ENDPOINT=uploaded[0].endpoint)


@pytest.mark.parametrize("kind", ["small", "gemma", "blip3o"])
def test_pictures_are_those_of_generate(
    kind: str, folders: dict[str, Path], alone: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blip3oNext, "generate", partialmethod(Blip3oNext.generate, sampling=Sampling(top_k=4)))
    source, prompts = (folders["run"], WORDS) if kind == "small" else (folders[kind], CAPTIONS)
    want = by_emf(source, prompts, steps=2, seed=5)
    assert want.std() > 0.02 and (want[0] - want[1]).abs().max() > 0.02
    torch.testing.assert_close(alone[kind], want, rtol=0, atol=1e-4)


def test_without_guidance_and_from_states(folders: dict[str, Path], alone: dict[str, Tensor]) -> None:
    want = by_emf(folders["run"], WORDS, steps=1, guidance=1.0)
    torch.testing.assert_close(alone["unguided"], want, rtol=0, atol=1e-4)
    c, null = (torch.tensor(STATES[k]) for k in ("prompt_embeds", "negative_prompt_embeds"))
    noise = torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1_000_003 + i)) for i in range(3)]
    )
    net = network()
    latents = latents_of(net, noise, (c, None), (null, None), steps=4, guidance=2.4 / 1.6)
    want = (decode(load_dcae(folders["blip3o"]).module, latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(alone["states"], want, rtol=0, atol=1e-4)
    assert alone["wide"].shape == (3, 3, 8, 12)


def test_a_push_says_what_it_uploads_and_the_hub_gives_it_back(
    uploaded: tuple[Hub, Path], alone: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Diffusers fetches what it knows of; nothing that the pipeline needs is left behind."""
    hub, out = uploaded
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert hub.files["me/digits"] == files and hub.private["me/digits"]
    assert {token for method, _, token in hub.asked if method == "POST"} == {"Bearer hf_of_a_test"}
    torch.testing.assert_close(alone["from the Hub"], alone["small"], rtol=0, atol=0)
    push(out, "me/digits")
    said = capsys.readouterr().out
    assert "me/digits, private: uploading" in said
    assert all(f"  {name} {len(content):,} bytes" in said for name, content in files.items())


def test_a_push_that_cannot_be_is_one_line(
    uploaded: tuple[Hub, Path], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, out = uploaded
    for name in ("digits", "a/b/c", "me/dig its"):
        with pytest.raises(ValueError, match=f"push: --push {name}; expected OWNER/NAME") as error:
            export_command(folders["run"], tmp_path / "no", push=name)
        assert "\n" not in str(error.value) and not (tmp_path / "no").exists()
    with pytest.raises(ValueError, match="name it with --push"):
        export_command(folders["run"], tmp_path / "no", public=True)
    hub.files["me/open"], hub.private["me/open"] = {}, False
    with pytest.raises(ValueError, match="it is there and public; say --public") as error:
        push(out, "me/open")
    assert hub.files["me/open"] == {} and "hf upload" not in str(error.value)  # which would publish it
    push(out, "me/open", public=True)
    assert hub.files["me/open"].keys() == hub.files["me/digits"].keys()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="push: me/digits was not uploaded: ") as error:
        push(out, "me/digits")
    assert "\n" not in str(error.value) and f"`hf upload me/digits {out} --private` tries again" in str(error.value)


def test_the_model_card(folders: dict[str, Path], tmp_path: Path) -> None:
    text = (folders["small"] / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image"
    assert "license" not in head and "\n# license: yours to fill in" in text
    assert "DiffusionPipeline.from_pretrained('small', trust_remote_code=True)" in text and "Not evaluated." in text
    assert "| recipe | digits |" in text and str(folders["run"]) not in text
    run = tmp_path / "run"
    shutil.copytree(folders["run"], run)
    (run / "metrics.jsonl").write_text("{}\n")
    told = [("fm", 1, 0.25), ("fm", 4, 0.5), ("fm", 30, 0.887), ("emf", 2, 0.813)]
    rows = [{"model": m, "steps": n, "overall": x, "by_tag": dict.fromkeys(TAGS, x)} for m, n, x in told]
    scored = {"rows": rows, **dict.fromkeys(CHECKS, 0.5), "guidance": 1.25}  # an earlier version's: of 300 captions
    (run / "scores.json").write_text(json.dumps(scored))
    (run / "geneval").mkdir()
    (run / "geneval" / "results.md").write_text("# GenEval\nAll of it.\n")
    Image.new("RGB", (4, 4)).save(run / "samples.png")
    export(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| EMF | 2 | 0.813 |" in text and "Of 300 captions, at guidance 1.25." in text
    assert "### GenEval\nAll of it." in text and "(samples.png)" in text
    assert (tmp_path / "out" / "samples.png").read_bytes() == (run / "samples.png").read_bytes()
    assert "weights of" not in text
    step = run / "checkpoints" / "step_0000300"
    step.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (run / name).rename(step / name)
    (step / "checkpoint.json").write_text('{"step": 300, "world": 1, "stage": 0}')
    scored |= {"captions": 300, "step": 300}
    (run / "scores.json").write_text(json.dumps(scored))
    (run / "geneval" / "4" / "images").mkdir(parents=True)
    drawn = run / "geneval" / "4" / "images" / "drawing.json"
    drawn.write_text('{"step": 300}')
    export(run, tmp_path / "current")
    text = (tmp_path / "current" / "README.md").read_text()
    assert "weights of" not in text and "| steps | 300 of 500, of 64 samples each |" in text
    (run / "scores.json").write_text(json.dumps(scored | {"step": 100}))
    drawn.write_text('{"step": 200}')
    (run / "samples").mkdir()
    for number in (100, 200):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(run / "samples" / f"step_{number:07d}.png")
    export(run, tmp_path / "later")
    text = (tmp_path / "later" / "README.md").read_text()
    assert "The scores are of weights of step 100; those here are of step 300." in text
    assert "The images were drawn with weights of step 200; those here are of step 300." in text
    assert "The samples are of weights of step 200; those here are of step 300." in text
    assert (tmp_path / "later" / "samples.png").read_bytes() == (run / "samples" / "step_0000200.png").read_bytes()
    (run / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what `emf evaluate digits` writes"):
        export(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_base_of_the_hub_is_named(tmp_path: Path) -> None:
    cached = tmp_path / "models--Some-Lab--SANA_1.5" / "snapshots" / "0" / "transformer"
    sana.diffusers_model().save_pretrained(cached)
    convert(cached.parent, tmp_path / "start")
    config = digits()
    assert base_model(replace(config, init=tmp_path / "start")) == "Some-Lab/SANA_1.5"
    assert base_model(replace(config, init=cached.parent)) == "Some-Lab/SANA_1.5"
    assert base_model(config) is None and base_model(replace(config, init=tmp_path)) is None


def test_where_emf_is_installed_its_transformer_is_taken(
    folders: dict[str, Path], alone: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folders["small"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer) is EMFTransformer

    def draw(generator: torch.Generator) -> Tensor:
        images: Tensor = pipe(WORDS, num_inference_steps=2, generator=generator, output_type="pt").images
        return images

    seed = torch.Generator().manual_seed(5)
    torch.testing.assert_close(draw(seed), alone["small"], rtol=0, atol=1e-4)
    assert (draw(seed) - alone["small"]).abs().max() > 0.02  # a generator does not give the same pictures twice
    states = torch.zeros(1, 2, pipe.transformer.network.config.caption_channels)
    for wrong, message in (
        (dict(prompt="a striped three"), "expected captions of 1 to 10 of the words a an and"),
        (dict(), "either prompt or prompt_embeds"),
        (dict(prompt=[]), "no prompts; expected at least one"),
        (dict(prompt="a red seven", num_inference_steps=0), "0 steps; expected 1 to 10000"),
        (dict(prompt="a red seven", output_type="foo"), "'foo'; expected pil, np, pt or latent"),
        (dict(prompt_embeds=states, height=7), r"size 18x7 \(width x height\); expected multiples of 6"),
        (dict(prompt_embeds=states, latents=torch.zeros(2, 3, 18, 18)), r"expected \(1, 3, 18, 18\)"),
        (dict(prompt_embeds=states * torch.nan), "holds NaN or inf"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**wrong)
    with pytest.raises(ValueError, match="copy the folder"):
        pipe.save_pretrained(tmp_path / "again")


def test_the_modules_are_short_and_import_nothing_of_emf() -> None:
    files = sorted(carried.HERE.glob("flow_map_*.py"))
    text = {file.stem: file.read_text() for file in files}
    assert len(text) == 4 and not any(re.search(r"^\s*(from|import) emf", code, re.MULTILINE) for code in text.values())
    both = text["flow_map_pipeline"] + text["flow_map_transformer"]
    assert len(both.splitlines()) < 250


def test_variants_lose_their_name(tmp_path: Path) -> None:
    """Whoever has not got emf cannot be asked to know that a published part is bf16 alone."""
    base = write_base(tmp_path / "base")
    vae = diffusers.AutoencoderDC.from_pretrained(base / "vae")
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(base / "vae", variant="bf16", max_shard_size="8KB")
    write_export(network().state_dict(), CONFIG, tmp_path / "out", base=base)
    assert not list((tmp_path / "out" / "vae").glob("*bf16*"))
    read = diffusers.AutoencoderDC.from_pretrained(tmp_path / "out" / "vae")
    assert all(torch.equal(x, vae.state_dict()[name]) for name, x in read.state_dict().items())
