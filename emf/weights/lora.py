"""Adapters on disk: a small folder that holds what a run with low-rank adapters has learned, to be put on its base.

adapter_config.json and adapter_model.safetensors are peft's form, pytorch_lora_weights.safetensors is diffusers': each
reads its own, and both hold the same factors. What the run trained in full lies beside them in
trained_in_full.safetensors, whose header's metadata has time_scale and base_time_scale: the two time embedders, whole,
and the tables. peft's modules_to_save has no place for the tables, which are no modules, and diffusers reads a file of
adapters only if it holds nothing else.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from emf.config import Config
from emf.files import parse_json, read_object, refuse_existing, whole_folder
from emf.model.layers import TimeEmbed
from emf.model.transformer import SINUSOID, Transformer
from emf.weights.branches import BRANCHES
from emf.weights.folders import load_run
from emf.weights.tensors import Weights, items, read_metadata, write_file

WHO = "lora: "  # how errors about the folder begin
PEFT, PEFT_SETTINGS, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
DIFFUSERS, DIFFUSERS_SETTINGS, DIFFUSERS_PREFIX = (
    "pytorch_lora_weights.safetensors",
    "lora_adapter_metadata",
    "transformer.",
)
FULL = "trained_in_full.safetensors"
SCALES = ("time_scale", "base_time_scale")
FACTORS = (".lora_A.weight", ".lora_B.weight")
UNREAD = ("use_dora", "alpha_pattern", "lora_bias", "modules_to_save", "target_parameters")
"""Settings of peft with which W + alpha / rank B A is not all there is."""


def export_adapters(
    run: Path | str, out: Path | str, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
) -> Config:
    """What a run with adapters, or one of its checkpoints, has learned, as the folder `out`. Returns the run's config.
    Raises ValueError where `out` exists, the run has no adapters, or it trained its text encoder too."""
    from emf.network.adapters import peft_settings

    run, out = Path(run), Path(out)
    refuse_existing(out, WHO)
    config, network = load_run(run)
    if not config.lora.rank:
        raise ValueError(f"export: {run} has no adapters (lora.rank 0); leave out --adapters")
    if network.own_encoder and config.condition.kind != "small":
        raise ValueError(
            f"export: {run} trained its text encoder too, for which a folder of adapters has no place; leave out "
            "--adapters"
        )
    as_written = getattr(torch, dtype)
    state = {k.replace(".base_layer.", "."): v for k, v in network.transformer.state_dict().items()}
    trained = {name for name, p in network.transformer.named_parameters() if p.requires_grad}
    factors = {k.replace(".default.", "."): v for k, v in state.items() if ".lora_" in k}
    full = {k: v for k, v in state.items() if ".lora_" not in k and (k in trained or k.split(".")[0] in BRANCHES)}
    settings = peft_settings(config.lora).to_dict() | {"target_modules": sorted(config.lora.targets)}
    with whole_folder(out, WHO) as part:
        (part / PEFT_SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        write_file(part / PEFT, items({PEFT_PREFIX + k: v for k, v in factors.items()}, as_written))
        told = json.dumps({DIFFUSERS_PREFIX + k: v for k, v in settings.items()}, sort_keys=True)
        ours = items({DIFFUSERS_PREFIX + k: v for k, v in factors.items()}, as_written)
        write_file(part / DIFFUSERS, ours, metadata={DIFFUSERS_SETTINGS: told})
        scales = {k: str(getattr(config.transformer, k)) for k in SCALES}
        write_file(part / FULL, items(full, as_written), metadata=scales)
    return config


@dataclass(frozen=True)
class Adapters:
    """What is put on a base."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """By the name of a weight: A [r, K] and B [N, r] (of a convolution with further dimensions)."""
    scale: float
    """The products are multiplied by it: alpha / rank, peft's."""
    full: dict[str, Tensor]
    """Weights that were trained in full, by name; empty where no file of ours lies beside."""
    times: dict[str, float]
    """time_scale and base_time_scale of the embedders among them."""


def read_adapters(folder: Path | str) -> Adapters:
    """A folder in peft's or diffusers' form, ours or another's. Raises ValueError where it is neither, or its settings
    ask for more than W + alpha / rank B A."""
    folder = Path(folder)
    if (folder / PEFT_SETTINGS).is_file():
        file, prefix, settings = folder / PEFT, PEFT_PREFIX, read_object(folder / PEFT_SETTINGS, "lora")
    else:
        file, prefix = folder / DIFFUSERS, DIFFUSERS_PREFIX
        if not file.is_file():
            raise ValueError(f"lora: {folder} holds no adapters; expected {PEFT_SETTINGS} and {PEFT}, or {DIFFUSERS}")
        told = parse_json(read_metadata(file).get(DIFFUSERS_SETTINGS, "{}"), f"lora: {DIFFUSERS_SETTINGS} of {file}")
        settings = {k.removeprefix(prefix): v for k, v in told.items()} if isinstance(told, dict) else {}
    if more := [name for name in UNREAD if settings.get(name)]:
        raise ValueError(f"lora: {folder} was made with {more[0]}, which is not read here; merge it where it was made")
    weights = Weights([file])
    names = {k: k.removeprefix(prefix) for k in weights.entries}
    if other := [k for k, name in names.items() if name == k or not name.endswith(FACTORS)]:
        raise ValueError(f"lora: {file} holds {other[0]}; expected {prefix}*{FACTORS[0]} and {FACTORS[1]}")
    layers = {name.rpartition(".lora_")[0] for name in names.values()}
    if lone := [layer for layer in layers if any(prefix + layer + f not in names for f in FACTORS)]:
        raise ValueError(f"lora: {file} has one factor of {min(lone)}; expected lora_A and lora_B")
    a, b = ({k: weights.read(prefix + k + f).float() for k in sorted(layers)} for f in FACTORS)
    ranks = {x.shape[0] for x in a.values()}
    if len(ranks) != 1:
        raise ValueError(f"lora: {file} has adapters of ranks {sorted(ranks)}; expected one rank, and at least a layer")
    (rank,) = ranks
    alpha, root = settings.get("lora_alpha", rank), settings.get("use_rslora")  # diffusers: without alpha it is rank
    if not isinstance(alpha, int | float):
        raise ValueError(f"lora: {folder} has lora_alpha {alpha!r}; expected a number")
    full, times = dict[str, Tensor](), dict[str, float]()
    if (beside := folder / FULL).is_file():
        parts, said = Weights([beside]), read_metadata(beside)
        full = {k: parts.read(k) for k in parts.entries}
        try:
            times = {k: float(said[k]) for k in SCALES}
        except (KeyError, ValueError):
            raise ValueError(f"lora: {beside} does not say its {SCALES[0]} and {SCALES[1]}; export again") from None
    return Adapters({f"{k}.weight": (a[k], b[k]) for k in a}, alpha / (rank**0.5 if root else rank), full, times)


@torch.no_grad()
def put_on(transformer: Transformer, adapters: Adapters, source: Path | str) -> None:
    """Merge adapters into a transformer's weights, and put what was trained in full in the place of its own. A base
    without EMF's two time embedders gets them. The products are made in float32.

    source: where they come from, for errors. Raises ValueError, before anything is changed, where they belong to
    another transformer.
    """
    state, config, full = dict(transformer.named_parameters()), transformer.config, adapters.full
    added = dict[str, nn.Module]()
    if any(name.split(".")[0] in BRANCHES for name in full):
        config = replace(config, dual_time=True, **adapters.times)  # type: ignore[arg-type]
        if not transformer.config.dual_time:
            like = transformer.proj_out.weight
            added = {b: TimeEmbed(SINUSOID, config.channels).to(like.device, like.dtype) for b in BRANCHES}
            new = {f"{b}.{name}": p for b, module in added.items() for name, p in module.named_parameters()}
            if lost := sorted(new.keys() - full.keys()):
                raise ValueError(f"lora: {source} lacks {lost[0]}, and so does the transformer")
            state |= new
    there = {name: tuple(p.shape) for name, p in state.items()}
    wanted = {name: tuple(value.shape) for name, value in full.items()}
    for name, (a, b) in adapters.factors.items():
        whole = there.get(name, ())
        product = (len(b), a[0].numel()) if b.flatten(1).shape[1] == len(a) else ()
        wanted[name] = whole if product == (whole[:1] and (whole[0], math.prod(whole[1:]))) else product
    if unfit := [name for name, shape in wanted.items() if there.get(name) != shape]:
        has = f"{there[unfit[0]]} there" if unfit[0] in there else "not there"
        raise ValueError(f"lora: {source} is of another transformer: {unfit[0]} is {wanted[unfit[0]]}, and {has}")
    # tables are trained in every block or in none, so a block without one is a block that the adapters do not know
    tables = {name for name in there if name.startswith("transformer_blocks.") and name.endswith("scale_shift_table")}
    if (known := tables & full.keys()) and known != tables:
        raise ValueError(f"lora: {source} is of another transformer: of {len(known)} blocks, and {len(tables)} there")
    transformer.config = config
    for branch, module in added.items():
        transformer.add_module(branch, module.train(transformer.training))
    for name, value in full.items():
        state[name].copy_(value)
    for name, (a, b) in adapters.factors.items():
        moved = adapters.scale * (b.flatten(1) @ a.flatten(1)).view(there[name])
        state[name].copy_(state[name].float() + moved.to(state[name].device))
