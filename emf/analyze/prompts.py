"""Prompts from a file, and prompts without some of their parts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from emf.analyze.choices import Shortening, Unit
from emf.files import files_in, numbered_jsonl, numbered_lines, read_text

# where a prompt is cut: between words; after a comma, semicolon, colon or sentence end; after a sentence end
CUTS: dict[Unit, str] = {"word": r"\s+", "phrase": r"(?<=[,;:.!?])\s+", "sentence": r"(?<=[.!?])\s+"}
KEYS = ("prompt", "caption", "text")


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """(prompts, their names) of a folder of texts (DPG-Bench: prompts/<id>.txt, one prompt a file), of a jsonl file
    (one object a line, its `prompt`, `caption` or `text`), or of a text file (one prompt a line). Raises ValueError
    where there is none."""
    expected = "expected a folder of texts, a jsonl file, or a text file with a prompt a line"
    if path.is_dir():
        found = [(read_text(f), f.stem) for f in files_in(path, "*.txt") if f.is_file()]
    elif path.suffix in (".jsonl", ".json"):
        found = [(_prompt(row, f"{path}:{n}"), str(n)) for n, row in numbered_jsonl(path)]
    elif path.exists():
        found = [(line, str(n)) for n, line in numbered_lines(path)]
    else:
        raise ValueError(f"analyze: {path} does not exist; {expected}")
    found = [(" ".join(text.split()), name) for text, name in found]
    if not found:
        raise ValueError(f"analyze: {path} holds no prompt; {expected}")
    if blank := [name for text, name in found if not text]:
        raise ValueError(f"analyze: {path}: {len(blank)} of {len(found)} prompts are empty, {blank[0]} the first")
    return [text for text, _ in found], [name for _, name in found]


def _prompt(row: dict[str, object], where: str) -> str:
    texts = [text for key in KEYS if isinstance(text := row.get(key), str)]
    if not texts:
        raise ValueError(f"analyze: {where} is no JSON object with {', '.join(KEYS[:-1])} or {KEYS[-1]}")
    return texts[0]


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
