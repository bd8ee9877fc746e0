"""What tests of exports and of the pipeline share: a tiny transformer, and a folder to take other parts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import sana
import torch

from emf.model.transformer import Transformer, TransformerConfig
from emf.sample.emf_pipeline import EMFPipeline

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
