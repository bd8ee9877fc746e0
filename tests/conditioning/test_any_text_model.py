"""Text models that have no way of their own here: whatever transformers' AutoModel reads is an encoder too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import CAPTIONS, CLOSE, clip, gemma, t5
from tiny import byte_tokenizer
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
)

from emf.analyze.encoders import embed_texts
from emf.conditioning.encoder import mean_pool
from emf.conditioning.load import kind_of, load

SIZES: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TOKENIZER = byte_tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
WIDE: dict[str, Any] = dict(vocab_size=len(TOKENIZER), pad_token_id=TOKENIZER.pad_token_id, eos_token_id=257)


def bert() -> Any:
    return BertModel(BertConfig(max_position_embeddings=40, **SIZES, **WIDE))


def roberta() -> Any:
    """Its 299 positions end at 41: those before are never used."""
    return RobertaModel(RobertaConfig(max_position_embeddings=298, **SIZES, **WIDE))


def bart() -> Any:
    return BartModel(
        BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            **WIDE,
        )
    )


def qwen() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=1, head_dim=8, **SIZES, **WIDE))


def siglip() -> Any:
    vision = dict(image_size=8, patch_size=4, **SIZES)
    text = dict(max_position_embeddings=48, **SIZES, **WIDE)
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def text_part(model: Any) -> Any:
    """What of a model reads text, by hand."""
    return {"BartModel": "encoder", "Qwen3ForCausalLM": "model", "SiglipModel": "text_model"}.get(type(model).__name__)


LENGTHS = {bert: 40, roberta: 41, bart: 64, qwen: 300, siglip: 48}


@pytest.mark.parametrize("make, length", LENGTHS.items(), ids=[make.__name__ for make in LENGTHS])
@torch.no_grad()
def test_any_text_model_is_read(make: Callable[[], Any], length: int, tmp_path: Path) -> None:
    """Its states are those of each caption alone, whatever the padding; it is found by its config.json."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert kind_of(tmp_path) == "text"
    encoder = load("text", tmp_path)
    assert (encoder.length, encoder.channels) == (length, 16)  # type: ignore[attr-defined]
    plain = getattr(model, text_part(model) or "base_model")
    rows, keep = encoder(*encoder.tokenize(CAPTIONS))
    assert rows.shape == (3, length, 16)
    states, mask = encoder.text_states(CAPTIONS)
    assert states.shape[1] == mask.shape[1] == max(len(TOKENIZER(c).input_ids) for c in CAPTIONS)
    for row, kept, short, there, caption in zip(rows, keep, states, mask, CAPTIONS, strict=True):
        own = plain(**TOKENIZER(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[kept], own, **CLOSE)
        torch.testing.assert_close(short[there], own, **CLOSE)
    torch.testing.assert_close(embed_texts(encoder, CAPTIONS), mean_pool(rows, keep), **CLOSE)


def test_a_model_needs_no_pooler_and_no_token_for_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({k: w for k, w in weights.items() if not k.startswith("pooler.")}, file, {"format": "pt"})
    byte_tokenizer(["<pad>", "</s>"], "$A </s>", eos_token="</s>").save_pretrained(tmp_path)
    states, mask = load("text", tmp_path).text_states(CAPTIONS)
    assert states.isfinite().all() and mask.sum(1).tolist() == [len(c.encode()) + 1 for c in CAPTIONS]
    save_file({k: w for k, w in weights.items() if "layer.1.output" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is no BertModel: 4 weights missing, first encoder\.layer\.1\.output"):
        load("text", tmp_path)


def test_a_folder_says_its_kind(tmp_path: Path) -> None:
    for make, kind in ((gemma, "gemma"), (clip, "clip"), (t5, "t5")):
        make()[0].save_pretrained(tmp_path / kind / "text_encoder")
        assert kind_of(tmp_path / kind) == kind_of(tmp_path / kind / "text_encoder") == kind
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="config.json says no model_type"):
        kind_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="no text model|safetensors"):
        load("text", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    with pytest.raises(ValueError, match="holds no text model"):
        load("text", tmp_path)
