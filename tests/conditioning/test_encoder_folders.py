"""Text encoders from folders on disk: what loads, and what is said of a broken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import (
    CAPTIONS,
    CONNECTOR,
    IMAGE_TOKENS,
    QWEN,
    TOKENIZER,
    TextModel,
    blip3o,
    every_text_model,
    image_ids,
    special_tokens,
)

from emf.conditioning.blip3o import SpecialTokens
from emf.conditioning.load import load
from emf.conditioning.text import TextEncoder, sana_instruction


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder as emf convert writes it."""
    folder = tmp_path / "blip3o"
    language = folder / "language_model"
    QWEN.save_pretrained(language)
    TOKENIZER.save_pretrained(language)
    save_file(CONNECTOR.state_dict(), folder / "connector.safetensors")
    config = json.loads((language / "config.json").read_text()) | vars(special_tokens())
    (language / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_load_blip3o(checkpoint: Path) -> None:
    encoder, expected = load("blip3o", checkpoint, image_tokens=IMAGE_TOKENS), blip3o()
    rows = encoder.tokenize(CAPTIONS, image_ids()[1])
    for own, other in zip(rows, expected.tokenize(CAPTIONS, image_ids()[1]), strict=True):
        assert torch.equal(own, other)
    torch.testing.assert_close(encoder(*rows)[0], expected(*rows)[0], rtol=0, atol=0)
    assert encoder.tokens == expected.tokens
    assert load("blip3o", checkpoint, dtype=torch.bfloat16).image_tokens == 729


@every_text_model
@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_load_text_encoders(text_model: TextModel, tmp_path: Path, nested: bool) -> None:
    model, tokenizer = text_model()
    kind = {"Gemma2Model": "gemma", "CLIPTextModel": "clip", "T5EncoderModel": "t5"}[type(model).__name__]
    model.save_pretrained(tmp_path / "text_encoder" if nested else tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer" if nested else tmp_path)
    encoder = load(kind, tmp_path)
    assert encoder.length == {"gemma": 300, "clip": 77, "t5": 300}[kind]
    assert encoder.instruction == (sana_instruction() if kind == "gemma" else "")
    plain = TextEncoder(model, tokenizer, 20)
    own = load(kind, tmp_path, length=20, instruction="", lower=False)
    torch.testing.assert_close(own(*own.tokenize(CAPTIONS)), plain(*plain.tokenize(CAPTIONS)), rtol=0, atol=0)


def test_load_errors_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    language, connector = checkpoint / "language_model", checkpoint / "connector.safetensors"
    weights, config = language / "model.safetensors", language / "config.json"
    whole, fields = weights.read_bytes(), json.loads(config.read_text())

    def check(message, *arguments):
        with pytest.raises(ValueError, match=message) as raised:
            load(*arguments)
        assert "\n" not in str(raised.value)

    check("encoder 'bert'; expected one of blip3o, gemma, clip, t5, text", "bert", checkpoint)
    check("no folder .*; expected that of a t5 encoder", "t5", tmp_path / "nowhere")
    check("has no language_model and connector; .*`emf convert`", "blip3o", language)
    save_file({k: v for k, v in load_file(weights).items() if "1.mlp.up_proj" not in k}, weights, {"format": "pt"})
    check(r"model\.layers\.1\.mlp\.up_proj\.weight", "blip3o", checkpoint)
    weights.write_bytes(whole)
    kept = connector.read_bytes()
    save_file({k: v for k, v in load_file(connector).items() if k != "linear_2.bias"}, connector)
    check("is no connector of BLIP3o-NEXT", "blip3o", checkpoint)
    connector.write_bytes(kept[:40])
    check("is no connector of BLIP3o-NEXT", "blip3o", checkpoint)
    connector.write_bytes(kept)
    config.write_text(json.dumps({k: v for k, v in fields.items() if k != "image_start_tag_id"}))
    check("has no usable image_start_tag_id", "blip3o", checkpoint)
    config.write_text("{")
    check("config.json is JSON that ends too early", "blip3o", checkpoint)
    config.write_text(json.dumps(fields))
    weights.write_bytes(whole[: len(whole) // 2])
    check("is no Qwen3ForCausalLM", "blip3o", checkpoint)
    weights.unlink()
    check("holds no .*safetensors", "blip3o", checkpoint)
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (language / name).unlink()
    check("holds no usable tokenizer", "blip3o", checkpoint)


def test_special_tokens_of_a_config() -> None:
    fields = dict(image_start_tag_id=10, image_end_tag_id=11, scale_start_token_id=12, image_start_token_id=15)
    assert SpecialTokens.from_config(fields | {"hidden_size": 8}) == SpecialTokens(10, 11, 12, 15)
    counted = SpecialTokens.from_config(fields | {"scale_end_token_id": 13, "image_end_token_id": 24})
    assert (counted.num_scale_tokens, counted.num_image_tokens) == (2, 10)
    with pytest.raises(ValueError, match="no usable image_start_tag_id"):
        SpecialTokens.from_config({})
