"""Folders whose weights are a variant alone, such as bf16, as SANA's are published: every loader takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("diffusers")
import sana
from diffusers import AutoencoderDC
from exported import CONFIG, network, pipeline, write_base

from emf.conditioning.load import _model
from emf.evaluate.clip import pretrained
from emf.model.autoencoder import load_dcae
from emf.model.state import variant
from emf.weights.convert import convert
from emf.weights.converted import load_converted
from emf.weights.diffusers_folder import load_exported_transformer
from emf.weights.export import write_export
from emf.weights.tensors import find

SHARDED = pytest.mark.parametrize("size", ["10GB", "8KB"], ids=["one file", "shards"])


@SHARDED
def test_a_transformer(tmp_path: Path, size: str) -> None:
    theirs = sana.diffusers_model()
    theirs.save_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "bf16", variant="bf16", max_shard_size=size)
    assert (len(find(tmp_path / "bf16")) > 1) == (size == "8KB") and variant(tmp_path / "bf16") == "bf16"
    for name in ("plain", "bf16"):
        convert(tmp_path / name, tmp_path / f"{name}-out")
    same(load_converted(tmp_path / "plain-out")[0], load_converted(tmp_path / "bf16-out")[0])
    same(load_exported_transformer(tmp_path / "plain"), load_exported_transformer(tmp_path / "bf16"))


def test_shards_as_newer_versions_name_them(tmp_path: Path) -> None:
    sana.diffusers_model().save_pretrained(tmp_path, variant="bf16", max_shard_size="40KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.bf16.json"
    for file in find(tmp_path):
        newer = file.name.replace(".bf16-", "-").replace(".safetensors", ".bf16.safetensors")
        file.rename(tmp_path / newer)
        index.write_text(index.read_text().replace(file.name, newer))
    assert len(find(tmp_path)) > 1
    next(tmp_path.glob("*00002-of*")).unlink()
    with pytest.raises(ValueError, match=r"names 1 files that are not there; first .*00002-of"):
        find(tmp_path)


@SHARDED
def test_a_text_encoder(tmp_path: Path, size: str) -> None:
    sizes: Any = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=99)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    model.save_pretrained(tmp_path, variant="bf16", max_shard_size=size)
    same(model, _model(transformers.CLIPTextModel, tmp_path, torch.float32))
    same(model, pretrained(transformers.CLIPTextModel, str(tmp_path), "x"))


@SHARDED
def test_an_autoencoder_and_its_export(tmp_path: Path, size: str) -> None:
    base = write_base(tmp_path / "base")
    vae = AutoencoderDC.from_pretrained(base / "vae")
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(base / "vae", variant="bf16", max_shard_size=size)
    same(vae, load_dcae(base).module)
    write_export(network().state_dict(), CONFIG, tmp_path / "out", base=base)
    same(vae, load_dcae(tmp_path / "out").module)
    pipe = pipeline(tmp_path / "out", text_encoder=None, tokenizer=None)
    same(vae, pipe.vae)
    assert pipeline(tmp_path / "out", text_encoder=None, tokenizer=None, vae=None).vae is None


def test_which_variant(tmp_path: Path) -> None:
    assert variant(tmp_path) is None
    for name in (
        "model.bf16.safetensors",
        "model.safetensors.index.bf16.json",
        "model.bf16-00001-of-00002.safetensors",
    ):
        (tmp_path / name).touch()
        assert variant(tmp_path) == "bf16"
    (tmp_path / "model.fp16.safetensors").touch()
    with pytest.raises(ValueError, match="holds them as bf16 and as fp16; keep one of these"):
        variant(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert variant(tmp_path) is None and [file.name for file in find(tmp_path)] == ["model.safetensors"]


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())
