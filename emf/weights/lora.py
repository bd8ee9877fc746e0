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
from emf.weights.adapter_settings import STAMP, scale_of, stamp_in, stamp_of
from emf.weights.branches import BRANCHES, SCALES
from emf.weights.card import write_adapters_card
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
FACTORS = (".lora_A.weight", ".lora_B.weight")


def export_adapters(
    run: Path | str,
    out: Path | str,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    text: Path | None = None,
) -> Config:
    """What a run with adapters, or one of its checkpoints, has learned, as the folder `out`, whose README.md says what
    base and text encoder they belong to. Returns the run's config. text: where the text encoder lies; None: where the
    run says. Raises ValueError where `out` exists, the run has no adapters, or it trained its text encoder too."""
    from emf.network.adapters import peft_settings

    run, out = Path(run), Path(out)
    refuse_existing(out, WHO)
    config, network = load_run(run, text)
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
        said = {k: str(getattr(config.transformer, k)) for k in SCALES}
        said[STAMP] = stamp_in(network.transformer, config.lora.scale)
        write_file(part / FULL, items(full, as_written), metadata=said)
        write_adapters_card(config, part, out.name)
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
    stamp: str
    """What they are known by."""


def read_adapters(folder: Path | str) -> Adapters:
    """A folder in peft's or diffusers' form, ours or another's. Raises ValueError where it is neither, or its settings
    ask for more than W + alpha / rank B A."""
    folder = Path(folder)
    peft_form = (folder / PEFT_SETTINGS).is_file()
    if peft_form:
        file, prefix, settings = folder / PEFT, PEFT_PREFIX, read_object(folder / PEFT_SETTINGS, "lora")
    else:
        file, prefix = folder / DIFFUSERS, DIFFUSERS_PREFIX
        if not file.is_file():
            raise ValueError(f"lora: {folder} holds no adapters; expected {PEFT_SETTINGS} and {PEFT}, or {DIFFUSERS}")
        told = parse_json(read_metadata(file).get(DIFFUSERS_SETTINGS, "{}"), f"lora: {DIFFUSERS_SETTINGS} of {file}")
        settings = {k.removeprefix(prefix): v for k, v in told.items()} if isinstance(told, dict) else {}
    scale_of(settings | {"r": None, "lora_alpha": 1}, 1, folder)  # its kind is said before what a kind's file lacks
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
    # diffusers takes the rank where no alpha is said; peft writes it always
    scale = scale_of(settings, rank, folder, None if peft_form else rank)
    factors = {f"{k}.weight": (a[k], b[k]) for k in a}
    full, times, stamp = dict[str, Tensor](), dict[str, float](), stamp_of(factors, scale)
    if (beside := folder / FULL).is_file():
        parts, said = Weights([beside]), read_metadata(beside)
        full, stamp = {k: parts.read(k) for k in parts.entries}, said.get(STAMP, stamp)
        try:
            times = {k: float(said[k]) for k in SCALES}
        except (KeyError, ValueError):
            raise ValueError(f"lora: {beside} does not say its {SCALES[0]} and {SCALES[1]}; export again") from None
        if wrong := [k for k, x in times.items() if not (math.isfinite(x) and x > 0)]:
            raise ValueError(f"lora: {beside} says {wrong[0]} {times[wrong[0]]}; expected a positive number")
    for where, named in ((file, [(k, x) for k, pair in factors.items() for x in pair]), (beside, [*full.items()])):
        for name, x in named:
            if not x.is_floating_point() or not x.isfinite().all():
                raise ValueError(f"lora: {where}: of {name} there is NaN or inf, or no number of a floating point")
    return Adapters(factors, scale, full, times, stamp)


@torch.no_grad()
def put_on(transformer: Transformer, adapters: Adapters, source: Path | str) -> None:
    """Merge adapters into a transformer's weights, and put what was trained in full in the place of its own. A base
    without EMF's two time embedders gets them. The products are made in float32.

    source: where they come from, for errors. Raises ValueError, before anything is changed, where they belong to
    another transformer, or are in its weights already.
    """
    if adapters.stamp in transformer.adapters:
        raise ValueError(f"lora: {source} is merged in these weights already")
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
    transformer.config, transformer.adapters = config, (*transformer.adapters, adapters.stamp)
    for branch, module in added.items():
        transformer.add_module(branch, module.train(transformer.training))
    for name, value in full.items():
        state[name].copy_(value)
    for name, (a, b) in adapters.factors.items():
        moved = adapters.scale * (b.flatten(1) @ a.flatten(1)).view(there[name])
        state[name].copy_(state[name].float() + moved.to(state[name].device))
