"""A published checkpoint is made a folder of ours, a tensor at a time.

The folder holds config.json (the sizes of the transformer, and where it came from) and transformer.safetensors, which
has both of EMF's time embedders. Of BLIP3o-NEXT it holds language_model/ (a Qwen3 folder as transformers reads it),
connector.safetensors; config.json then has the Qwen3 config, the special token ids and the sizes of the connector too.
Its autoencoder and image tokenizer are left out: they are read from SANA's folder and from TA-Tok's own file, which say
their sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emf.files import files_in, refuse_existing, whole_folder
from emf.idle import refuse_idle, unless
from emf.model.sizes import TransformerConfig
from emf.model.transformer import Transformer
from emf.show.progress import count_bytes
from emf.weights import blip3o_parts, tensors
from emf.weights.branches import BRANCHES, time_branches
from emf.weights.converted import TRAINED
from emf.weights.layouts import SANA, UNUSED, Layout, Piece, detect, infer, read_config
from emf.weights.tensors import Item, Weights

WHO = "weights: "  # how errors about the folder begin
LISTED = 20  # names in an error


@dataclass(frozen=True)
class Wanted:
    """A tensor that a part of the folder should have."""

    name: str
    piece: Piece
    """Where it lies in the source."""
    shape: tuple[int, ...] | None
    """None: whatever the source has."""
    make: Callable[[], Tensor] | None = None
    """Computes the tensor from the piece, where it is not a copy of it."""


Parts = dict[str, list[Wanted]]
"""What each part should have, by the path of its files in the folder, without their ending."""


def convert(
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    embedder_init: Literal["duplicate", "preserve"] = "duplicate",
    time_scale: float = 1.0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    allow_misshaped: Sequence[str] = (),
    shard_gb: float = 5.0,
) -> str:
    """Make published weights the folder `out`. Returns what was found, in one line.

    source: a diffusers SANA folder or its transformer folder, an original .pth, a BLIP3o-NEXT folder, a released EMF
            checkpoint (BLIP3o-NEXT's layout or a bare transformer), or one file of weights
    config: diffusers' config.json of the transformer, where the source has none and is of no published width
    embedder_init, time_scale: how EMF's two time embedders are made where the source has none; see add_time_branches
    dtype: of the tensors that are written; None keeps each tensor's own
    allow_missing: patterns (fnmatch) of the source's names that may be missing; emf.weights.converted leaves those
                   weights at their initialisation
    allow_extra: patterns of names that may be there without a use; they are dropped
    allow_misshaped: patterns of names that may have another shape; they are dropped, and so missing
    shard_gb: the largest file that is written, in 1e9 bytes
    The peak of memory is the input file that is mapped, and one tensor where it is computed. Raises ValueError, of one
    line, on whatever does not fit, and where `out` exists.
    """
    refuse_existing(out, WHO)
    if not (math.isfinite(shard_gb) and shard_gb > 0):
        raise ValueError(f"convert: shard_gb {shard_gb} must be a positive number")
    folder = source / "transformer" if (source / "transformer").is_dir() else source
    weights = Weights(_files(folder))
    layout = detect(weights.entries.keys(), folder)
    model = replace(_sizes(weights, layout, config), dual_time=True, time_scale=time_scale)
    parts: Parts = {}
    parts["transformer"], kind = _transformer(weights, layout, model, embedder_init)
    if kind.endswith(TRAINED):
        how = {"embedder_init": unless(embedder_init, "duplicate")}
        refuse_idle("convert", how, f"{source} has its time embedders already")
    origin = {"path": str(source.resolve()), "layout": kind, "embedder_init": embedder_init}
    about: dict[str, Any] = {"transformer": asdict(model), "source": origin}
    if layout.prefix == SANA:
        qwen, tokens = blip3o_parts.read_config(folder, weights.entries)
        further = blip3o_parts.parts(weights.entries, qwen, model.caption_channels, folder)
        parts |= {p.path: [Wanted(k, Piece(v), p.shapes.get(k)) for k, v in p.names.items()] for p in further}
        connector = dict(in_channels=further[1].shapes["linear_1.weight"][1], out_channels=model.caption_channels)
        about |= {"language_model": qwen, "tokens": tokens, "connector": connector}
    unused = {"lm_head.weight"} if about.get("language_model", {}).get("tie_word_embeddings") else set()
    unused |= set(UNUSED) if layout.original else set()
    patterns = tuple(allow_missing), tuple(allow_extra), tuple(allow_misshaped)
    beside = blip3o_parts.beside(weights.entries) if layout.prefix == SANA else []
    unused |= set(beside)
    about["missing"] = left_out = _check(weights, parts, unused, patterns, source)
    plan = {path: _items(weights, wanted, left_out.get(path, []), dtype) for path, wanted in parts.items()}
    total = sum(item.bytes for items in plan.values() for item in items)
    with whole_folder(out, WHO) as unfinished, count_bytes("convert", total) as advance:
        for path, items in plan.items():
            most = total if path == "connector" else int(shard_gb * 1e9)  # which is read as one file
            tensors.write((unfinished / path).parent, Path(path).name, items, advance, most)
        if "language_model" in about:
            blip3o_parts.write_language_files(folder, unfinished / "language_model", about["language_model"], dtype)
        (unfinished / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    said = f"{source}: {kind}, {len(weights.entries)} tensors, {weights.bytes / 1e9:.2f} GB"
    if beside:
        said += f"; without the {len(beside)} of its autoencoder and image tokenizer"
        said += ", which --data.vae and --data.ta-tok name"
    return said


def _files(folder: Path) -> list[Path]:
    if found := tensors.find(folder):
        return found
    nested = files_in(folder / "checkpoints", "*.pth")  # where the original repositories have theirs
    if len(nested) != 1:
        raise ValueError(
            f"convert: {folder} holds no weights; expected a diffusers SANA folder, an original .pth, a BLIP3o-NEXT "
            "folder or a released EMF checkpoint"
        )
    return nested


def _sizes(weights: Weights, layout: Layout, given: Path | None) -> TransformerConfig:
    beside = weights.files[0].parent / "config.json"
    if given is None and layout == Layout() and beside.is_file():
        given = beside
    if given is not None:
        return read_config(given)
    return infer({k: e.shape for k, e in weights.entries.items()}, layout, weights.files[0].parent)


def _transformer(
    weights: Weights, layout: Layout, model: TransformerConfig, embedder_init: str
) -> tuple[list[Wanted], str]:
    """(the tensors that our transformer needs, the source's layout in words)."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Transformer(model).state_dict().items()}
    released = any(k.startswith(f"{layout.prefix}{b}.") for k in weights.entries for b in BRANCHES)
    make = time_branches(lambda name: _read(weights, layout.find(f"time_embed.{name}")), model, embedder_init)
    wanted = []
    for name, shape in shapes.items():
        branch, _, leaf = name.partition(".")
        if released or branch not in BRANCHES:
            wanted.append(Wanted(name, layout.find(name), shape))
        else:
            computed = partial(make, branch[-1], leaf) if embedder_init == "preserve" else None
            wanted.append(Wanted(name, layout.find(f"time_embed.{leaf}"), shape, computed))
    kind = "BLIP3o-NEXT" if layout.prefix else "original SANA" if layout.original else "diffusers SANA"
    return wanted, kind + (TRAINED if released else "")


def _check(
    weights: Weights, parts: Parts, unused: set[str], patterns: tuple[Sequence[str], ...], source: Path
) -> dict[str, list[str]]:
    """The names, by part, that are missing and may be. Raises ValueError with a list of what is missing, has no use or
    has another shape, and is allowed by no pattern."""
    entries = weights.entries
    every = [w for wanted in parts.values() for w in wanted]
    missing = sorted({w.piece.key for w in every} - entries.keys())
    extra = sorted(entries.keys() - {w.piece.key for w in every} - unused)
    misshaped = {
        w.piece.key: f"{w.piece.key} {[*w.piece.shape(entries[w.piece.key].shape)]} for {[*w.shape]}"
        for w in every
        if w.piece.key in entries and w.shape is not None and w.piece.shape(entries[w.piece.key].shape) != w.shape
    }
    faults: list[str] = []
    room = LISTED
    for what, found, allowed in zip(
        ("missing", "extra", "misshaped"), (missing, extra, misshaped), patterns, strict=True
    ):
        bad = [k for k in found if not any(fnmatchcase(k, pattern) for pattern in allowed)]
        if bad:
            shown = [misshaped.get(k, k) if what == "misshaped" else k for k in bad[:room]]
            more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
            faults.append(f"{len(bad)} {what} ({', '.join(shown + more)})")
            room = max(room - len(shown), 1)
    if faults:
        raise ValueError(
            f"convert: {source}: {', '.join(faults)}; name in --allow-missing, --allow-extra or --allow-misshaped what "
            "may be so"
        )
    gone = {*missing, *misshaped}
    if lost := sorted(w.piece.key for w in every if w.make is not None and w.piece.key in gone):
        raise ValueError(f"convert: {source}: {lost[0]} does not fit, and embedder_init preserve computes from it")
    left_out = {path: [w.name for w in wanted if w.piece.key in gone] for path, wanted in parts.items()}
    return {path: names for path, names in left_out.items() if names}


def _items(weights: Weights, wanted: list[Wanted], left_out: list[str], dtype: str | None) -> list[Item]:
    """The tensors of a part in the order in which they are written: first what is computed, before a file is mapped
    whole, then file by file of the source."""
    place = {file: i for i, file in enumerate(weights.files)}
    kept, items = [w for w in wanted if w.name not in left_out], []
    for w in sorted(
        kept, key=lambda w: (w.make is None, place[weights.entries[w.piece.key].file], w.piece.key, w.name)
    ):
        entry = weights.entries[w.piece.key]
        shape = w.piece.shape(entry.shape)
        cast = getattr(torch, dtype) if dtype is not None and entry.dtype.is_floating_point else entry.dtype
        items.append(Item(w.name, shape, cast, w.make or partial(_read, weights, w.piece)))
    return items


def _read(weights: Weights, piece: Piece) -> Tensor:
    whole = weights.read(piece.key)
    return whole if piece.parts == 1 else whole.unflatten(0, (piece.parts, -1))[piece.part]
