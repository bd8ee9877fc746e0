"""The command line of training: `emf train ...`, and `deepspeed --module emf.train ...` on every rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from emf.arguments import NEEDS_EXTRA, parse, to_arguments
from emf.config import Config
from emf.errors import cleaned_up, ended_anywhere, report_errors
from emf.files import check_text
from emf.recipes import RECIPES, from_file
from emf.weights.hub import SETTINGS, START, named

try:
    import tyro
except ImportError:
    raise SystemExit(NEEDS_EXTRA) from None


@dataclass(frozen=True)
class Run:
    """What `emf train` is asked for, and `emf plan` too."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder for the run: config.json, metrics.jsonl and checkpoints are written here."""
    resume: bool = False
    """Continue from the newest checkpoint in --out; where there is none, begin."""


USAGE = {
    "train": "--out DIR [--resume] [--field value ...]\n\n"
    "Trains in this process; `deepspeed --module emf.train ...` takes the same arguments, for several ranks.",
    "plan": "[--gpus N] [--memory GIB] [--field value ...]\n\n"
    "Says what the same `emf train` would hold, compute and write: memory by ZeRO stage, operations, days, disk.",
}
Asked = TypeVar("Asked", bound=Run)


def parse_run(arguments: list[str], kind: type[Asked], verb: str) -> Asked:
    """`<recipe | config.json> [--field value ...]` behind a verb, as that kind of request. Sizes of the folder that
    --init names go before the recipe's, and what the command line says goes before both."""
    names = ", ".join(RECIPES)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(f"usage: emf {verb} RECIPE|CONFIG.json {USAGE[verb]}\n")
        for name, recipe in RECIPES.items():
            print(f"  {name:20} {(recipe.__doc__ or '').splitlines()[0]}")
        print(f"\n`emf {verb} RECIPE --help` lists every field with its default.")
        raise SystemExit(0)
    if first in RECIPES:
        config = RECIPES[first]()
    elif first.endswith(".json"):
        config = from_file(Path(first))
    elif Path(first).is_file():
        raise ValueError(f"{verb}: {first} is a file, but no .json; give a run's config.json, or one of {names}")
    elif Path(first).is_dir():
        raise ValueError(f"{verb}: {first} is a folder; give the config.json in it, or one of {names}")
    elif first.startswith("-"):
        raise ValueError(f"{verb}: the recipe comes first: emf {verb} RECIPE {first} ...; recipes are {names}")
    else:
        raise ValueError(f"{verb}: no recipe {first!r}; recipes are {names}, or give a config.json")
    known = to_arguments(_known_to_init(arguments[1:], config, sizes=verb == "plan"))
    asked: Asked = parse(kind, [*known, *arguments[1:]], f"emf {verb} {first}", default=kind(config))
    if asked.config.epochs is not None and any(word.split("=")[0] == "--steps" for word in arguments):
        raise ValueError(f"{verb}: --epochs and --steps both say how long the run is; give one of them")
    if asked.out is not None:
        check_text(str(asked.out), f"{verb}: the path --out {str(asked.out)!r}")
    for name, text in _texts(asked.config):  # config.json could not hold a byte that is not UTF-8
        check_text(text, f"config: {name} {text!r}")
    if asked.config.recipe != config.recipe:
        raise ValueError(f"{verb}: --recipe {asked.config.recipe} has no effect; say it in the place of {first}")
    return asked


def parse_train(arguments: list[str]) -> tuple[Config, Path, bool]:
    """(config, out, resume) from `<recipe | config.json> --out DIR [--resume] [--field value ...]`."""
    parsed = parse_run(arguments, Run, "train")
    if parsed.out is None:
        raise ValueError("train: say where to write: --out DIR")
    return parsed.config, parsed.out, parsed.resume


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The texts and paths in a config, by the name of their field."""
    if isinstance(value, str | Path):
        yield name, str(value)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _texts(getattr(value, f.name), f"{name}.{f.name}".lstrip("."))
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item, name)


def _known_to_init(arguments: list[str], config: Config, sizes: bool) -> dict[str, Any]:
    """The settings that the folder or file after --init knows, by section; none where there is neither. sizes: of a
    name on the Hub no weights are fetched."""
    given = [after for word, after in pairwise([*arguments, ""]) if word == "--init"]
    given += [word.removeprefix("--init=") for word in arguments if word.startswith("--init=")]
    if not given:
        return {}
    source = named(given[-1], SETTINGS if sizes else START, "config: init")
    if not source.exists():
        return {}
    from emf.weights.start import sizes_of  # seconds, which a command without --init need not take

    return sizes_of(source, config)


def main(arguments: list[str] | None = None) -> None:
    """Entry of `emf train` and of the deepspeed launcher."""
    # the launcher hands every process --local_rank=N; the environment says the same
    arguments = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank")]
    with report_errors():
        config, out, resume = parse_train(arguments)
        with stopped_early(out):
            from emf.train.loop import train  # seconds, which --help need not take

            train(config, out, resume)


@contextmanager
def stopped_early(out: Path) -> Iterator[None]:
    """SIGTERM before the first step, when there is nothing to save, ends the process with exit code 143, in one line
    that is said once. Of several ranks each ends by itself, since it may wait for the others where Python hears no
    signal."""
    said, there = f"asked to stop: no step was under way, and {out} holds what it held", out.exists()

    def last() -> None:
        if os.environ.get("RANK") == "0":
            if not there:
                with suppress(OSError):
                    out.rmdir()  # which only an empty folder can be
            print(said, file=sys.stderr, flush=True)

    if os.environ.get("WORLD_SIZE", "1") != "1":
        with ended_anywhere(last):
            yield
        return
    with cleaned_up():
        try:
            yield
        except SystemExit as end:
            if end.code == 143:
                print(said, file=sys.stderr)
            raise
