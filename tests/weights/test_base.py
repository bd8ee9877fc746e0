"""A converted folder is used as a run is: sampled, exported, compared; and runs and exports can be started from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
import sana
from image_files import small_autoencoder
from same_pictures import assert_same_pictures
from tiny import byte_tokenizer

from emf.analyze.choices import Sampling
from emf.analyze.names import parse_runs
from emf.analyze.steps import run_steps
from emf.cli.generate import generate
from emf.cli.weights import export
from emf.config import ConditionConfig, Config, to_json
from emf.evaluate.drawing import Drawing
from emf.evaluate.pictures import draw_pictures, geneval_items
from emf.model.sizes import TransformerConfig
from emf.network.build import build
from emf.recipes import RECIPES, digits, digits_base
from emf.weights.convert import convert
from emf.weights.folders import load
from emf.weights.start import started, with_encoder
from emf.weights.tensors import items, write_file

CAPTIONS = ("a red cat", "two dogs")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder as SANA's are, with a T5."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sana.diffusers_model().save_pretrained(folder / "transformer")
    tokenizer = byte_tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
    config = T5Config(vocab_size=len(tokenizer), d_model=20, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    small_autoencoder().save_pretrained(folder / "vae")
    index = {"_class_name": "SanaPipeline", "vae": ["diffusers", "AutoencoderDC"]}
    index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def start(published: Path) -> Path:
    convert(published, published.parent / "start")
    return published.parent / "start"


def test_a_base_draws_what_was_published(published: Path, start: Path, tmp_path: Path) -> None:
    """Before and after conversion, and out of an export: how a user checks a conversion."""
    for name, folder in (("before", published), ("after", start)):
        generate(CAPTIONS, folder, tmp_path / name, steps=2, flow_matching=True)
    assert_same_pictures(tmp_path / "before", tmp_path / "after")
    first, second = (np.asarray(Image.open(file)).astype(float) for file in sorted((tmp_path / "after").glob("*.png")))
    assert abs(first - second).max() > 1
    export(start, tmp_path / "out", dtype="float32")
    generate(CAPTIONS, tmp_path / "out", tmp_path / "exported", steps=2, flow_matching=True)
    assert_same_pictures(tmp_path / "before", tmp_path / "exported")
    with pytest.raises(ValueError, match="say --flow-matching"):  # its time embedders were made, not trained
        generate(CAPTIONS, start, tmp_path / "none")


def test_a_base_is_evaluated_and_compared(published: Path, start: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    runs = parse_runs([f"published={published}", f"start={start}"])
    panels = run_steps(runs, tmp_path / "few", Sampling(steps=(1, 2)), prompts=tmp_path / "prompts.txt")
    psnr = {name: line[1].mean for name, line in panels["PSNR, dB"].items()}
    assert psnr["start"] == pytest.approx(psnr["published"], abs=0.1)
    (tmp_path / "metadata.jsonl").write_text('{"prompt": "a red cat", "tag": "x", "include": []}\n')
    found, texts = geneval_items(tmp_path / "metadata.jsonl")
    drawing = Drawing(start, steps=(1,), flow_matching=True, images_only=True)
    draw_pictures(found, texts, tmp_path / "drawn", drawing, "cpu")
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4


def test_a_base_without_its_text_encoder_says_so(published: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone"
    sana.diffusers_model().save_pretrained(source)
    convert(source, tmp_path / "start")
    with pytest.raises(ValueError, match=f"{tmp_path}/start holds no text encoder, and neither does {source}"):
        load(tmp_path / "start")


@pytest.mark.parametrize("released", [False, True])
def test_a_blip3o_base_has_its_own_text_parts(tmp_path: Path, released: bool) -> None:
    model, more = sana.diffusers_model(), {}
    if released:
        embed = model.time_embed.state_dict()
        more = {f"time_embed_{b}.{k}": v + 1 for b in "tr" for k, v in embed.items()}
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>"]
    tokenizer = byte_tokenizer(special + [f"<I{i}>" for i in range(50)], pad_token="<pad>", eos_token="<|im_end|>")
    sana.blip3o(tmp_path / "a", model, tied=True, extras=True, more=more, tokenizer=tokenizer)
    model.save_config(tmp_path / "sana")
    convert(tmp_path / "a", tmp_path / "start", config=tmp_path / "sana" / "config.json", shard_gb=1e-5)
    assert len(list((tmp_path / "start").rglob("*-of-*.safetensors"))) > 20  # and read below, the connector whole
    config, network = load(tmp_path / "start")
    assert config.condition == ConditionConfig("blip3o", tmp_path / "start")
    assert config.objective == ("meanflow" if released else "flow_matching")
    assert config.transformer.dual_time == released == hasattr(network.transformer, "time_embed_t")


def run_of(config: Config, folder: Path, seed: int) -> dict[str, Any]:
    """A run's folder with one checkpoint; its weights."""
    torch.manual_seed(seed)
    checkpoint = folder / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    state = {k: v.clone() for k, v in build(config).state_dict().items()}
    write_file(checkpoint / "model.safetensors", items(state))
    for place in (checkpoint, folder):
        (place / "config.json").write_text(to_json(config))
    return state


def small(config: Config, **changes: Any) -> Config:
    sizes = dict(num_layers=1, num_attention_heads=2, num_cross_attention_heads=1, **changes)
    return replace(config, transformer=replace(config.transformer, **sizes))


def test_a_run_starts_from_a_run(tmp_path: Path) -> None:
    state = run_of(small(digits_base()), tmp_path / "base", 1)
    for source in (tmp_path / "base", tmp_path / "base" / "checkpoints" / "step_0000001"):
        got = started(replace(small(digits()), init=source)).state_dict()
        assert all(torch.equal(got[k], v) for k, v in state.items())
    trained = run_of(small(digits()), tmp_path / "trained", 2)
    got = started(replace(small(digits()), init=tmp_path / "trained")).state_dict()
    assert got.keys() == trained.keys() and all(torch.equal(got[k], v) for k, v in trained.items())
    with pytest.raises(ValueError, match="say --transformer.time-scale 10.0$"):
        started(replace(small(digits(), time_scale=1.0), init=tmp_path / "trained"))
    with pytest.raises(ValueError, match="say --transformer.num-layers 1$"):
        started(
            replace(
                small(digits()),
                init=tmp_path / "trained",
                transformer=replace(small(digits()).transformer, num_layers=2),
            )
        )
    (tmp_path / "nothing").mkdir()
    with pytest.raises(
        ValueError, match="nothing is neither a run with a checkpoint, nor from emf convert or emf export"
    ):
        started(replace(small(digits()), init=tmp_path / "nothing"))


def test_a_run_starts_from_a_base_or_its_export(published: Path, start: Path, tmp_path: Path) -> None:
    sizes = TransformerConfig(**sana.OURS, dual_time=True)
    gemma = replace(RECIPES["sana-1.5-gemma"](), transformer=sizes, trained=())
    config = replace(gemma, condition=ConditionConfig("t5", published), init=start)
    want = started(config).transformer.state_dict()
    export(start, tmp_path / "out", dtype="float32")
    exported = replace(config, init=tmp_path / "out", condition=ConditionConfig("t5"))
    assert with_encoder(exported).condition.folder == tmp_path / "out"
    got = started(with_encoder(exported)).transformer.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], v) for k, v in want.items())
    # a run that was begun there, which says where its encoder lies
    checkpoint = tmp_path / "run"
    checkpoint.mkdir()
    write_file(checkpoint / "model.safetensors", items({f"transformer.{k}": v for k, v in want.items()}))
    (checkpoint / "config.json").write_text(to_json(config))
    again = with_encoder(replace(config, init=checkpoint, condition=ConditionConfig("t5")))
    assert again.condition.folder == published
    assert torch.equal(started(again).transformer.state_dict()["proj_out.weight"], want["proj_out.weight"])


def test_how_the_time_embedders_were_made_is_not_said_in_vain(start: Path, published: Path) -> None:
    sizes = TransformerConfig(**sana.OURS, dual_time=True)
    config = replace(RECIPES["sana-1.5-gemma"](), transformer=sizes, trained=(), init=start, embedder_init="preserve")
    with pytest.raises(ValueError, match="say --embedder-init duplicate, or convert with --embedder-init preserve$"):
        started(replace(config, condition=ConditionConfig("t5", published)))
