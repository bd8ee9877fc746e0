"""What leaves a run: a folder in diffusers' layout, or one file of half-precision weights.

The folder's transformer/config.json and transformer/diffusion_pytorch_model.safetensors are what diffusers'
SanaTransformer2DModel reads: the network in flow-matching mode, with the pretrained time embedding. EMF's two
embedders lie in a folder beside them (layouts.DUAL; keys time_embed_t.* and time_embed_r.*; the header's metadata has
time_scale and base_time_scale), where diffusers does not look for weights: in the same file they would be unexpected
keys to it. emf.sample.emf_pipeline.EMFPipeline reads both, and so do the modules that a flow map carries with it
(emf.weights.carried), by which diffusers draws from the folder where emf is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emf.conditioning.encoder import Encoder
from emf.conditioning.small import CONNECTOR, connector_file
from emf.config import Config
from emf.files import copy_file, copy_folder, refuse_existing, whole_file, whole_folder
from emf.model.sizes import TransformerConfig
from emf.model.state import STEMS, variant
from emf.show.progress import count_bytes
from emf.weights import tensors
from emf.weights.adapter_settings import STAMP, merged, stamp_in
from emf.weights.branches import BRANCHES, scales
from emf.weights.card import write_card
from emf.weights.carried import INDEX, carry, settings_of
from emf.weights.checkpoints import at_newest, step_of
from emf.weights.folders import at_weights, load
from emf.weights.layouts import DUAL, part_of, read_settings, to_diffusers
from emf.weights.start import read_merged, said_of

WHO = "weights: "  # how errors about the folder begin
TEXT_PARTS = ("text_encoder", "tokenizer")
PARTS = ("vae", *TEXT_PARTS)
SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0}
"""Equal steps, without SANA's shift: as BLIP3o-NEXT samples, and EMF."""


def export(
    run: Path | str,
    out: Path | str,
    *,
    base: Path | None = None,
    text: Path | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    name: str | None = None,
) -> Config:
    """A run, one of its checkpoints or a folder from emf convert as the folder `out` in diffusers' layout; see
    write_export. Low-rank adapters are merged. Returns the run's config.

    base: a diffusers folder whose vae, text encoder and tokenizer go with it; None: that of the run's data
    text: the folder of the text encoder, from emf convert where its language model is to go with it; None: the run's
    dtype: of the transformer
    name: of the export on its model card; None: the folder's
    A flow map carries what draws from it by diffusers alone (emf.weights.carried). Raises ValueError where `out` exists
    or a part is missing.
    """
    run, out = Path(run), Path(out)
    refuse_existing(out, WHO)
    config, network, step = at_weights(run, lambda place: (*load(place, text), step_of(place)))
    trained = network.encoder if network.own_encoder or config.condition.kind == "small" else None
    if trained is not None and text is not None:
        raise ValueError(f"export: {run} has a text encoder that was trained with it; leave --text out")
    if text is None and config.condition.kind == "blip3o":
        text = config.text_folder
    whole = merged(network.transformer.state_dict(), config.lora.scale)
    state = {k: v.to(getattr(torch, dtype)) for k, v in whole.items()}
    how = {k: getattr(config.condition, k) for k in ("kind", "scale", "window")}
    base = base or config.data.vae
    merged_in = network.transformer.adapters
    if config.lora.rank:
        merged_in = (*merged_in, stamp_in(network.transformer, config.lora.scale))
    further = dict[str, Any](condition=how, settings=settings_of(network.encoder, config.flow.built_in))
    further["adapters"] = merged_in
    further["card"] = partial(write_card, run, config, name=name or out.name, step=step)
    write_export(state, config.transformer, out, base=base, text=text, encoder=trained, **further)
    return config


def release(run: Path, out: Path) -> int:
    """A run's averaged weights in float16 as one file, low-rank adapters merged, whose header says its sizes; returns
    its bytes. Raises ValueError where `out` exists."""
    refuse_existing(out, "release: ")
    config, state = at_newest(run, read_merged)
    with whole_file(out) as part:
        tensors.write_file(part, tensors.items(state, torch.float16), metadata=said_of(config))
    return out.stat().st_size


def write_export(
    checkpoint_state: Mapping[str, Tensor],
    config: TransformerConfig,
    out: Path,
    *,
    base: Path | None = None,
    text: Path | None = None,
    encoder: Encoder | None = None,
    condition: Mapping[str, Any] | None = None,
    adapters: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    card: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder `out`: transformer, scheduler, model_index.json and, from the diffusers folder `base`, vae,
    text_encoder and tokenizer: copies, which the user may change. A flow map carries its modules, see emf.weights.
    carried.

    checkpoint_state: a Transformer's state dict, in the dtype to be written.
    text: a converted BLIP3o-NEXT checkpoint, or an export of one, whose language_model/ and connector are then the text
          parts, in the place of the base's.
    encoder: one whose weights were trained, written in the place of either.
    condition: what emf.weights.folders is to know of the encoder; model_index.json keeps it as _condition.
    adapters: stamps of those that are merged in the state, which are then not merged again.
    settings: what the carried pipeline is to know of it; None: what the base's model_index.json says.
    card: what writes a model card into the folder when the rest is there.
    What is not there is null in model_index.json: diffusers' and our pipeline then take prompt_embeds, and give latents
    without a vae. Raises ValueError where `out` exists, base is no diffusers folder, text no such checkpoint, or the
    state is not the config's.
    """
    refuse_existing(out, WHO)
    index = _index(base, None if encoder else text)
    kept = {"_condition": index.pop("_condition"), "settings": index.pop("settings")}
    if encoder is not None:
        index |= {name: encoder.parts.get(name, [None, None]) for name in TEXT_PARTS}
    dual = {k: v for k, v in checkpoint_state.items() if k.partition(".")[0] in BRANCHES}
    own = {k: v for k, v in checkpoint_state.items() if k not in dual}
    if "proj_out.weight" not in own or bool(dual) != config.dual_time:
        raise ValueError(
            f"export: the state has {len(own)} tensors and {len(dual)} of the two time embedders, with dual_time "
            f"{config.dual_time}; expected a Transformer's state dict and its config"
        )
    if how := condition or kept["_condition"]:
        index["_condition"] = dict(how)
    index |= INDEX if dual else {}
    main, beside = tensors.items(own), tensors.items(dual)
    total = sum(i.bytes for i in main + beside)
    with whole_folder(out, WHO) as part, count_bytes("export", total) as advance:
        folder = part / "transformer"
        folder.mkdir()
        # One file of any size: diffusers maps it.
        tensors.write_file(folder / "diffusion_pytorch_model.safetensors", main, advance)
        if beside:
            said = scales(config) | ({STAMP: " ".join(adapters)} if adapters else {})
            (folder / DUAL).parent.mkdir()
            tensors.write_file(folder / DUAL, beside, advance, said)
        (folder / "config.json").write_text(_json(to_diffusers(config)))
        (part / "scheduler").mkdir()
        (part / "scheduler" / "scheduler_config.json").write_text(
            _json({"_class_name": index["scheduler"][1], **SCHEDULER})
        )
        for name in PARTS:
            if base is not None and index[name] != [None, None] and not (encoder and name in TEXT_PARTS):
                copy_part(base / name, part / name)
        if encoder is not None:
            encoder.save(part)
        elif text is not None:
            copy_folder(text / "language_model", part / "language_model")
            (part / CONNECTOR[0]).mkdir()
            copy_file(connector_file(text), part.joinpath(*CONNECTOR))
        if beside:
            index |= carry(part, kept["settings"] if settings is None else settings)
        (part / "model_index.json").write_text(_json(index))
        if card is not None:
            card(part)


def _index(base: Path | None, text: Path | None) -> dict[str, Any]:
    """model_index.json: what diffusers' SanaPipeline is made of, and what an export says of its text stage. The base's
    own scheduler and transformer do not count."""
    theirs: dict[str, Any] = {}
    if base is not None:
        if not (base / "model_index.json").is_file():
            raise ValueError(
                f"export: {base} has no model_index.json; expected a pipeline's folder in diffusers' layout"
            )
        theirs = read_settings(base / "model_index.json")
    index: dict[str, Any] = {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "_condition": theirs.get("_condition", {}),
        "settings": theirs.get("settings", {}),
    }
    if text is not None and not ((text / "language_model").is_dir() and connector_file(text).is_file()):
        raise ValueError(
            f"export: {text} has no language_model and connector; expected a converted BLIP3o-NEXT checkpoint"
        )
    for name in PARTS:
        kept = theirs if text is None or name == "vae" else {}
        index[name] = [*part_of(kept, name, (base or Path()) / "model_index.json")]
        if base is not None and index[name] != [None, None] and not (base / name).is_dir():
            raise ValueError(f"export: {base} has no {name}, which its model_index.json names")
    return index


def copy_part(source: Path, target: Path) -> None:
    """A copy of a part's folder. Weights that are there as a variant alone lose its name, without which diffusers finds
    them only where it is told."""
    copy_folder(source, target)
    if (name := variant(target)) is None:
        return
    for file in list(target.iterdir()):
        if f".{name}" in file.name and file.name.startswith(STEMS):
            if file.suffix == ".json":
                file.write_text(file.read_text().replace(f".{name}", ""))
            file.rename(target / file.name.replace(f".{name}", "", 1))


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
