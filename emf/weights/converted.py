"""A folder from `emf convert`, read: its settings and its transformer. emf.weights.convert says what is in it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from emf.files import files_in, filled
from emf.model.sizes import TransformerConfig
from emf.model.transformer import Transformer
from emf.weights.checkpoints import WEIGHTS, checkpoints
from emf.weights.layouts import read_settings
from emf.weights.tensors import Weights, shards

TRAINED = " with EMF's time embedders"
"""How a layout in words ends where the source had them."""


@dataclass(frozen=True)
class _Told:
    """What a converted folder's config.json says beside the transformer's sizes."""

    source: dict[str, Any]
    """Where it came from: the path, the layout in words, how the two time embedders were made."""
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Names by part that the source did not have, and was allowed not to."""
    language_model: dict[str, Any] = field(default_factory=dict)
    """The Qwen3 config of BLIP3o-NEXT; empty for a SANA, as the two that follow are."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Special token ids by name."""
    connector: dict[str, int] = field(default_factory=dict)
    """Sizes of the connector."""


@dataclass(frozen=True)
class Converted(_Told):
    """The settings of a converted folder."""

    folder: Path = field(kw_only=True)
    transformer: TransformerConfig = field(kw_only=True)

    @property
    def made(self) -> str | None:
        """How EMF's two time embedders were made of the pretrained one; None where the source had them, trained."""
        if str(self.source.get("layout")).endswith(TRAINED):
            return None
        return str(self.source.get("embedder_init", "duplicate"))

    def without_made(self, network: Transformer) -> Transformer:
        """The transformer as the source had it: without time embedders that were made to be trained."""
        if self.made is not None:
            del network.time_embed_t, network.time_embed_r
            network.config = replace(network.config, dual_time=False)
        return network


def is_base(folder: Path) -> bool:
    """Whether a folder is one that `emf convert` wrote. Raises ValueError where its config.json is broken."""
    file = folder / "config.json"
    if not file.is_file() or (folder / WEIGHTS).is_file() or checkpoints(folder):
        return False
    return {"source", "transformer"} <= read_settings(file).keys()


def read_converted(folder: Path) -> Converted:
    """A converted folder's config.json. Raises ValueError where it is none."""
    path = folder / "config.json"
    tree = read_settings(path)
    if not isinstance(tree.get("transformer"), dict) or "source" not in tree:
        raise ValueError(f"checkpoint: {folder} is no converted checkpoint; make one with `emf convert`")
    sizes = filled(TransformerConfig, tree["transformer"], f"checkpoint: {path}: transformer")
    further = {f.name: tree[f.name] for f in fields(_Told) if f.name in tree}
    told = filled(_Told, further, f"checkpoint: {path}")
    return Converted(**vars(told), folder=folder, transformer=sizes)


def load_converted(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Converted]:
    """The transformer of a converted folder, on CPU, and the folder's settings. Names that the source was allowed not
    to have are left at their initialisation.

    Raises ValueError where the folder is none, or its weights are not those that its config says.
    """
    converted = read_converted(folder)
    index = folder / "transformer.safetensors.index.json"
    files = shards(index) if index.is_file() else files_in(folder, "transformer*.safetensors")
    if not files:
        raise ValueError(f"checkpoint: {folder} has no transformer.safetensors")
    weights = Weights(files)
    missing = set(converted.missing.get("transformer", []))
    with torch.device("cpu" if missing else "meta"):  # initialised where something is left so
        network = Transformer(converted.transformer).to(dtype)
    own = {k: tuple(v.shape) for k, v in network.state_dict().items() if k not in missing}
    found = {k: e.shape for k, e in weights.entries.items()}
    if own != found:
        wrong = sorted(k for k in own.keys() | found.keys() if own.get(k) != found.get(k))
        raise ValueError(f"checkpoint: {folder}: {len(wrong)} tensors are not as config.json says; first {wrong[0]}")
    # a copy each: what is read is a view of a file that may go away
    state = {k: torch.empty(found[k], dtype=dtype).copy_(weights.read(k)) for k in own}
    network.load_state_dict(state, strict=not missing, assign=True)
    return network, converted
