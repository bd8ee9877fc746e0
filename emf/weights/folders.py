"""Folders of weights, read: a run's, a converted checkpoint, an export."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from emf.config import ConditionConfig, Config
from emf.data.batches import DataConfig
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer, TransformerConfig
from emf.network.build import build, checkpoints, encoder, load_weights
from emf.recipes import from_file
from emf.weights.export import DUAL
from emf.weights.layouts import read_config, read_json
from emf.weights.tensors import Weights


def newest(run: Path) -> Path:
    """The newest whole checkpoint of a run's folder, or the folder itself if it is one. Raises ValueError where there
    is none."""
    if (run / "model.safetensors").is_file():
        return run
    saved = checkpoints(run / "checkpoints")
    if not saved:
        raise ValueError(
            f"{run} holds no checkpoint; expected a run's folder, or a folder with model.safetensors and config.json"
        )
    return saved[-1]


def load_run(run: Path) -> tuple[Config, TextToImage]:
    """(config, network with the averaged weights) of a run's folder or one of its checkpoints."""
    checkpoint = newest(run)
    config = from_file(checkpoint / "config.json")
    return config, build(config, weights=checkpoint / "model.safetensors").eval()


def load_any(folder: Path) -> tuple[Config, TextToImage]:
    """(config, network) of a run, a checkpoint or an export."""
    return load_export(folder) if (folder / "model_index.json").is_file() else load_run(folder)


def load_export(folder: Path) -> tuple[Config, TextToImage]:
    """(config, network) of a folder in diffusers' layout with text parts: emf export's, or of a published SANA
    pipeline, which has no time embedders of EMF's. Raises ValueError where a part is missing."""
    index = read_json(folder / "model_index.json")
    kinds = {"Gemma2Model": "gemma", "Gemma2ForCausalLM": "gemma", "CLIPTextModel": "clip", "T5EncoderModel": "t5"}
    named = (index.get("text_encoder") or [None, None])[1]
    how = {"kind": "blip3o" if (folder / "language_model").is_dir() else kinds.get(named)}
    how |= index.get("_condition", {})
    if how["kind"] in (None, "small"):
        raise ValueError(f"{folder} holds no text parts known here; export with --text, or from a base that has some")
    transformer = load_exported_transformer(folder / "transformer")
    config = Config(
        recipe="export",
        objective="meanflow" if transformer.config.dual_time else "flow_matching",
        transformer=transformer.config,
        condition=ConditionConfig(folder=folder, **how),  # type: ignore[arg-type]
        data=DataConfig(vae=folder if (folder / "vae").is_dir() else None),
    )
    return config, TextToImage(encoder(config), transformer).eval()


def load_exported_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The transformer folder that `emf export` wrote, with both time embedders where it has them. Raises ValueError
    where it is another."""
    dual, config = folder / DUAL, read_config(folder / "config.json")
    names = [folder / "diffusion_pytorch_model.safetensors"]
    if dual.is_file():
        with safe_open(dual, "pt") as handle:
            said = handle.metadata() or {}
        try:
            scales: dict[str, Any] = {k: float(said[k]) for k in ("time_scale", "base_time_scale")}
        except (KeyError, ValueError):
            raise ValueError(f"{dual} does not say its time_scale and base_time_scale; export again") from None
        config = replace(config, dual_time=True, **scales)
        names.append(dual)
    weights = Weights(names)
    with torch.device("meta"):
        network = Transformer(config)
    network = network.to_empty(device="cpu").to(dtype)
    load_weights(network, {k: weights.read(k) for k in weights.entries}, str(folder))
    return network.eval()


@dataclass(frozen=True)
class Checkpoint:
    """A folder's settings. language_model, tokens, connector: of BLIP3o-NEXT, else empty."""

    folder: Path
    transformer: TransformerConfig
    missing: dict[str, list[str]]
    """Names by part that the source did not have, and was allowed not to."""
    language_model: dict[str, Any]
    tokens: dict[str, int]
    connector: dict[str, int]


def read_checkpoint(folder: Path) -> Checkpoint:
    """A converted folder's config.json. Raises ValueError where it is none."""
    path = folder / "config.json"
    tree = read_json(path)
    sizes, known = tree.get("transformer"), {f.name for f in fields(TransformerConfig)}
    if not isinstance(sizes, dict) or "source" not in tree:
        raise ValueError(f"checkpoint: {folder} is no converted checkpoint; make one with `emf convert`")
    if unknown := sorted(sizes.keys() - known):
        raise ValueError(f"checkpoint: {path}: transformer.{unknown[0]} is not known; convert it with this version")
    further = {key: tree.get(key, {}) for key in ("language_model", "tokens", "connector")}
    return Checkpoint(folder, TransformerConfig(**sizes), tree.get("missing", {}), **further)


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Checkpoint]:
    """The transformer of a converted folder, on CPU, and the folder's settings. Names that the source was allowed not
    to have are left at their initialisation.

    Raises ValueError where the folder is none, or its weights are not those that its config says.
    """
    checkpoint = read_checkpoint(folder)
    files = sorted(folder.glob("transformer*.safetensors"))
    index = folder / "transformer.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    if lost := [file.name for file in files if not file.is_file()] or ([] if files else ["transformer.safetensors"]):
        raise ValueError(f"checkpoint: {folder} has no {lost[0]}")
    weights = Weights(files)
    missing = set(checkpoint.missing.get("transformer", []))
    with torch.device("cpu" if missing else "meta"):  # initialised where something is left so
        network = Transformer(checkpoint.transformer).to(dtype)
    own = {k: tuple(v.shape) for k, v in network.state_dict().items() if k not in missing}
    found = {k: e.shape for k, e in weights.entries.items()}
    if own != found:
        wrong = sorted(k for k in own.keys() | found.keys() if own.get(k) != found.get(k))
        raise ValueError(f"checkpoint: {folder}: {len(wrong)} tensors are not as config.json says; first {wrong[0]}")
    # a copy each: what is read is a view of a file that may go away
    state = {k: torch.empty(found[k], dtype=dtype).copy_(weights.read(k)) for k in own}
    network.load_state_dict(state, strict=not missing, assign=True)
    return network, checkpoint
