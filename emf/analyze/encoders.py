"""Text encoders by name, and a caption's one vector."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from emf.analyze.vectors import Gathered, VectorCache
from emf.conditioning.encoder import Encoder, mean_pool
from emf.conditioning.load import LENGTHS, Kind, load

TextPooling = Literal["mean", "last"]
States = Literal["prompt", "caption", "condition", "connector"]
CUT = f"longer texts are cut: {', '.join(f'{kind} reads {n} tokens' for kind, n in LENGTHS.items())}"
"""A note below a table."""


@dataclass(frozen=True)
class Embedding:
    """How a caption becomes one vector."""

    pooling: TextPooling = "mean"
    """mean: over all tokens that are no padding; last: the last of them."""
    states: States = "prompt"
    """prompt: last hidden states of the caption inside the encoder's own prompt; caption: of the bare caption;
    condition: the states that the transformer's condition is made of (BLIP3o-NEXT: of the image tokens, drawn first);
    connector: what the transformer attends to, after the connector where there is one."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(TextPooling) or self.states not in get_args(States):
            kinds = f"{', '.join(get_args(TextPooling))} of {', '.join(get_args(States))}"
            raise ValueError(f"analyze: pooling {self.pooling!r} of states {self.states!r}; expected one of {kinds}")


@dataclass(frozen=True)
class EncoderName:
    """An encoder on a command line: NAME=KIND:FOLDER, or NAME=FOLDER of a run or an export; NAME= may be absent."""

    name: str
    kind: str
    """One of emf.conditioning.load's, or "run"."""
    folder: Path

    @classmethod
    def parse(cls, text: str) -> EncoderName:
        """Raises ValueError where there is no such folder, and on a folder that is no run without a kind."""
        name, equals, where = text.partition("=")
        if not equals:
            name, where = "", text
        kind, colon, folder = where.partition(":")
        if not (colon and kind in get_args(Kind)):
            kind, folder = "run", where
        path = Path(folder)
        name = name or path.resolve().name
        if not folder or not path.is_dir():
            raise ValueError(
                f"analyze: {text!r} names no folder; expected NAME=KIND:FOLDER with KIND one of "
                f"{', '.join(get_args(Kind))}, or NAME=FOLDER of a run"
            )
        if kind == "run" and not is_run(path):
            raise ValueError(
                f"analyze: {folder} is no run and no export; of an encoder's folder say its kind, "
                f"{name}=KIND:{folder} with KIND one of {', '.join(get_args(Kind))}"
            )
        return cls(name, kind, path)

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Encoder:
        """The encoder, in eval mode. Raises ValueError where the folder holds another."""
        if self.kind == "run":
            from emf.weights.folders import load_any

            encoder = load_any(self.folder)[1].encoder
            assert isinstance(encoder, Encoder)
        else:
            encoder = load(self.kind, self.folder, dtype=dtype)  # type: ignore[arg-type]
        return encoder.to(device, dtype).eval()

    def stamp(self) -> str:
        """A digest that changes with the encoder's files."""
        from emf.weights.folders import newest

        run = self.kind == "run" and not (self.folder / "model_index.json").is_file()
        return f"{self.kind} {folder_stamp(newest(self.folder) if run else self.folder)}"


def is_run(folder: Path) -> bool:
    """A run's folder, one of its checkpoints, or an export."""
    if (folder / "checkpoints").is_dir() or (folder / "model_index.json").is_file():
        return True
    try:
        tree = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and "objective" in tree


def folder_stamp(folder: Path) -> str:
    """A digest that changes with a folder's weights and settings, known by size and time."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".safetensors", ".json", ".model", ".txt"))
    said = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def parse_encoders(texts: Sequence[str]) -> list[EncoderName]:
    """Raises ValueError on none, and where two have one name."""
    encoders = [EncoderName.parse(text) for text in texts]
    names = [e.name for e in encoders]
    if not names or len({*names}) < len(names):
        twice = next((n for n in names if names.count(n) > 1), None)
        problem = f"two encoders are called {twice}" if twice else "no encoder"
        raise ValueError(f"analyze: {problem}; give each as NAME=KIND:FOLDER, or NAME=FOLDER of a run")
    return encoders


@torch.no_grad()
def embed_texts(encoder: Encoder, captions: Sequence[str], how: Embedding | None = None) -> Tensor:
    """One batch of captions -> [n, C] float32 on the CPU.

    Of a BLIP3o-NEXT whose states are those of the image tokens, each caption's tokens are drawn by a seed of its own
    text, so that they depend on nothing else."""
    how = how or Embedding()
    states: Tensor
    mask: Tensor | None
    if how.states in ("prompt", "caption"):
        states, mask = encoder.text_states(captions, template=how.states == "prompt")
    else:
        drawn: Tensor | None = None
        generate: Any = getattr(encoder, "generate", None)
        if generate is not None:
            seeds = [torch.Generator().manual_seed(zlib.crc32(c.encode())) for c in captions]
            drawn = generate(captions, seeds).cpu()
        ids, keep = (x.to(encoder.device) for x in encoder.tokenize(captions, drawn))
        states, mask = encoder.states(ids, keep) if how.states == "condition" else encoder(ids, keep)
    return pool(states, mask, how.pooling).cpu()


def pool(states: Tensor, mask: Tensor | None, pooling: TextPooling) -> Tensor:
    """States [B, L, C], mask [B, L] bool -> [B, C] float32: the mean over the kept tokens, or the last of them."""
    if pooling == "mean":
        return mean_pool(states, mask)
    if mask is None:
        return states[:, -1].float()
    kept = mask.to(states.device).long()
    last = (kept * torch.arange(kept.shape[1], device=kept.device)).argmax(1)
    return states[torch.arange(len(states), device=states.device), last].float()


class TextVectors:
    """The vectors of an encoder's captions, kept in a folder; the encoder is loaded when one is missing."""

    def __init__(
        self, encoder: EncoderName, how: Embedding, out: Path, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        self.encoder, self.how, self.dtype, self.device = encoder, how, dtype, device
        said = json.dumps([encoder.stamp(), asdict(how), dtype], sort_keys=True)
        self.cache = VectorCache(out / "cache" / f"text-{hashlib.sha256(said.encode()).hexdigest()[:12]}")

    def __call__(self, captions: Sequence[str], batch: int = 32) -> Gathered:
        """[len(captions), C], not in memory. Raises ValueError where the encoder cannot be loaded."""
        encoder = None
        if self.cache.missing(captions):
            encoder = self.encoder.load(getattr(torch, self.dtype), self.device)

        def compute(part: list[int]) -> np.ndarray:
            assert encoder is not None
            return embed_texts(encoder, [captions[i] for i in part], self.how).numpy()

        return self.cache.fill(captions, compute, batch, f"embed, {self.encoder.name}")
