"""`emf`: the commands. What a user got wrong is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from emf import config as configs
from emf.config import Config
from emf.recipes import RECIPES

# every field takes a value (`--resume True`), so that a config file turns into arguments and back
_STYLE = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)


@dataclass(frozen=True)
class _Run:
    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder to write: config.json, metrics.jsonl, checkpoints."""
    resume: bool = False
    """Continue from the newest checkpoint in it, if there is one."""


COMMANDS = {
    "train": "train a recipe, or a config.json again (several processes: deepspeed --module emf.train ...)",
    "generate": "captions to images with a trained checkpoint",
    "evaluate": "score a run's samples: scores.json and samples.png beside its checkpoints",
    "report": "a run's figures as one page: report.html",
    "release": "a run's averaged weights as one small file",
}


@contextmanager
def report_errors() -> Iterator[None]:
    """A ValueError is the user's: its line, exit code 2. Divergence and interruption: a line, exit codes 3 and 130."""
    from emf.train import Diverged

    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def parse_train(arguments: list[str]) -> tuple[Config, Path, bool]:
    """(config, out, resume) from `<recipe | config.json> --out DIR [--resume True] [--field value ...]`; tyro exits with 2 on what it does not know."""
    names = ", ".join(RECIPES)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(f"usage: emf train RECIPE|CONFIG.json --out DIR [--resume True] [--field value ...]\n\nrecipes: {names}")
        print("\n`emf train RECIPE --help` lists every field with its default.")
        raise SystemExit(0)
    overrides: list[str] = []
    if first in RECIPES:
        defaults = RECIPES[first]()
    elif first.endswith(".json"):
        tree = configs.read(Path(first))
        defaults = RECIPES.get(str(tree.get("recipe")), RECIPES["digits"])()
        # the file's values become arguments, so that the one parser checks them; the command line comes after and wins
        overrides = configs.to_arguments(tree)
    else:
        raise ValueError(f"train: no recipe {first!r}; recipes are {names}, or give a config.json")
    parsed = tyro.cli(_Run, args=[*overrides, *arguments[1:]], default=_Run(defaults), prog=f"emf train {first}", config=_STYLE)
    if parsed.out is None:
        raise ValueError("train: say where to write: --out DIR")
    return parsed.config, parsed.out, parsed.resume
