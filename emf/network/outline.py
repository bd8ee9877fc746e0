"""A config's network on the meta device: every weight with its name and shape, and none in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emf.conditioning.load import LENGTHS, TEXT_MODELS
from emf.conditioning.small import Connector, SmallEncoder
from emf.config import Config, LoraConfig
from emf.data.digits import WORDS
from emf.files import read_object
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.network.build import adapt, choose_trained, encoder
from emf.network.flows import with_flows

PROMPT = 128
"""Tokens of a caption with what BLIP3o-NEXT puts around it; a longer caption makes a longer row."""
INSTRUCTION = 290
"""Tokens that SANA's instruction adds to a row of Gemma's."""
CONFIGS = {"blip3o": "Qwen3Config", "gemma": "Gemma2Config", "clip": "CLIPTextConfig", "t5": "T5Config"}
CONFIGS["text"] = "BertConfig"  # where no folder tells another
"""Of transformers, by condition.kind."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "blip3o": dict(
        vocab_size=217_210,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "gemma": dict(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    ),
    "text": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
}
"""The text encoders of the recipes, where no folder is there to tell: BLIP3o-NEXT's Qwen3 1.7B with its image
vocabulary (arXiv 2510.15857), SANA's Gemma-2 2B (arXiv 2408.00118), all-MiniLM-L6-v2."""


def outline(config: Config) -> TextToImage:
    """The network that a run of the config builds, on the meta device, with what is trained marked. Sizes of a
    pretrained text encoder are those of its folder, where that is there, else the published ones. Raises ValueError
    where neither tells them, where its states do not fit the transformer, and what emf.network.build says of names."""
    with torch.device("meta"):
        network = TextToImage(_encoder(config), Transformer(config.transformer))
        choose_trained(network, replace(config, lora=LoraConfig()))
        adapt(network, config)
        return with_flows(network, config)


def _encoder(config: Config) -> nn.Module:
    kind, width = config.condition.kind, config.transformer.caption_channels
    if kind == "small":
        return SmallEncoder(config.encoder, WORDS)
    import transformers

    sizes: Any = sizes_of_encoder(config)
    if kind == "blip3o":
        language = transformers.Qwen3ForCausalLM(sizes)
        return nn.ModuleDict({"language_model": language, "connector": Connector(sizes.hidden_size, width)})
    if sizes.hidden_size != width:
        raise ValueError(
            f"config: the {kind} encoder gives states of {sizes.hidden_size} channels, the transformer takes {width} "
            "(transformer.caption_channels)"
        )
    if kind == "text" and folder_of_encoder(config):  # its class is told by its folder alone
        with torch.device("cpu"):  # its tokenizer makes tensors that are looked at
            return encoder(config, empty=True)
    return nn.ModuleDict({"model": getattr(transformers, TEXT_MODELS.get(kind, "BertModel"))(sizes)})


def sizes_of_encoder(config: Config) -> Any:
    """transformers' config of the pretrained text encoder of a run, from its folder where that is there."""
    import transformers

    kind, folder = config.condition.kind, folder_of_encoder(config)
    made: Any = getattr(transformers, CONFIGS[kind])
    for part in (folder / name for name in ("language_model", "text_encoder", "") if folder):
        if (part / "config.json").is_file():
            read_object(part / "config.json", "conditioning")  # says in one line what is wrong with it
            found: Any = transformers.AutoConfig if kind == "text" else made
            return found.from_pretrained(part, local_files_only=True)
    if kind not in PUBLISHED:
        raise ValueError(f"config: nothing tells the sizes of the {kind} encoder; give its --condition.folder")
    return made(**PUBLISHED[kind])


def folder_of_encoder(config: Config) -> Path | None:
    """Where the pretrained text encoder's folder is; none where it is not there."""
    folder = config.text_folder
    return folder if folder and folder.is_dir() else None


def tokens_of(config: Config) -> tuple[int, int]:
    """(tokens that the text encoder reads for a sample, states that the transformer attends to)."""
    c = config.condition
    if c.kind == "small":
        return WORDS.length, WORDS.length
    if c.kind == "blip3o":
        image = (27 // c.scale) ** 2
        return PROMPT + 2 + image + 3, 1 + image  # <im_start>, <S0>; <im_end>, <|im_end|>, newline
    if c.kind == "text" and folder_of_encoder(config):
        length = int(encoder(config, empty=True).length)  # type: ignore[arg-type]
    else:
        length = LENGTHS[c.kind]
    return length + (INSTRUCTION if c.kind == "gemma" else 0), length
