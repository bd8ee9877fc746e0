"""A transformer as a folder in diffusers' layout.

transformer/config.json and diffusion_pytorch_model.safetensors are what diffusers' SanaTransformer2DModel reads: the
network in flow-matching mode, with the pretrained time embedding. EMF's two embedders lie beside them in
transformer/time_embed_dual.safetensors (keys time_embed_t.* and time_embed_r.*; the header's metadata has time_scale
and base_time_scale), where diffusers does not look for weights: in the same file they would be unexpected keys to it.
emf.sample.emf_pipeline.EMFPipeline reads both.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emf.conditioning.encoder import Encoder
from emf.model.transformer import TransformerConfig
from emf.weights import tensors as files
from emf.weights.layouts import read_json, to_diffusers

DUAL = "time_embed_dual.safetensors"
BRANCHES = ("time_embed_t.", "time_embed_r.")
TEXT_PARTS = ("text_encoder", "tokenizer")
PARTS = ("vae", *TEXT_PARTS)
TEXT = ("language_model", "connector.safetensors")
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
"""SANA's flow matching without a shift, as BLIP3o-NEXT samples it."""


def export(
    checkpoint_state: Mapping[str, Tensor],
    config: TransformerConfig,
    out: Path,
    base: Path | None = None,
    text: Path | None = None,
    encoder: Encoder | None = None,
    condition: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder `out`: transformer, scheduler, model_index.json and, from the diffusers folder `base`, vae,
    text_encoder and tokenizer, linked where the file system can.

    checkpoint_state: a Transformer's state dict, in the dtype to be written.
    text: a converted BLIP3o-NEXT checkpoint, whose language_model/ and connector.safetensors are then the text parts,
          under these names, in the place of the base's.
    encoder: one whose weights were trained, written in the place of either.
    condition: what emf.weights.folders is to know of the encoder; model_index.json keeps it as _condition.
    What is not there is null in model_index.json: diffusers' and our pipeline then take prompt_embeds, and give latents
    without a vae. Raises ValueError where `out` exists, base is no diffusers folder, text no such checkpoint, or the
    state is not the config's.
    """
    files.refuse_existing(out)
    index = _index(base, None if encoder else text)
    if encoder is not None:
        index |= {name: encoder.parts.get(name, [None, None]) for name in TEXT_PARTS}
    own = {k: v for k, v in checkpoint_state.items() if not k.startswith(BRANCHES)}
    dual = {k: v for k, v in checkpoint_state.items() if k.startswith(BRANCHES)}
    if "proj_out.weight" not in own or bool(dual) != config.dual_time:
        raise ValueError(
            f"export: the state has {len(own)} tensors and {len(dual)} of the two time embedders, with dual_time "
            f"{config.dual_time}; expected a Transformer's state dict and its config"
        )
    if condition:
        index["_condition"] = dict(condition)
    main, beside = files.items(own), files.items(dual)
    with files.whole(out) as part, files.progress("export", sum(i.bytes for i in main + beside)) as advance:
        folder = part / "transformer"
        # one file: diffusers reads it mapped, whatever its size
        files.write(folder, "diffusion_pytorch_model", main, advance, shard_bytes=2**63)
        if beside:
            scales = {k: str(getattr(config, k)) for k in ("time_scale", "base_time_scale")}
            files.write(folder, DUAL.removesuffix(".safetensors"), beside, advance, 2**63, scales)
        (folder / "config.json").write_text(_json(to_diffusers(config)))
        (part / "scheduler").mkdir()
        (part / "scheduler" / "scheduler_config.json").write_text(_json(SCHEDULER))
        for name in PARTS:
            if base is not None and index[name] != [None, None] and not (encoder and name in TEXT_PARTS):
                shutil.copytree(base / name, part / name, copy_function=_link)
        if encoder is not None:
            encoder.save(part)
        elif text is not None:
            shutil.copytree(text / TEXT[0], part / TEXT[0], copy_function=_link)
            _link(str(text / TEXT[1]), str(part / TEXT[1]))
        (part / "model_index.json").write_text(_json(index))


def _index(base: Path | None, text: Path | None) -> dict[str, Any]:
    """model_index.json: what diffusers' SanaPipeline is made of. The base's own scheduler and transformer do not
    count."""
    theirs: dict[str, Any] = {}
    if base is not None:
        if not (base / "model_index.json").is_file():
            raise ValueError(
                f"export: {base} has no model_index.json; expected a pipeline's folder in diffusers' layout"
            )
        theirs = read_json(base / "model_index.json")
    index: dict[str, Any] = {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
    }
    if text is not None and not all((text / name).exists() for name in TEXT):
        raise ValueError(f"export: {text} has no {' and '.join(TEXT)}; expected a converted BLIP3o-NEXT checkpoint")
    for name in PARTS:
        index[name] = theirs.get(name) if text is None or name == "vae" else None
        index[name] = index[name] or [None, None]
        if base is not None and index[name] != [None, None] and not (base / name).is_dir():
            raise ValueError(f"export: {base} has no {name}, which its model_index.json names")
    return index


def _link(source: str, target: str) -> None:
    """A hard link to the file that a link leads to (a download cache is full of links), else a copy."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(real, target)


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
