"""Text encoders as tiny random models of the real classes, and plain forwards of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from emf.conditioning.blip3o import Blip3oNext, SpecialTokens
from emf.conditioning.small import Connector

IMAGE_TOKENS = 6
CODES = 40
CAPTIONS = ["a red cat", "Two blue dogs under an umbrella ", "x"]
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-5)
TextModel = Callable[[], tuple[Any, Any]]


def _tokenizer() -> Any:
    own = ["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>", *(f"<I{i}>" for i in range(CODES))]
    return byte_tokenizer(["<pad>", "<|im_start|>", "<|im_end|>", *own], pad_token="<pad>", eos_token="<|im_end|>")


TOKENIZER = _tokenizer()


def _qwen() -> Any:
    config = Qwen3Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):  # tokens that differ, in and out
        nn.init.normal_(weight, std=0.3)
    with torch.no_grad():  # norms whose absence shows
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2)
    return model


with torch.random.fork_rng():
    torch.manual_seed(0)
    QWEN = _qwen()
    torch.manual_seed(1)
    CONNECTOR = Connector(32, 20)


def special_tokens() -> SpecialTokens:
    names = ("<im_start>", "<im_end>", "<S0>", "<I0>")
    return SpecialTokens(*(TOKENIZER.convert_tokens_to_ids(n) for n in names), CODES, 3)


def blip3o(**settings: Any) -> Blip3oNext:
    """An encoder of QWEN and CONNECTOR, which all tests share: what one froze, or left as gradients, is undone."""
    QWEN.requires_grad_(True)
    QWEN.zero_grad()
    CONNECTOR.zero_grad()
    return Blip3oNext(QWEN, TOKENIZER, special_tokens(), CONNECTOR, **{"image_tokens": IMAGE_TOKENS, **settings})


def image_ids() -> tuple[Tensor, Tensor]:
    """(codes, vocabulary ids) of an image for each caption."""
    codes = torch.randint(CODES, (len(CAPTIONS), IMAGE_TOKENS), generator=torch.Generator().manual_seed(2))
    return codes, TOKENIZER.convert_tokens_to_ids("<I0>") + codes


def conversation(caption: str, codes: Tensor, scale: int = 0) -> str:
    """A training row as text, by hand."""
    request = f"Please generate image based on the following caption: {caption}"
    said = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n"
    image = "".join(f"<I{c}>" for c in codes.tolist())
    return f"{said}<|im_start|>assistant\n<im_start><S{scale}>{image}<im_end><|im_end|>\n"


def plain_states(text: str) -> Tensor:
    """QWEN by transformers alone, one text, no padding: [L, hidden] after the final norm."""
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    return QWEN(ids, output_hidden_states=True).hidden_states[-1][0]


def plain_connector(s: dict[str, Tensor], x: Tensor) -> Tensor:
    """Linear, GELU(tanh), Linear, RMSNorm."""
    h = F.gelu(F.linear(x, s["linear_1.weight"], s["linear_1.bias"]), approximate="tanh")
    h = F.linear(h, s["linear_2.weight"], s["linear_2.bias"])
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * s["norm.weight"]


def gemma() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(["<pad>", "<bos>"], "<bos> $A", pad_token="<pad>", bos_token="<bos>")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return Gemma2Model(config).eval(), tokenizer


def clip() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(["<s>", "</s>"], "<s> $A </s>", pad_token="</s>", bos_token="<s>", eos_token="</s>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval(), tokenizer


def t5() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config).eval(), tokenizer


every_text_model = pytest.mark.parametrize("text_model", [gemma, clip, t5])
