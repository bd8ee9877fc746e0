"""What a BLIP3o-NEXT folder holds beside the transformer: the autoregressive part, which is a Qwen3, special token ids,
connector, VAE and TA-Tok.

Source of names and config fields: JiuhaiChen/BLIP3o (branch BLIP3o-NEXT) blip3o_arch.py and blip3o_qwen_inference.py;
AMAP-ML/EMF keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emf.files import copy_file
from emf.weights.layouts import read_settings

CONNECTOR = "model.diffusion_connector."
VAE = "model.sana_vae."
TA_TOK = "model.vision_tower.vision_tower."
TOKENS = ("image_start_tag_id", "image_end_tag_id", "scale_start_token_id", "image_start_token_id")
FURTHER = ("scale_end_token_id", "image_end_token_id", "num_scale_tokens", "num_image_tokens")
"""Fields of config.json that say, in one way or another, how many scale and image tokens there are. They may be
absent."""
OURS = {
    "0.weight": "linear_1.weight",
    "0.bias": "linear_1.bias",
    "2.weight": "linear_2.weight",
    "2.bias": "linear_2.bias",
}
OURS |= {"3.weight": "norm.weight"}
"""The connector's names -> those of emf.conditioning.small.Connector."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Part:
    """A further set of weights of a checkpoint."""

    path: str
    """The path of its files in the converted folder, without their ending."""
    names: dict[str, str]
    """Name in the part -> name in the source."""
    shapes: dict[str, tuple[int, ...]]
    """Name in the part -> shape, of everything that it should have."""


def read_config(folder: Path, keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """(the Qwen3 config.json, special token ids and counts by name) of a BLIP3o-NEXT folder whose tensors are `keys`.

    The Qwen3 config keeps the file's fields and values (each version of transformers reads its own spelling), except
    that BLIP3o-NEXT's class reads no rope_scaling, and that a head which was not saved is tied to the embedding unless
    the config says otherwise. Raises ValueError where token ids are missing or outside the vocabulary.
    """
    path = folder / "config.json"
    tree = read_settings(path)
    if lost := [k for k in TOKENS if type(tree.get(k)) is not int]:
        raise ValueError(f"convert: {path} has no {', '.join(lost)}; expected the config of a BLIP3o-NEXT model")
    tokens = {k: int(tree[k]) for k in (*TOKENS, *FURTHER) if type(tree.get(k)) is int}
    vocabulary = tree.get("vocab_size")
    if type(vocabulary) is not int or (high := [k for k in TOKENS if not 0 <= tree[k] < vocabulary]):
        name = "vocab_size" if type(vocabulary) is not int else high[0]
        raise ValueError(f"convert: {path}: {name} {tree.get(name)}; expected token ids below vocab_size {vocabulary}")
    dropped = ("auto_map", "rope_scaling", "mm_vision_tower", "diffusion_name_or_path")
    config = {k: v for k, v in tree.items() if k not in dropped}
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    config.setdefault("tie_word_embeddings", "lm_head.weight" not in keys)
    return config, tokens


def parts(keys: Mapping[str, Any], config: dict[str, Any], caption_channels: int, where: Path) -> list[Part]:
    """The AR part and the connector. Raises ValueError where the Qwen3 config makes no model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    try:
        with torch.device("meta"):
            model = Qwen3ForCausalLM(Qwen3Config.from_dict(config))
    except Exception as error:  # transformers checks a config with several kinds of its own
        raise ValueError(f"convert: {where}/config.json makes no Qwen3: {' '.join(str(error).split())}") from None
    language = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        language.pop("lm_head.weight", None)
    hidden = int(model.config.hidden_size)
    square = (caption_channels, caption_channels)
    connector = {
        "linear_1.weight": (caption_channels, hidden),
        "linear_1.bias": (caption_channels,),
        "linear_2.weight": square,
        "linear_2.bias": (caption_channels,),
        "norm.weight": (caption_channels,),
    }
    return [
        Part("language_model/model", {k: k for k in language}, language),
        Part("connector", {ours: CONNECTOR + k for k, ours in OURS.items()}, connector),
    ]


def beside(keys: Iterable[str]) -> list[str]:
    """The names of an autoencoder's and an image tokenizer's weights: a checkpoint does not say their sizes, so nothing
    could read them."""
    return [k for k in keys if k.startswith((VAE, TA_TOK))]


def write_language_files(source: Path, out: Path, config: dict[str, Any], dtype: str | None) -> None:
    """config.json beside the AR part's weights, and the source's tokenizer."""
    given = {key: dtype for key in ("dtype", "torch_dtype") if dtype is not None and key in config}
    (out / "config.json").write_text(json.dumps(config | given, indent=2) + "\n")
    for name in TOKENIZER:
        if (source / name).is_file():
            copy_file(source / name, out / name)
