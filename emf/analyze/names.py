"""What a user names on a command line, text encoders and backbones, and the folders they stand for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from emf.conditioning.encoder import Encoder
from emf.conditioning.load import Kind, kind_of, load
from emf.files import read_json, whole_path
from emf.weights.tensors import module_stamp

SMALL = ("trained", "blurred", "bag-of-words", "random")
"""The digits' own encoders, all of the shipped base's weights but the last: as it was trained; words taken for one two
by two; its word embeddings alone, without order or context; weights that nothing was trained of."""


@dataclass(frozen=True)
class EncoderName:
    """An encoder on a command line: NAME=KIND:FOLDER, or NAME=FOLDER, of which the kind is found; NAME= may be absent.
    digits:WHICH is one of SMALL."""

    name: str
    kind: str
    """One of emf.conditioning.load's, "run", or "digits"."""
    folder: Path
    """Of the digits' own encoders the name in the place of a folder."""

    @classmethod
    def parse(cls, text: str) -> EncoderName:
        """Raises ValueError where there is no such folder, and on a folder that holds no text encoder."""
        name, equals, where = text.partition("=")
        if not equals:
            name, where = "", text
        kind, colon, folder = where.partition(":")
        if colon and kind == "digits":
            if folder not in SMALL:
                raise ValueError(f"analyze: {text!r}: the digits' own encoders are {', '.join(SMALL)}")
            return cls(name or where, kind, Path(folder))
        if not (colon and kind in get_args(Kind)):
            kind, folder = "", where
        path = Path(folder)
        name = name or path.resolve().name
        if not folder or not path.is_dir():
            raise ValueError(
                f"analyze: {text!r} names no folder; expected FOLDER of a text encoder or a run, NAME=FOLDER, "
                f"NAME=KIND:FOLDER with KIND one of {', '.join(get_args(Kind))}, or digits:WHICH with one of "
                f"{', '.join(SMALL)}"
            )
        return cls(name, kind or ("run" if is_run(path) else _kind(path)), path)

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Encoder:
        """The encoder, in eval mode. Raises ValueError where the folder holds another."""
        if self.kind == "run":
            from emf.weights.folders import load as load_network

            encoder = load_network(self.folder)[1].encoder
            assert isinstance(encoder, Encoder)
        elif self.kind == "digits":
            encoder = _small(str(self.folder))
        else:
            encoder = load(self.kind, self.folder, dtype=dtype)  # type: ignore[arg-type]
        return encoder.to(device, dtype).eval()

    @property
    def place(self) -> str:
        """Its kind and where it lies, as results are claimed by."""
        return f"{self.kind}:{self.folder if self.kind == 'digits' else whole_path(self.folder)}"

    def stamp(self) -> str:
        """A digest that changes with the encoder's files."""
        from emf.weights.folders import at_weights

        if self.kind == "digits":
            return f"{self.place} {module_stamp(_small(str(self.folder)))}"
        stamp = at_weights(self.folder, folder_stamp) if self.kind == "run" else folder_stamp(self.folder)
        return f"{self.kind} {stamp}"


def _kind(folder: Path) -> str:
    try:
        return kind_of(folder)
    except ValueError as error:
        raise ValueError(
            f"analyze: {folder} is no run, no export and no text encoder's folder "
            f"({str(error).removeprefix('conditioning: ')})"
        ) from None


def _small(which: str) -> Encoder:
    """One of SMALL."""
    from emf.conditioning.small import SmallEncoder
    from emf.data.digits import WORDS
    from emf.model.sizes import EncoderConfig
    from emf.recipes import BASE
    from emf.weights.start import read_init

    sizes = EncoderConfig(num_hidden_layers=0) if which == "bag-of-words" else EncoderConfig(blurred=which == "blurred")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SmallEncoder(sizes, WORDS)
    if which != "random":
        state = {k.removeprefix("encoder."): w for k, w in read_init(BASE).items() if k.startswith("encoder.")}
        own = encoder.state_dict().keys()
        encoder.load_state_dict({k: w for k, w in state.items() if k in own})
    return encoder


def is_run(folder: Path) -> bool:
    """A run's folder, one of its checkpoints, an export, or a folder from emf convert."""
    from emf.weights.checkpoints import FOLDER

    if (folder / FOLDER).is_dir() or (folder / "model_index.json").is_file():
        return True
    try:
        tree = read_json(folder / "config.json")
    except ValueError:
        return False
    return isinstance(tree, dict) and ("objective" in tree or {"source", "transformer"} <= tree.keys())


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
        raise ValueError(f"analyze: {problem}; give each as FOLDER, NAME=FOLDER or NAME=KIND:FOLDER")
    return encoders


def parse_runs(texts: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER or FOLDER, two at least, of flow-matching runs or exports. Raises ValueError."""
    runs: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals and name else path.resolve().name
        if not path.is_dir() or not is_run(path) or name in runs or os.sep in name:
            problem = "there are two of this name" if name in runs else "no such folder, or no name for one"
            if path.is_dir() and not is_run(path):
                problem = "it holds no run"
            raise ValueError(f"analyze: {text!r}: {problem}; expected NAME=FOLDER, a flow-matching run or an export")
        runs[name] = path
    if len(runs) < 2:
        raise ValueError(f"analyze: {len(runs)} backbones; give two or more, each as NAME=FOLDER")
    return runs
