"""Every published layout becomes our transformer, with the velocity that its own class computes; what does not fit is
one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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
from emf.model.transformer import Transformer, TransformerConfig
from emf.weights import layouts
from emf.weights.branches import add_time_branches
from emf.weights.convert import convert
from emf.weights.folders import load_transformer, read_checkpoint
from emf.weights.layouts import SANA, Layout, infer, read_config


@pytest.fixture(scope="module")
def theirs() -> Any:
    return sana.diffusers_model()


@torch.no_grad()
def agrees(folder: Path, model: Any) -> Transformer:
    """The converted transformer, whose flow-matching velocity is that of diffusers' model."""
    ours, checkpoint = load_transformer(folder)
    z, t, c = sana.inputs()
    want = sana.velocity(model)
    off = (ours(z, t, None, c) - want).norm() / want.norm()
    assert off < 1e-5
    assert ours.config == checkpoint.transformer and ours.config.dual_time
    return ours


def branches(model: Transformer) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith(("time_embed_t.", "time_embed_r."))}


def saved(model: Any, folder: Path, kind: str) -> Path:
    """A checkpoint of one of the kinds; what to convert."""
    if kind in ("single", "file", "no config"):
        model.save_pretrained(folder)
        if kind == "no config":
            (folder / "config.json").rename(folder.parent / "sizes.json")
        return folder if kind != "file" else folder / "diffusion_pytorch_model.safetensors"
    if kind in ("sharded", "pipeline"):
        model.save_pretrained(folder / "transformer", max_shard_size="40KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
        return folder if kind == "pipeline" else folder / "transformer"
    state = sana.original_state(model)
    folder = folder / "checkpoints" if kind == "pth in a repository" else folder
    folder.mkdir(parents=True)
    legacy = kind == "legacy pth"
    torch.save(
        {"state_dict": state} if not legacy else state, folder / "x.pth", _use_new_zipfile_serialization=not legacy
    )
    model.save_config(folder.parent / "config")
    (folder.parent / "config" / "config.json").rename(folder.parent / "sizes.json")
    return folder.parent if kind == "pth in a repository" else folder / "x.pth"


KINDS = ["single", "file", "no config", "sharded", "pipeline", "pth", "legacy pth", "pth in a repository"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qk_norm", ["rms_norm_across_heads", None])
def test_a_sana_computes_what_it_did(tmp_path: Path, kind: str, qk_norm: str | None) -> None:
    model = sana.diffusers_model(qk_norm=qk_norm)
    source = saved(model, tmp_path / "source", kind)
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
    checkpoint = read_checkpoint(out)
    assert checkpoint.tokens == sana.TOKENS and not checkpoint.missing
    assert checkpoint.connector == dict(in_channels=24, out_channels=20)
    connector = Connector(24, 20)
    connector.load_state_dict(load_file(out / "connector.safetensors"))
    states = torch.randn(2, 3, 24, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(connector(states), sana.connected(tmp_path / "a", states))
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").exists() == extras
    assert (out / "ta_tok").exists() == extras
    if extras:
        assert load_file(out / "ta_tok" / "model.safetensors").keys() == {"encode_task_layer.0.weight"}
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
    assert "EMF" in convert(tmp_path / "a", tmp_path / "out", embedder_init="preserve")  # there is nothing to make
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
    assert load_transformer(tmp_path / "out")[0].proj_out.weight.dtype == torch.float32


PUBLISHED = {
    "0.6B": dict(num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72),
    "1.6B": dict(num_layers=20),
    "4.8B": dict(num_layers=60),
}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kind", ["diffusers", "blip3o", "pth"])
def test_published_sizes_are_read_from_shapes(size: str, qk_norm: bool, kind: str) -> None:
    config = TransformerConfig(**PUBLISHED[size], qk_norm=qk_norm)
    layout = {"diffusers": Layout(), "blip3o": Layout(SANA), "pth": Layout(original=True)}[kind]
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    if kind == "pth":
        model = type("Model", (), {"state_dict": lambda self: state, "config": config})()
        shapes = {k: tuple(v.shape) for k, v in sana.original_state(model).items()}
    else:
        shapes = {layout.prefix + k: tuple(v.shape) for k, v in state.items()}
    assert infer(shapes, layout, Path("x")) == config


@pytest.mark.parametrize("kind", ["blip3o", "pth", "no config"])
def test_sizes_need_no_config_at_a_published_width(tmp_path: Path, theirs: Any, monkeypatch: Any, kind: str) -> None:
    monkeypatch.setitem(layouts.CROSS_HEADS, 32, 2)
    monkeypatch.setattr(layouts, "HEAD", 8)
    if kind == "blip3o":
        sana.blip3o(source := tmp_path / "a", theirs, tied=True, extras=True)
    else:
        source = saved(theirs, tmp_path / "a", kind)
    convert(source, tmp_path / "out")
    agrees(tmp_path / "out", theirs)


Change = Callable[[dict[str, Tensor]], Any]
FAULTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda s: s.pop("proj_out.bias"), r"1 missing \(proj_out.bias\); name in --allow-missing"),
    "extra": (lambda s: s.update(other=torch.zeros(1)), r"1 extra \(other\)"),
    "misshaped": (
        lambda s: s.update({"proj_out.bias": torch.zeros(5)}),
        r"1 misshaped \(proj_out.bias \[5\] for \[4\]\)",
    ),
    "many": (
        lambda s: [s.pop(k) for k in [*s] if "blocks.1" in k],
        r"23 missing \(transformer_blocks.1.* and 3 more\)",
    ),
    "one branch": (lambda s: s.update({"time_embed_t.linear.bias": torch.zeros(192)}), "11 missing"),
    "another model": (lambda s: [s.pop(k) for k in [*s]] and s.update(a=torch.zeros(1)), "is no SANA transformer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line(tmp_path: Path, theirs: Any, fault: str) -> None:
    change, message = FAULTS[fault]
    theirs.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(ValueError, match=message) as error:
        convert(tmp_path / "a", tmp_path / "out")
    assert "\n" not in str(error.value) and not [*tmp_path.glob("out*")]


def test_faults_of_a_pth_have_its_names(tmp_path: Path, theirs: Any) -> None:
    source = saved(theirs, tmp_path / "a", "pth")
    state = torch.load(source)["state_dict"]
    state.pop("blocks.1.cross_attn.kv_linear.bias")
    state["blocks.0.attn.qkv.weight"] = torch.zeros(95, 32)
    state["cfg_embedder.mlp.0.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, source)
    message = (
        r"1 missing \(blocks.1.cross_attn.kv_linear.bias\), 1 extra \(cfg_embedder.*, 1 misshaped \(blocks.0.attn.qkv"
    )
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", config=tmp_path / "sizes.json")


def test_allowed_faults(tmp_path: Path, theirs: Any) -> None:
    theirs.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | {"other.a": torch.zeros(1), "proj_out.bias": torch.zeros(5)}
    state.pop("caption_norm.weight")
    save_file(state, file)
    allowed = dict(allow_missing=["caption_*"], allow_extra=["other.*"], allow_misshaped=["proj_out.bias"])
    for one in allowed:
        with pytest.raises(ValueError, match=one.removeprefix("allow_")):
            convert(tmp_path / "a", tmp_path / "out", **{k: v for k, v in allowed.items() if k != one})  # type: ignore[arg-type]
    convert(tmp_path / "a", tmp_path / "out", **allowed)  # type: ignore[arg-type]
    ours, checkpoint = load_transformer(tmp_path / "out")
    assert sorted(checkpoint.missing["transformer"]) == ["caption_norm.weight", "proj_out.bias"]
    assert torch.equal(ours.caption_norm.weight, torch.ones(32))
    assert torch.equal(ours.proj_out.weight, theirs.proj_out.weight) and "other.a" not in ours.state_dict()


def truncate(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(tree | changes))

    return change


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "is not a whole safetensors file"),
    "empty": (lambda p: [f.unlink() for f in p.iterdir()], "holds no weights; expected a diffusers SANA folder"),
    "no config": (lambda p: (p / "config.json").unlink(), "is 32 wide, which tells no number of heads"),
    "not JSON": (lambda p: (p / "config.json").write_text("{"), "is not JSON"),
    "two sets": (lambda p: (p / "model.safetensors").touch(), "holds 2 sets of weights"),
    "Sprint": (edit(guidance_embeds=True), "guidance_embeds True is not supported; expected False"),
    "norm": (edit(qk_norm="layer_norm"), "qk_norm 'layer_norm' is not known"),
    "unknown": (edit(new_field=1), "new_field is not known here"),
    "class": (edit(_class_name="FluxTransformer2DModel"), "is of FluxTransformer2DModel"),
    "layers": (edit(num_layers=3), "23 missing"),
    "heads": (edit(num_layers="2"), "num_layers '2'; expected a whole number"),
    "width": (edit(cross_attention_dim=33), "cross_attention_dim 33 is not the width 32"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_line(tmp_path: Path, theirs: Any, kind: str) -> None:
    change, message = BROKEN[kind]
    theirs.save_pretrained(tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as error:
        convert(tmp_path / "a", tmp_path / "out")
    assert "\n" not in str(error.value) and not [*tmp_path.glob("out*")]


def test_other_broken_sources(tmp_path: Path, theirs: Any) -> None:
    def refused(source: Path, message: str, out: str = "out") -> None:
        with pytest.raises(ValueError, match=message) as error:
            convert(source, tmp_path / out)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "no file or folder")
    (tmp_path / "a.txt").touch()
    refused(tmp_path / "a.txt", "of no known kind")
    (tmp_path / "a.pth").write_bytes(b"PK, no more")
    refused(tmp_path / "a.pth", "cannot be read as tensors")
    (tmp_path / "b.pth").write_bytes(b"neither")
    refused(tmp_path / "b.pth", "cannot be read as tensors")
    torch.save([torch.zeros(1)], tmp_path / "c.pth")
    refused(tmp_path / "c.pth", "holds no state dict")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    next((tmp_path / "sharded").glob("*-00002-of*")).unlink()
    refused(tmp_path / "sharded", "names 1 files that are not there; first diffusion_pytorch_model-00002")
    theirs.save_pretrained(tmp_path / "good")
    (tmp_path / "taken").mkdir()
    refused(tmp_path / "good", "taken exists", "taken")
    (tmp_path / "mine.part").mkdir()
    refused(tmp_path / "good", "in the way and not ours", "mine")
    sana.blip3o(tmp_path / "blip", theirs, tied=False, extras=False)
    refused(tmp_path / "blip", "is 32 wide")


def test_broken_blip3o_configs(tmp_path: Path, theirs: Any) -> None:
    theirs.save_config(tmp_path / "sana")
    sana.blip3o(tmp_path / "a", theirs, tied=False, extras=False)
    good = json.loads((tmp_path / "a" / "config.json").read_text())

    def refused(changes: dict[str, Any], message: str) -> None:
        tree = {k: v for k, v in (good | changes).items() if v != "gone"}
        (tmp_path / "a" / "config.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=message) as error:
            convert(tmp_path / "a", tmp_path / "out", config=tmp_path / "sana" / "config.json")
        assert "\n" not in str(error.value)

    refused(dict(image_start_tag_id="gone", image_start_token_id=None), "no image_start_tag_id, image_start_token_id")
    refused(dict(image_start_token_id=64), "image_start_token_id 64; expected token ids below vocab_size 64")
    refused(dict(vocab_size=70), "misshaped .*embed_tokens")
    refused(dict(hidden_size="wide"), "makes no Qwen3")
    refused(dict(num_hidden_layers=3, layer_types=["full_attention"] * 3), r"11 missing \(model.layers.2")


def test_a_head_that_was_not_saved(tmp_path: Path, theirs: Any) -> None:
    """A config that does not say: the head is the embedding. One that says the head is its own: it is missing."""
    theirs.save_config(tmp_path / "sana")
    sana.blip3o(tmp_path / "a", theirs, tied=True, extras=False)
    config = tmp_path / "a" / "config.json"
    tree: dict[str, Any] = json.loads(config.read_text())
    config.write_text(json.dumps(tree | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\)"):
        convert(tmp_path / "a", tmp_path / "out", config=tmp_path / "sana" / "config.json")
    tree.pop("tie_word_embeddings")
    config.write_text(json.dumps(tree))
    convert(tmp_path / "a", tmp_path / "out", config=tmp_path / "sana" / "config.json")
    assert read_checkpoint(tmp_path / "out").language_model["tie_word_embeddings"] is True


def test_a_kill_leaves_a_part_that_the_next_call_replaces(tmp_path: Path, theirs: Any, monkeypatch: Any) -> None:
    theirs.save_pretrained(tmp_path / "a")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("emf.weights.tensors._write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "a", tmp_path / "out")
    assert (tmp_path / "out.part").is_dir() and not (tmp_path / "out").exists()
    convert(tmp_path / "a", tmp_path / "out")
    agrees(tmp_path / "out", theirs)
    assert not (tmp_path / "out.part").exists() and not (tmp_path / "out" / ".emf-part").exists()


def test_reading_another_folder_is_one_line(tmp_path: Path, theirs: Any) -> None:
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="no converted checkpoint"):
        load_transformer(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "out")
    file = tmp_path / "out" / "transformer.safetensors"
    state = load_file(file)
    state.pop("proj_out.bias")
    save_file(state, file)
    with pytest.raises(ValueError, match="1 tensors are not as config.json says; first proj_out.bias"):
        load_transformer(tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match="has no transformer.safetensors"):
        load_transformer(tmp_path / "out")


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


def test_read_config_and_its_inverse(tmp_path: Path, theirs: Any) -> None:
    theirs.save_config(tmp_path)
    config = read_config(tmp_path / "config.json")
    assert config == TransformerConfig(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        caption_channels=20,
        sample_size=8,
    )
