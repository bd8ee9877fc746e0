"""Where a run's files lie. What its config names on the Hugging Face Hub is fetched, and every path of it is whole, so
that a run works and resumes from any folder; the same place spelled otherwise is the same run, and what was moved may
be named anew."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from emf.config import Config
from emf.data.sources import parse_source
from emf.files import read_lines
from emf.weights.hub import AUTOENCODER, ENCODER, SETTINGS, START, named
from emf.weights.start import ASSETS

CAPTIONS = ".txt"
"""Ending of a file of captions among config.run.prompts."""


def whole(path: Path) -> Path:
    """The path from the root. Links stay as they are: where one is made to lead elsewhere, the run follows. The name of
    weights that are shipped stays bare, and holds on any machine."""
    if not path.exists() and len(path.parts) == 1 and (ASSETS / path).is_file():
        return path
    return path.resolve() if ".." in path.parts else path.absolute()  # `..` behind a link is the system's to follow


def whole_source(text: str) -> str:
    """A source of data, as on a command line, with its path whole. What is no path of the disk stays for
    emf.data.sources to refuse."""
    source = parse_source(text)
    if "://" in source.path or source.path.startswith(("pipe:", "{/")):
        return text
    path = str(whole(Path(source.path)))
    further = text[len(source.path) :]
    if parse_source(path + further).path != path:  # the path ends in an @ and a number of its own
        further = f"@{source.weight}"
    return path + further


def fetched(config: Config, *, sizes: bool = False) -> Config:
    """The config with folders in the place of names on the Hugging Face Hub: of a snapshot of one commit, in the cache
    of the Hub's client, so that the run's config.json says which. sizes: fetch only what says the sizes of what is
    named, and no weights. Raises ValueError, saying what to download, where the Hub does not give it."""

    def folder(path: Path | None, needs: tuple[str, ...], who: str) -> Path | None:
        return path and named(path, SETTINGS if sizes else needs, who)

    condition = replace(config.condition, folder=folder(config.condition.folder, ENCODER, "config: condition.folder"))
    data = replace(config.data, vae=folder(config.data.vae, AUTOENCODER, "config: data.vae"))
    return replace(config, init=folder(config.init, START, "config: init"), condition=condition, data=data)


def located(config: Config) -> Config:
    """The config with every path whole, and with the captions of files in the place of the files that run.prompts
    names. Raises ValueError where such a file cannot be read."""
    made: Config = _located(config)
    prompts: list[str] = []
    for text in config.run.prompts:
        prompts += read_lines(whole(Path(text))) if text.endswith(CAPTIONS) else [text]
    if config.run.prompts and not prompts:
        raise ValueError(f"config: run.prompts {', '.join(config.run.prompts)} hold no caption; expected one a line")
    sources = tuple(map(whole_source, config.data.sources))
    return replace(made, run=replace(made.run, prompts=tuple(prompts)), data=replace(made.data, sources=sources))


def _located(settings: Any) -> Any:
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    changed = {name: _located(value) for name, value in values.items() if is_dataclass(value)}
    changed |= {name: whole(value) for name, value in values.items() if isinstance(value, Path)}
    return replace(settings, **changed)


def same_place(made: str, now: Path | str) -> bool:
    """Whether a path that a run was begun with is the path that it goes on with, or was moved since: then another one
    takes its place."""
    before = whole(Path(made))
    return made == str(now) or before.resolve() == Path(now).resolve() or not before.exists()


def same_source(made: str, now: str) -> bool:
    """The same of two sources of data, whose weights and caption keys must be the same too."""
    before, after = parse_source(made), parse_source(now)
    if replace(before, path="") != replace(after, path=""):
        return False
    pattern = any(c in before.path for c in "*?[{")  # says nothing of what is there
    return same_place(before.path, after.path) if not pattern else whole_source(made) == whole_source(now)
