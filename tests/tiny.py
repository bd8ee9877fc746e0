"""A transformer's sizes, tokenizers and an image tokenizer of the real classes, tiny, for tests without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from emf.model.sizes import TransformerConfig


def tiny_sana(**changes: Any) -> TransformerConfig:
    """One layer of 16 channels on images of 3 x 4 x 4."""
    sizes = dict(in_channels=3, out_channels=3, num_attention_heads=2, attention_head_dim=8, num_layers=1)
    sizes |= dict(num_cross_attention_heads=1, cross_attention_head_dim=16, caption_channels=12)
    further: dict[str, Any] = dict(mlp_ratio=2.5, patch_size=2, sample_size=4, dual_time=True)
    return TransformerConfig(**{**sizes, **further, **changes})


def clip_tokenizer(context: int = 40) -> Any:
    """CLIP's byte-level BPE with no merges: 0..255 the bytes, 256 and up bytes at a word's end; 298 start, 299 end.

    Pads with the end token, as OpenAI's does.
    """
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz0123456789-.,'!&"[: 298 - len(letters)]]
    vocab = {token: i for i, token in enumerate([*letters, *ends])} | {"<|startoftext|>": 298, "<|endoftext|>": 299}
    bpe = models.BPE(vocab, [], end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 298), ("<|endoftext|>", 299)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=context,
    )


def bert_tokenizer() -> Any:
    """BERT's lower-cased whole words, 64 of them: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [DEC] 5."""
    from transformers import PreTrainedTokenizerFast

    words = ["yes", "no", "is", "the", "there", "?", "dog", "cat", "red", "barn", "sky"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words]
    vocab += [f"word{i}" for i in range(64 - len(vocab))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
    )


def byte_tokenizer(special: list[str], template: str = "$A", **roles: str) -> Any:
    """A token a byte, special tokens, and a template with them around a text."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    if template != "$A":
        used = [(t, bpe.token_to_id(t)) for t in special if t in template]
        bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)


def ta_tok_file(
    path: Path,
    *,
    kind: Any = dict,
    normalized: bool = True,
    pool: int = 1,
    extra: Any = None,
    prefix: str = "encoder.",
    size: int = 24,
    patch: int = 4,
) -> dict[str, Tensor]:
    """A file of the published layout with a vision model of size / patch patches a side; returns its weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    vision = SiglipVisionModel(config).state_dict()
    state = {prefix + k.removeprefix("vision_model."): torch.randn_like(v) / 4 for k, v in vision.items()}
    shapes = {
        "encode_task_layer.0": (32, 32),
        "decode_task_layer.0": (32, 32),
        "bottleneck.in_linear": (12, 32),
        "bottleneck.out_linear": (32, 12),
        "bottleneck.regularizer.embedding_proj": (12, 12),
        "decoder.vision_model.embeddings.patch_embedding": (32, 12),
        "teacher.head": (3, 3),
    }
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(shape) / 3, f"{name}.bias": torch.randn(shape[0]) / 3}
    state["bottleneck.regularizer.embedding.weight"] = torch.randn(50, 12)
    regularizer = {"name": "simvq", "args": {"codebook_size": 50, "l2_normalized": normalized, "stochastic": True}}
    bottleneck = {"name": "bottleneck", "args": {"bottleneck_dim": 12, "regularizer": regularizer}}
    arguments = {"bottleneck": bottleneck, "input_size": size, "pool_scale": pool, "teacher": "somewhere"}
    torch.save({"model": {"args": kind(arguments), "sd": state} | (extra or {})}, path)
    return state


def tiny_clip() -> Any:
    """A random CLIP for pictures of 16 pixels and clip_tokenizer's ids."""
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = tower | dict(vocab_size=300, max_position_embeddings=40, bos_token_id=298, eos_token_id=299)
    vision = tower | dict(image_size=16, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
