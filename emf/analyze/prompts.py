"""Prompts from files, and prompts with random parts removed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Unit = Literal["word", "phrase", "sentence"]
# where a prompt is cut: between words; after a comma, semicolon, colon or sentence end; after a sentence end
CUTS = {"word": r"\s+", "phrase": r"(?<=[,;:.!?])\s+", "sentence": r"(?<=[.!?])\s+"}
KEYS = ("prompt", "caption", "text")


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """(prompts, their names) of a folder of texts (DPG-Bench: prompts/<id>.txt, one prompt a file), of a jsonl file
    (one object a line, its `prompt`, `caption` or `text`), or of a text file (one prompt a line). Raises ValueError
    where there is none."""
    expected = "expected a folder of texts, a jsonl file, or a text file with a prompt a line"
    try:
        if path.is_dir():
            files = sorted(f for f in path.glob("*.txt") if f.is_file())
            found = [(" ".join(f.read_text().split()), f.stem) for f in files]
        else:
            lines = enumerate(path.read_text().splitlines(), 1)
            read = _json_prompt if path.suffix in (".jsonl", ".json") else lambda line, _: line
            found = [(" ".join(read(line, f"{path}:{n}").split()), str(n)) for n, line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"analyze: {path} cannot be read: {reason}; {expected}") from None
    found = [(text, name) for text, name in found if text]
    if not found:
        raise ValueError(f"analyze: {path} holds no prompt; {expected}")
    return [text for text, _ in found], [name for _, name in found]


def _json_prompt(line: str, where: str) -> str:
    try:
        tree = json.loads(line)
    except ValueError:
        tree = None
    texts = [tree[k] for k in KEYS if isinstance(tree.get(k), str)] if isinstance(tree, dict) else []
    if not texts:
        raise ValueError(f"analyze: {where} is no JSON object with {', '.join(KEYS[:-1])} or {KEYS[-1]}")
    return str(texts[0])


@dataclass(frozen=True)
class Shortening:
    """How parts are removed from a prompt. Raises ValueError on what cannot be."""

    unit: Unit = "word"
    """word; phrase: what commas, semicolons, colons and sentence ends part; sentence."""
    fraction: float = 0.5
    """Of a prompt's units that are removed, rounded; at least one is removed and one is left."""
    repeats: int = 4
    """Random removals of each prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unit not in CUTS or not 0 < self.fraction < 1 or self.repeats < 1 or self.seed < 0:
            raise ValueError(
                f"analyze: unit {self.unit!r}, fraction {self.fraction}, {self.repeats} repeats, seed {self.seed}; "
                f"expected {', '.join(CUTS)}; above 0 and below 1; at least 1; at least 0"
            )


def split_units(prompt: str, unit: Unit) -> list[str]:
    """A prompt's units in order, each with the punctuation that ends it."""
    return [part for part in re.split(CUTS[unit], prompt.strip()) if part]


def shorten(prompt: str, how: Shortening, rng: np.random.Generator) -> str | None:
    """The prompt without a random share of its units, the others in order; None where it has only one unit."""
    units = split_units(prompt, how.unit)
    n = len(units)
    if n < 2:
        return None
    removed = min(max(1, int(how.fraction * n + 0.5)), n - 1)
    kept = np.sort(rng.permutation(n)[removed:])
    return " ".join(units[i] for i in kept).rstrip(",;:")


def shortened(prompts: list[str], how: Shortening) -> list[list[str]]:
    """`repeats` shortened versions of each prompt, a function of the prompt's place and the seed; empty where it has
    only one unit."""
    versions = []
    for i, prompt in enumerate(prompts):
        rng = np.random.default_rng([how.seed, i])
        versions.append([s for s in (shorten(prompt, how, rng) for _ in range(how.repeats)) if s is not None])
    return versions
