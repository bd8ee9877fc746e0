"""What tests of exports and of the pipeline share: a tiny transformer, and a folder to take other parts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import sana
import torch
from image_files import small_autoencoder
from tiny import byte_tokenizer

from emf.model.transformer import Transformer, TransformerConfig
from emf.sample.emf_pipeline import EMFPipeline
from emf.weights.convert import convert

CONFIG = TransformerConfig(**sana.OURS, dual_time=True, time_scale=10.0)


def network(config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(config)
    sana.randomize(net)
    return net.eval()


def write_base(folder: Path) -> Path:
    """A pipeline's folder with an autoencoder, a tokenizer's and a text encoder's file, some of them links."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    )
    vae.save_pretrained(folder / "vae")
    (folder / "blob").write_text("{}")
    for name in ("tokenizer", "text_encoder"):
        (folder / name).mkdir()
        (folder / name / "config.json").symlink_to(folder / "blob")
    index = {
        "_class_name": "SanaPipeline",
        "vae": ["diffusers", "AutoencoderDC"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pipeline(folder: Path, **kwargs: Any) -> EMFPipeline:
    pipe: EMFPipeline = EMFPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_published(folder: Path) -> Path:
    """A pipeline's folder as SANA's are, with a T5 whose states have a mask, and with weights that can be loaded."""
    from transformers import T5Config, T5EncoderModel

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


def write_start(folder: Path, source: Path, more: dict[str, torch.Tensor] | None = None, **how: Any) -> Path:
    """A converted BLIP3o-NEXT, made of one that is written to `source`; more: see sana.blip3o."""
    model = sana.diffusers_model()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>"]
    tokenizer = byte_tokenizer(special + [f"<I{i}>" for i in range(50)], pad_token="<pad>", eos_token="<|im_end|>")
    sana.blip3o(source, model, tied=True, extras=True, more=more, tokenizer=tokenizer)
    sizes = source.with_name(f"{source.name}-sizes")
    model.save_config(sizes)
    convert(source, folder, config=sizes / "config.json", **how)
    return folder
