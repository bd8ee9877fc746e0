"""Small SANA checkpoints in the layouts that are published, made without the code that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=20,
    sample_size=8,
    qk_norm="rms_norm_across_heads",
)
OURS: dict[str, Any] = {k: v for k, v in SIZES.items() if k not in ("cross_attention_dim", "qk_norm")}
"""The same sizes as fields of emf's TransformerConfig."""


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms' weights and zero biases too."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)


def diffusers_model(**sizes: Any) -> Any:
    """SanaTransformer2DModel, diffusers' own."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel(**{**SIZES, **sizes})
    randomize(model)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """z [3, 4, 8, 8], t [3], c [3, 5, 20]."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0.1, 0.6, 1.0]), torch.randn(3, 5, 20, generator=g)


@torch.no_grad()
def velocity(model: Any) -> Tensor:
    """Of diffusers' class: timesteps run to 1000."""
    z, t, c = inputs()
    out: Tensor = model(z, c, t * 1000).sample
    return out


def original_state(model: Any) -> dict[str, Tensor]:
    """The names of the original .pth, by the sentence in which its authors' converter undoes them: q, k, v of a
    self-attention in one matrix, k, v of a cross-attention in another."""
    state, out = model.state_dict(), {}
    single = {
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    }
    for there, here in single.items():
        for leaf in ("weight", "bias"):
            out[f"{there}.{leaf}"] = state[f"{here}.{leaf}"]
    out["attention_y_norm.weight"] = state["caption_norm.weight"]
    out["final_layer.scale_shift_table"] = state["scale_shift_table"]
    for i in range(model.config.num_layers):
        a, b = f"blocks.{i}.", f"transformer_blocks.{i}."
        out[a + "scale_shift_table"] = state[b + "scale_shift_table"]
        out[a + "attn.qkv.weight"] = torch.cat([state[f"{b}attn1.to_{x}.weight"] for x in "qkv"])
        for leaf in ("weight", "bias"):
            out[a + f"attn.proj.{leaf}"] = state[b + f"attn1.to_out.0.{leaf}"]
            out[a + f"cross_attn.q_linear.{leaf}"] = state[b + f"attn2.to_q.{leaf}"]
            out[a + f"cross_attn.kv_linear.{leaf}"] = torch.cat([state[f"{b}attn2.to_{x}.{leaf}"] for x in "kv"])
            out[a + f"cross_attn.proj.{leaf}"] = state[b + f"attn2.to_out.0.{leaf}"]
            out[a + f"mlp.inverted_conv.conv.{leaf}"] = state[b + f"ff.conv_inverted.{leaf}"]
            out[a + f"mlp.depth_conv.conv.{leaf}"] = state[b + f"ff.conv_depth.{leaf}"]
        out[a + "mlp.point_conv.conv.weight"] = state[b + "ff.conv_point.weight"]
        if model.config.qk_norm:
            for x in "qk":
                out[a + f"attn.{x}_norm.weight"] = state[b + f"attn1.norm_{x}.weight"]
                out[a + f"cross_attn.{x}_norm.weight"] = state[b + f"attn2.norm_{x}.weight"]
    out |= {"y_embedder.y_embedding": torch.randn(7, 20), "pos_embed": torch.zeros(1, 64, 32)}
    return {k: v.clone() for k, v in out.items()}


def saved(model: Any, folder: Path, kind: str) -> Path:
    """A checkpoint of one of the kinds; what to convert."""
    if kind in ("single", "file", "no config"):
        model.save_pretrained(folder)
        if kind == "no config":
            (folder / "config.json").rename(folder.parent / "sizes.json")
        return folder if kind != "file" else folder / "diffusion_pytorch_model.safetensors"
    if kind in ("sharded", "pipeline"):
        model.save_pretrained(folder / "transformer", max_shard_size="40KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
        return folder if kind == "pipeline" else folder / "transformer"
    state = original_state(model)
    folder = folder / "checkpoints" if kind == "pth in a repository" else folder
    folder.mkdir(parents=True)
    legacy = kind == "legacy pth"
    torch.save(
        {"state_dict": state} if not legacy else state, folder / "x.pth", _use_new_zipfile_serialization=not legacy
    )
    model.save_config(folder.parent / "config")
    (folder.parent / "config" / "config.json").rename(folder.parent / "sizes.json")
    return folder.parent if kind == "pth in a repository" else folder / "x.pth"


TOKENS = dict(
    image_start_tag_id=40,
    image_end_tag_id=41,
    scale_start_token_id=42,
    scale_end_token_id=44,
    image_start_token_id=45,
    image_end_token_id=60,
    num_image_tokens=16,
    num_scale_tokens=3,
)


def qwen(tied: bool, vocabulary: int = 64) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        rope_theta=1e6,
    )
    model = Qwen3ForCausalLM(config)
    randomize(model)
    return model.eval()


def blip3o(
    folder: Path,
    sana: Any,
    *,
    tied: bool,
    extras: bool,
    more: dict[str, Tensor] | None = None,
    tokenizer: Any = None,
) -> Any:
    """A BLIP3o-NEXT folder as Hugging Face's Trainer saves it, in two shards; its AR part. more: further tensors of
    the transformer. tokenizer: with <im_start>, <im_end>, <S0>, <I0> ..., else there is a mere stub of one."""
    model = qwen(tied, 64 if tokenizer is None else len(tokenizer))
    state = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    state |= {f"model.sana.{k}": v for k, v in (sana.state_dict() | (more or {})).items()}
    g = torch.Generator().manual_seed(2)
    shapes = {"0.weight": (20, 24), "0.bias": (20,), "2.weight": (20, 20), "2.bias": (20,), "3.weight": (20,)}
    state |= {f"model.diffusion_connector.{k}": torch.randn(s, generator=g) for k, s in shapes.items()}
    if extras:
        state["model.sana_vae.decoder.conv_in.conv.weight"] = torch.randn(3, 2, generator=g)
        state["model.vision_tower.vision_tower.encode_task_layer.0.weight"] = torch.randn(2, 2, generator=g)
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    keys = sorted(state)
    halves = keys[::2], keys[1::2]
    for name, half in zip(names, halves, strict=True):
        save_file({k: state[k].contiguous() for k in half}, folder / name, {"format": "pt"})
    index = {"weight_map": {k: name for name, half in zip(names, halves, strict=True) for k in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = dict(TOKENS)
    if tokenizer is not None:
        start, end, scale, image = map(tokenizer.convert_tokens_to_ids, ("<im_start>", "<im_end>", "<S0>", "<I0>"))
        tokens = dict(image_start_tag_id=start, image_end_tag_id=end, scale_start_token_id=scale)
        tokens |= dict(image_start_token_id=image, num_scale_tokens=3, num_image_tokens=len(tokenizer) - image)
    config = model.config.to_dict() | tokens | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    config |= {"model_type": "blip3o_qwen", "architectures": ["blip3oQwenForCausalLM"], "mm_vision_tower": "/a/b.pth"}
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    return model


def connected(folder: Path, states: Tensor) -> Tensor:
    """states [B, M, 24] through the folder's connector, modules in the order of its names."""
    from torch import nn

    norm = nn.RMSNorm(20, eps=1e-5)
    chain = nn.Sequential(nn.Linear(24, 20), nn.GELU("tanh"), nn.Linear(20, 20), norm)
    state = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    start = "model.diffusion_connector."
    chain.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
    out: Tensor = chain(states)
    return out
