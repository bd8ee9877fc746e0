"""Whatever a file of weights or of their settings holds: weights, or a ValueError of one line that names the file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from damaged import changed, damaged, holds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import ta_tok_file, tiny_sana

from emf import config as configs
from emf.conditioning.ta_tok import load_ta_tok
from emf.config import ZeroConfig
from emf.evaluate.hps import load_clip
from emf.files import read_object
from emf.model.state import read_state
from emf.recipes import digits, from_file
from emf.train.zero.settings import engine_config
from emf.weights import checkpoints
from emf.weights.adapter_settings import scale_of
from emf.weights.converted import read_converted
from emf.weights.export import _index
from emf.weights.folders import text_parts
from emf.weights.layouts import read_config, to_diffusers
from emf.weights.lora import DIFFUSERS, FULL, PEFT, PEFT_SETTINGS, read_adapters
from emf.weights.tensors import Weights, find, read_metadata, shards

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.int8)}
SAFE = safetensors.torch.save(STATE, {"format": "pt"})


def pickled(tree: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file, **how)
    return file.getvalue()


PICKLES = [pickled({"state_dict": STATE}), pickled(STATE, _use_new_zipfile_serialization=False)]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a test."""
    return tmp_path_factory.getbasetemp()


def read_all(file: Path) -> None:
    weights = Weights([file])
    assert all(weights.read(k).shape == e.shape for k, e in weights.entries.items()) and weights.bytes >= 0


@settings(max_examples=150)
@given(data=st.binary(max_size=80) | damaged([SAFE]))
def test_any_safetensors(data: bytes, folder: Path) -> None:
    file = folder / "any.safetensors"
    file.write_bytes(data)
    for read in (read_all, read_state, read_metadata):
        holds(lambda read=read: read(file), "any.safetensors")


HEAD = json.loads(SAFE[8 : 8 + int.from_bytes(SAFE[:8], "little")])


@settings(max_examples=150)
@given(tree=changed([HEAD]))
@example(tree=HEAD | {"a": HEAD["a"] | {"dtype": "U32"}})  # which torch has, and no network
def test_any_header_of_safetensors(tree: Any, folder: Path) -> None:
    file, head = folder / "any.safetensors", json.dumps(tree).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + SAFE[-25:])
    for read in (read_all, read_state, read_metadata):
        holds(lambda read=read: read(file), "any.safetensors")


@settings(max_examples=100)
@given(data=st.binary(max_size=80) | damaged(PICKLES))
def test_any_pickle(data: bytes, folder: Path) -> None:
    file = folder / "any.pth"
    file.write_bytes(data)
    holds(lambda: read_all(file), "any.pth")
    holds(lambda: load_ta_tok(file), "any.pth")
    holds(lambda: load_clip(file), "any.pth")


TREES = [{"state_dict": {"a": [1.0]}}, {"model": {"args": {"bottleneck": {"args": {}}}, "sd": {"a": 1}}}]


@settings(max_examples=50)
@given(tree=changed(TREES))
def test_any_pickled_tree(tree: Any, folder: Path) -> None:
    file = folder / "any.pth"
    torch.save(tree, file)
    for read in (read_all, load_ta_tok, load_clip):
        holds(lambda read=read: read(file), "any.pth")


@settings(max_examples=20)
@given(changes=changed([{"bottleneck": {"args": {"regularizer": {"args": {}}}}, "input_size": 24, "pool_scale": 1}]))
def test_any_arguments_of_an_image_tokenizer(changes: Any, folder: Path) -> None:
    file = folder / "any.pth"
    state = ta_tok_file(file)
    torch.save({"model": {"args": changes, "sd": state}}, file)
    holds(lambda: load_ta_tok(file, heads=2), "any.pth")


SIZES = tiny_sana()
SOURCE = {"path": "/base", "layout": "diffusers SANA", "embedder_init": "duplicate"}
CONVERTED = {"transformer": asdict(SIZES), "source": SOURCE, "missing": {"transformer": ["proj_out.bias"]}}
CONVERTED |= {"language_model": {"hidden_size": 8}, "tokens": {"image_start_tag_id": 3}, "connector": {}}
PIPELINE = {"_class_name": "SanaPipeline", "vae": ["diffusers", "AutoencoderDC"], "transformer": ["diffusers", "x"]}
PIPELINE |= {"text_encoder": ["transformers", "Gemma2Model"], "_condition": {"kind": "gemma", "scale": 1}}
ADAPTERS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}
ADAPTERS |= {"target_modules": ["to_q"], "modules_to_save": None, "init_lora_weights": True}
DEEPSPEED = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2, "overlap_comm": True}}
DEEPSPEED |= {"bf16": {"enabled": False}, "optimizer": {"params": {"betas": [0.9, 0.95], "eps": 1e-8}}}


def derived(file: Path) -> Any:
    """What an engine takes from the DeepSpeed dict of a run with its own JSON."""
    told = engine_config(replace(digits(), zero=ZeroConfig(json=file)), 1)
    return told["zero_optimization"]["stage"], told["bf16"]["enabled"], float(told["gradient_clipping"])


Read = Callable[[Path], Any]
FILES: dict[str, tuple[Any, Read]] = {
    "model.safetensors.index.json": ({"metadata": {}, "weight_map": {"a": "any.bin", "b": "any.bin"}}, shards),
    "config.json": (to_diffusers(SIZES), read_config),
    "converted/config.json": (CONVERTED, lambda file: read_converted(file.parent).made),
    "checkpoint.json": ({"step": 3, "world": 2, "stage": 1}, lambda file: checkpoints.read_made(file.parent)),
    "model_index.json": (PIPELINE, lambda file: (text_parts(file.parent), _index(file.parent, None))),
    "adapter_config.json": (ADAPTERS, lambda file: scale_of(read_object(file, "lora"), 2, file)),
    "deepspeed.json": (DEEPSPEED, derived),
}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=100)
@given(data=st.data())
def test_any_settings(name: str, data: st.DataObject, folder: Path) -> None:
    whole, read = FILES[name]
    file = folder / "any" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / "any.bin").touch()
    for part in ("vae", "text_encoder"):
        (file.parent / part).mkdir(exist_ok=True)
    file.write_text(json.dumps(whole))
    read(file)
    if data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(changed([whole]))))
    else:
        file.write_bytes(data.draw(damaged([json.dumps(whole).encode()])))
    holds(lambda: read(file), str(file.parent))


@settings(max_examples=20)
@given(data=st.data())
def test_any_config_of_a_run(data: st.DataObject, folder: Path) -> None:
    file = folder / "config.json"
    tree = json.loads(configs.to_json(digits()))
    file.write_text(json.dumps(data.draw(changed([tree]))))
    holds(lambda: from_file(file), "config.json")


STRANGE: dict[str, dict[str, Any]] = {
    r"recipe is \[\]; expected one of": {"recipe": []},
    "help is not known": {"help": True},
    "other is not known": {"other": {}},
    "optim.other is not known": {"optim": {"other": {}}},
    "run holds --help": {"run": {"prompts": ["--help"], "eval_every": 1}},
}


@pytest.mark.parametrize("says", STRANGE)
def test_a_config_that_is_strange_is_one_line(says: str, tmp_path: Path) -> None:
    """Also where the parser would print a page of help, or pass over an empty section."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(configs.to_json(digits())) | STRANGE[says]))
    with pytest.raises(ValueError, match=f"^config: {file}: {says}"):
        from_file(file)


FACTORS = {"base_model.model.a.lora_A.weight": torch.ones(2, 3), "base_model.model.a.lora_B.weight": torch.ones(4, 2)}


@settings(max_examples=100)
@given(data=st.data())
def test_any_adapters(data: st.DataObject, folder: Path) -> None:
    """In peft's form and in diffusers', whose settings stand in the file's own header."""
    here = folder / "lora"
    here.mkdir(exist_ok=True)
    (here / PEFT_SETTINGS).write_text(json.dumps(data.draw(changed([ADAPTERS]))))
    (here / PEFT).write_bytes(data.draw(st.just(safetensors.torch.save(FACTORS)) | damaged([SAFE])))
    times = data.draw(changed([{"time_scale": "1.0", "base_time_scale": "1000"}]))
    told = {k: json.dumps(v).strip('"') for k, v in times.items()} if isinstance(times, dict) else {}
    (here / FULL).write_bytes(safetensors.torch.save({"time_embed_t.x": torch.ones(1)}, told))
    holds(lambda: read_adapters(here), str(here))
    (here / PEFT_SETTINGS).unlink()
    said = json.dumps({f"transformer.{k}": v for k, v in ADAPTERS.items()} | {"x": data.draw(changed([ADAPTERS]))})
    kept = data.draw(st.sampled_from([[*FACTORS], [*FACTORS][:1], [*FACTORS][1:]]))
    theirs = {k.replace("base_model.model.", "transformer."): FACTORS[k] for k in kept}
    (here / DIFFUSERS).write_bytes(safetensors.torch.save(theirs, {"lora_adapter_metadata": said}))
    holds(lambda: read_adapters(here), str(here))
    assert find(here / DIFFUSERS)
