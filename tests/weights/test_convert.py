"""Every published layout becomes our transformer, with the velocity that its own class computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")
import sana

from emf.conditioning.small import Connector
from emf.model.transformer import Transformer
from emf.weights import layouts
from emf.weights.branches import add_time_branches
from emf.weights.convert import convert
from emf.weights.converted import load_converted, read_converted


@pytest.fixture(scope="module")
def theirs() -> Any:
    return sana.diffusers_model()


@torch.no_grad()
def agrees(folder: Path, model: Any) -> Transformer:
    """The converted transformer, whose flow-matching velocity is that of diffusers' model."""
    ours, checkpoint = load_converted(folder)
    z, t, c = sana.inputs()
    want = sana.velocity(model)
    off = (ours(z, t, None, c) - want).norm() / want.norm()
    assert off < 1e-5
    assert ours.config == checkpoint.transformer and ours.config.dual_time
    return ours


def branches(model: Transformer) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith(("time_embed_t.", "time_embed_r."))}


KINDS = ["single", "file", "no config", "sharded", "pipeline", "pth", "legacy pth", "pth in a repository"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qk_norm", ["rms_norm_across_heads", None])
def test_a_sana_computes_what_it_did(tmp_path: Path, kind: str, qk_norm: str | None) -> None:
    model = sana.diffusers_model(qk_norm=qk_norm)
    source = sana.saved(model, tmp_path / "source", kind)
    sizes = next(iter(tmp_path.rglob("sizes.json")), None)
    said = convert(source, tmp_path / "out", config=sizes)
    assert ("original SANA" if "pth" in kind else "diffusers SANA") in said and "EMF" not in said
    ours = agrees(tmp_path / "out", model)
    embed = ours.time_embed.state_dict()
    for branch in (ours.time_embed_t, ours.time_embed_r):  # the paper's: duplicated
        for k, v in branch.state_dict().items():
            assert torch.equal(v, embed[k])
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_preserved_branches_are_those_of_a_run(tmp_path: Path, theirs: Any, time_scale: float) -> None:
    theirs.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "out", embedder_init="preserve", time_scale=time_scale)
    ours = agrees(tmp_path / "out", theirs)
    assert ours.config.time_scale == time_scale
    state = {f"transformer.{k}": v for k, v in theirs.state_dict().items()}
    want = add_time_branches(state, ours.config, "preserve")
    for k, v in branches(ours).items():
        torch.testing.assert_close(v, want[f"transformer.{k}"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("released", [True, False])
def test_a_blip3o_next_folder(tmp_path: Path, theirs: Any, tied: bool, extras: bool, released: bool) -> None:
    from transformers import AutoModelForCausalLM

    g, more = torch.Generator().manual_seed(3), {}
    if released:
        embed = theirs.time_embed.state_dict()
        more = {f"time_embed_{b}.{k}": torch.randn(v.shape, generator=g) for b in "tr" for k, v in embed.items()}
    language = sana.blip3o(tmp_path / "a", theirs, tied=tied, extras=extras, more=more)
    theirs.save_config(tmp_path / "sana")
    out = tmp_path / "out"
    said = convert(tmp_path / "a", out, config=tmp_path / "sana" / "config.json")
    assert "BLIP3o-NEXT" in said and ("EMF" in said) == released
    ours = agrees(out, theirs)
    if released:
        for k, v in branches(ours).items():
            assert torch.equal(v, more[k])
    checkpoint = read_converted(out)
    assert checkpoint.tokens == sana.TOKENS and not checkpoint.missing
    assert checkpoint.connector == dict(in_channels=24, out_channels=20)
    connector = Connector(24, 20)
    connector.load_state_dict(load_file(out / "connector.safetensors"))
    states = torch.randn(2, 3, 24, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(connector(states), sana.connected(tmp_path / "a", states))
    assert ("without the 2 of its autoencoder and image tokenizer" in said) == extras
    assert not (out / "vae").exists() and not (out / "ta_tok").exists()  # which nothing could read
    assert (out / "language_model" / "tokenizer_config.json").exists()
    read, info = AutoModelForCausalLM.from_pretrained(out / "language_model", output_loading_info=True)
    assert type(read).__name__ == "Qwen3ForCausalLM" and not info["missing_keys"] and not info["unexpected_keys"]
    assert all(getattr(read.config, k) == v for k, v in sana.TOKENS.items())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, language(ids).logits, rtol=0, atol=0)


def test_a_released_emf_transformer_alone(tmp_path: Path, theirs: Any) -> None:
    g = torch.Generator().manual_seed(4)
    embed = theirs.time_embed.state_dict()
    more = {f"time_embed_{b}.{k}": torch.randn(v.shape, generator=g) for b in "tr" for k, v in embed.items()}
    theirs.save_pretrained(tmp_path / "a")
    save_file(theirs.state_dict() | more, tmp_path / "a" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="--embedder-init has no effect: .*a has its time embedders already"):
        convert(tmp_path / "a", tmp_path / "out", embedder_init="preserve")  # there is nothing to make
    assert "EMF" in convert(tmp_path / "a", tmp_path / "out")
    for k, v in branches(agrees(tmp_path / "out", theirs)).items():
        assert torch.equal(v, more[k])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_and_shards(tmp_path: Path, theirs: Any, dtype: str) -> None:
    theirs.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "out", dtype=dtype, shard_gb=2e-5)  # type: ignore[arg-type]
    files = sorted((tmp_path / "out").glob("transformer-*.safetensors"))
    index = json.loads((tmp_path / "out" / "transformer.safetensors.index.json").read_text())
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
        assert file.stat().st_size < 2e-5 * 1e9 + 4096 or len(load_file(file)) == 1
    assert len(files) > 2 and index["weight_map"].keys() == state.keys()
    assert {v.dtype for v in state.values()} == {getattr(torch, dtype)}
    for k, v in theirs.state_dict().items():
        assert torch.equal(state[k], v.to(getattr(torch, dtype)))
    assert load_converted(tmp_path / "out")[0].proj_out.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["blip3o", "pth", "no config"])
def test_sizes_need_no_config_at_a_published_width(tmp_path: Path, theirs: Any, monkeypatch: Any, kind: str) -> None:
    monkeypatch.setitem(layouts.CROSS_HEADS, 32, 2)
    monkeypatch.setattr(layouts, "HEAD", 8)
    if kind == "blip3o":
        sana.blip3o(source := tmp_path / "a", theirs, tied=True, extras=True)
    else:
        source = sana.saved(theirs, tmp_path / "a", kind)
    convert(source, tmp_path / "out")
    agrees(tmp_path / "out", theirs)


def test_a_kill_leaves_a_part_that_the_next_call_replaces(tmp_path: Path, theirs: Any, monkeypatch: Any) -> None:
    theirs.save_pretrained(tmp_path / "a")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("emf.weights.tensors.write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "a", tmp_path / "out")
    assert (tmp_path / "out.part").is_dir() and not (tmp_path / "out").exists()
    convert(tmp_path / "a", tmp_path / "out")
    agrees(tmp_path / "out", theirs)
    assert not (tmp_path / "out.part").exists() and not (tmp_path / "out" / ".emf-part").exists()


PEAK = """
import re, sys
from pathlib import Path
from emf.weights.convert import convert

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, big, out = map(Path, sys.argv[1:])
for dtype in (None, "bfloat16"):
    convert(small, out / f"first {dtype}", dtype=dtype)
for dtype in (None, "bfloat16"):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is held
    convert(big, out / f"second {dtype}", dtype=dtype)
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_peak_memory_is_a_shard(tmp_path: Path, theirs: Any) -> None:
    """Over that of converting next to nothing; kept and cast."""
    import diffusers

    theirs.save_pretrained(tmp_path / "small")
    wide = dict(num_attention_heads=16, attention_head_dim=32, num_cross_attention_heads=4, cross_attention_dim=512)
    with torch.device("meta"):  # no time for initialising
        model = diffusers.SanaTransformer2DModel(
            **sana.SIZES | wide | dict(cross_attention_head_dim=128, num_layers=11, caption_channels=256)
        )
    model.to_empty(device="cpu").save_pretrained(tmp_path / "big", max_shard_size="50MB")
    shards = [f.stat().st_size for f in (tmp_path / "big").glob("*.safetensors")]
    assert len(shards) >= 4 and sum(shards) > 180e6
    command = [sys.executable, "-c", PEAK, *map(str, (tmp_path / "small", tmp_path / "big", tmp_path))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 2 and 0 < max(peaks) <= 1.1 * max(shards), (peaks, shards)
