"""Folders for the analyses to read: tiny models of the real classes, images with captions, runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from image_files import encoded, noise, write_folder
from tiny import byte_tokenizer, clip_tokenizer, tiny_sana

from emf.conditioning.blip3o import Blip3oNext, SpecialTokens
from emf.conditioning.small import Connector, EncoderConfig
from emf.config import Config, to_json

LONG = "A red barn, old and tall, stands in a field. Two cows graze beside it; the sky is grey. It rains."
WORDS = ["a red cat", "two blue dogs", "a red cat", "a tall tree, in the fog", "one green bus", "x"]


def write_models(root: Path) -> Path:
    """Folders clip, t5, blip3o, dinov2, dinov3 of tiny random models."""
    from transformers import (
        BitImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        Dinov2Config,
        Dinov2Model,
        DINOv3ViTConfig,
        DINOv3ViTModel,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = clip_tokenizer(77)
    ends = dict(bos_token_id=298, eos_token_id=299, pad_token_id=299)
    CLIPTextModel(CLIPTextConfig(vocab_size=300, **small, **ends)).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    tokenizer = byte_tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "t5")
    tokenizer.save_pretrained(root / "t5")
    own = ["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>", *(f"<I{i}>" for i in range(9))]
    tokenizer = byte_tokenizer(["<pad>", "<|im_start|>", "<|im_end|>", *own], pad_token="<pad>", eos_token="<|im_end|>")
    heads = dict(num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
    language = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **small, **heads)).eval()
    ids = (tokenizer.convert_tokens_to_ids(n) for n in ("<im_start>", "<im_end>", "<S0>", "<I0>"))
    Blip3oNext(language, tokenizer, SpecialTokens(*ids, 9, 3), Connector(16, 12)).save(root / "blip3o")
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
    Dinov2Model(Dinov2Config(image_size=24, **vision)).save_pretrained(root / "dinov2")
    BitImageProcessor(size={"shortest_edge": 26}, crop_size={"height": 24, "width": 24}).save_pretrained(
        root / "dinov2"
    )
    registers = DINOv3ViTConfig(image_size=24, intermediate_size=24, num_register_tokens=3, **vision)
    DINOv3ViTModel(registers).save_pretrained(root / "dinov3")
    pixels = dict(image_processor_type="DINOv3ViTImageProcessorFast", size=dict(height=24, width=24))
    pixels |= dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], do_resize=True)
    (root / "dinov3" / "preprocessor_config.json").write_text(json.dumps(pixels))
    return root


def write_coco(folder: Path, images: int = 7, split: str = "train2017") -> Path:
    """COCO's layout, two captions an image; ids are neither dense nor sorted."""
    ids = [3 * i + 40 for i in reversed(range(images))]
    tree = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids],
        "annotations": [
            {"id": 1000 * j + i, "image_id": i, "caption": f"{'first' if j else 'second'} of {i}, {'x' * (i % 5)}. "}
            for j in (1, 2)
            for i in ids
        ],
    }
    for a in tree["annotations"]:
        a["caption"] = a["caption"].replace("first", "FIRST") if a["id"] < 2000 else a["caption"]
    files = {f"{split}/{i:012d}.jpg": encoded(noise(i), "jpeg") for i in ids}
    return write_folder(folder, {f"annotations/captions_{split}.json": json.dumps(tree).encode(), **files})


def write_run(folder: Path, seed: int, objective: str = "flow_matching", **fields: object) -> Path:
    """A run's folder with one checkpoint of random weights."""
    from safetensors.torch import save_file

    from emf.network.build import build
    from emf.weights.checkpoints import saved_names

    torch.manual_seed(seed)
    sizes = dict(caption_channels=fields.pop("width", 24), sample_size=fields.pop("size", 18), patch_size=1)
    sizes |= dict(num_cross_attention_heads=2, cross_attention_head_dim=8, mlp_ratio=2.0)
    sizes |= dict(dual_time=objective == "meanflow")
    given = dict(encoder=EncoderConfig(32, 48, 1, 2, 1, 16, 24)) | fields
    config = Config("digits-base", objective, transformer=tiny_sana(**sizes), **given)
    network = build(config)
    names = saved_names(network, config)
    place = folder / "checkpoints" / "step_0000001"
    place.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items() if k in names}, place / "model.safetensors")
    (place / "config.json").write_text(to_json(config))
    return folder
