"""`emf`: the commands. What a user got wrong is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
except ImportError:
    raise SystemExit(
        "error: the emf commands need more than the kernels do: pip install 'emf-meanflow[train]'"
    ) from None

from emf.cli import analyze as analyzing
from emf.cli import data as on_data
from emf.cli import evaluate as evaluating
from emf.cli import runs as commands
from emf.config import Config, one_line
from emf.recipes import RECIPES, from_file


class Diverged(RuntimeError):
    """A run's loss is NaN or inf."""


@contextmanager
def report_errors() -> Iterator[None]:
    """A ValueError is the user's: its line, exit code 2. A diverged run ends with 3, an interrupted one with 130."""
    try:
        yield
    except (ValueError, Diverged) as error:
        if os.environ.get("RANK", "0") == "0":  # every rank sees the same
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 3) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; --resume True continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass(frozen=True)
class _Run:
    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder to write: config.json, metrics.jsonl, checkpoints."""
    resume: bool = False
    """Continue from the newest checkpoint in it; without one, start."""


def parse_train(arguments: list[str]) -> tuple[Config, Path, bool]:
    """(config, out, resume) from `<recipe | config.json> --out DIR [--resume True] [--field value ...]`."""
    names = ", ".join(RECIPES)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print("usage: emf train RECIPE|CONFIG.json --out DIR [--resume True] [--field value ...]\n")
        print(
            "Trains in this process; `deepspeed --module emf.train ...` takes the same arguments, for several ranks.\n"
        )
        for name, recipe in RECIPES.items():
            print(f"  {name:20} {(recipe.__doc__ or '').splitlines()[0]}")
        print("\n`emf train RECIPE --help` lists every field with its default.")
        raise SystemExit(0)
    if first in RECIPES:
        config = RECIPES[first]()
    elif first.endswith(".json"):
        config = from_file(Path(first))
    else:
        raise ValueError(f"train: no recipe {first!r}; recipes are {names}, or give a config.json")
    # every field takes a value (`--resume True`), as config.json's fields do
    style = (tyro.conf.FlagConversionOff,)
    parsed = one_line(tyro.cli, _Run, args=arguments[1:], default=_Run(config), prog=f"emf train {first}", config=style)
    if parsed.out is None:
        raise ValueError("train: say where to write: --out DIR")
    return parsed.config, parsed.out, parsed.resume


def _deferred(command: Callable[..., None]) -> Callable[..., Any]:
    """A command that is parsed now and called afterwards, its errors being its own."""

    @wraps(command)
    def later(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return partial(command, *args, **kwargs)

    return later


def main() -> None:
    """Entry of `emf`."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"]:
        from emf.train.loop import main as train

        return train(arguments[1:])

    def train_help() -> None:
        """Train a recipe, or a config.json again (`emf train --help`)."""

    def evaluate_help() -> None:
        """Score: digits (a run of the small world), geneval, dpg or hps (a folder of images)."""

    def analyze_help() -> None:
        """Compare text encoders: discriminability, disentanglement; flow matching at few steps: steps."""

    def data_help() -> None:
        """Look at image-text data: inspect."""

    c, e, a = commands, evaluating, analyzing
    groups: dict[str, dict[str, Any]] = {
        "evaluate": {"digits": e.on_digits, "geneval": e.geneval, "dpg": e.dpg, "hps": e.hps},
        "analyze": {
            "discriminability": a.discriminability,
            "disentanglement": a.disentanglement,
            "steps": a.steps,
        },
        "data": {"inspect": on_data.inspect},
    }
    chosen: dict[str, Any] = {
        "train": train_help,
        "generate": c.generate,
        "evaluate": evaluate_help,
        "analyze": analyze_help,
        "report": c.report,
        "plan": c.plan,
        "convert": c.convert,
        "data": data_help,
        "cache": on_data.cache,
        "export": c.export,
        "release": c.release,
        "paper": c.paper,
    }
    with report_errors():
        parser = tyro.extras.subcommand_cli_from_dict
        prog = "emf"
        if arguments and arguments[0] in groups:
            prog, chosen, arguments = f"emf {arguments[0]}", groups[arguments[0]], arguments[1:]
        later = {name: _deferred(command) for name, command in chosen.items()}
        one_line(parser, later, args=arguments or ["--help"], prog=prog)()
