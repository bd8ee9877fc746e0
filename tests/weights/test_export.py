"""An exported folder: diffusers' class reads the transformer, our pipeline samples from it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
import diffusers
import sana
from exported import CONFIG, network, pipeline, write_base

from emf.weights.convert import convert
from emf.weights.converted import load_converted
from emf.weights.export import write_export
from emf.weights.layouts import read_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(qk_norm=False),
        dict(patch_size=2, interpolation_scale=1.0),
        dict(dual_time=False),
        dict(out_channels=8),
        dict(num_layers=1, mlp_ratio=3.0),
        dict(norm_eps=0.3),  # of the blocks; that of the last norm is fixed
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


def test_other_parts_come_from_the_base(tmp_path: Path, base: Path) -> None:
    write_export(network().state_dict(), CONFIG, tmp_path / "out", base=base)
    for file in base.rglob("*/*"):
        copy = tmp_path / "out" / file.relative_to(base)
        assert copy.read_bytes() == file.read_bytes() and not copy.is_symlink()
        before = file.read_bytes()
        with copy.open("ab") as edited:
            edited.write(b" ")
        assert file.read_bytes() == before  # the export is the user's own
        copy.write_bytes(before)
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
    for file in (text / "language_model").iterdir():
        assert (tmp_path / "out" / file.relative_to(text)).read_bytes() == file.read_bytes()
    connector = tmp_path / "out" / "connector" / "diffusion_pytorch_model.safetensors"
    assert connector.read_bytes() == (text / "connector.safetensors").read_bytes()
    assert not (tmp_path / "out" / "tokenizer").exists()  # the base's encoder is another
    pipe = pipeline(tmp_path / "out", text_encoder=None)
    assert pipe.text_encoder is None and pipe.vae is not None
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "language_model" / "config.json").exists()
    with pytest.raises(ValueError, match="expected a converted BLIP3o-NEXT checkpoint"):
        write_export(network().state_dict(), CONFIG, tmp_path / "no", base=base, text=base)


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
