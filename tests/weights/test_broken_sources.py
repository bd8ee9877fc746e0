"""What of a published checkpoint does not fit, or is broken, is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("diffusers")
import sana

from emf.weights.convert import convert
from emf.weights.converted import load_converted, read_converted


@pytest.fixture(scope="module")
def theirs() -> Any:
    return sana.diffusers_model()


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
    source = sana.saved(theirs, tmp_path / "a", "pth")
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
    ours, checkpoint = load_converted(tmp_path / "out")
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
    "not JSON": (lambda p: (p / "config.json").write_text("{"), "is JSON that ends too early"),
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
    assert read_converted(tmp_path / "out").language_model["tie_word_embeddings"] is True


def test_reading_another_folder_is_one_line(tmp_path: Path, theirs: Any) -> None:
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="no converted checkpoint"):
        load_converted(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "out")
    file = tmp_path / "out" / "transformer.safetensors"
    state = load_file(file)
    state.pop("proj_out.bias")
    save_file(state, file)
    with pytest.raises(ValueError, match="1 tensors are not as config.json says; first proj_out.bias"):
        load_converted(tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match="has no transformer.safetensors"):
        load_converted(tmp_path / "out")
