"""`emf`: which command does what. What a user got wrong is one line on stderr and exit code 2.

The commands' modules import what computes in their functions alone, so that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

from emf.arguments import NEEDS_EXTRA, one_line, options_of, spelled
from emf.errors import as_command, report_errors
from emf.files import check_text
from emf.limits import check_limit, limits_of

try:
    import tyro
except ImportError:
    raise SystemExit(NEEDS_EXTRA) from None

from emf.cli import analyze, data, evaluate, generate, pages, planning, weights
from emf.train.command import main as train


def _train() -> None:
    """Train a recipe, or a config.json again (`emf train --help`)."""


def _plan() -> None:
    """Memory, operations, days and files of the same `emf train`, before it is started (`emf plan --help`)."""


def _evaluate() -> None:
    """Score: digits (a run of the small world), geneval, dpg, hps, pick or fid (a folder of images)."""


def _analyze() -> None:
    """Choose a text encoder: encoders, discriminability, disentanglement; flow matching at few steps: steps."""


def _data() -> None:
    """Look at image-text data: inspect."""


COMMANDS: dict[str, Callable[..., None]] = {
    "train": _train,
    "generate": generate.generate,
    "app": pages.app,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "report": pages.report,
    "plan": _plan,
    "convert": weights.convert,
    "data": _data,
    "cache": data.cache,
    "export": weights.export,
    "release": weights.release,
    "paper": pages.paper,
    "openmoji": pages.openmoji,
}
"""In the order of `emf --help`. Those of a group, train and plan have their line of help here alone."""

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "evaluate": {
        "digits": evaluate.on_digits,
        "geneval": evaluate.geneval,
        "dpg": evaluate.dpg,
        "hps": evaluate.hps,
        "pick": evaluate.pick,
        "fid": evaluate.fid,
    },
    "analyze": {
        "encoders": analyze.compare,
        "discriminability": analyze.discriminability,
        "disentanglement": analyze.disentanglement,
        "steps": analyze.steps,
    },
    "data": {"inspect": data.inspect},
}


def _deferred(command: Callable[..., None], said: str) -> Callable[..., Any]:
    """A command that is parsed now and called afterwards, its errors being its own. A number that is out of its range
    is the first of them, and a path that is not UTF-8, which several libraries cannot open. said: the first word after
    `emf`, with which these begin as its other errors do: the function may be called otherwise."""

    def checked(*args: Any, **kwargs: Any) -> None:
        given = signature(command).bind(*args, **kwargs).arguments
        for name, path in given.items():
            if isinstance(path, Path):
                check_text(str(path), f"{said}: the path --{name.replace('_', '-')} {str(path)!r}")
        for name, limit in limits_of(command).items():
            check_limit(given.get(name), limit, f"{said}: --{name.replace('_', '-')}")
        command(*args, **kwargs)

    @wraps(command)
    def later(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return partial(checked, *args, **kwargs)

    return later


def main() -> None:
    """Entry of `emf`."""
    arguments, prog, chosen = sys.argv[1:], "emf", COMMANDS
    if arguments[:1] == ["train"]:
        return train(arguments[1:])
    if arguments[:1] == ["plan"]:
        with report_errors():
            return planning.plan(arguments[1:])
    first = arguments[0] if arguments else ""
    if first in GROUPS:
        prog, chosen, arguments = f"emf {first}", GROUPS[first], arguments[1:]
    with as_command():
        if arguments and (command := chosen.get(arguments[0])):
            arguments = [arguments[0], *spelled(arguments[1:], options_of(command))]
        later = {name: _deferred(command, first) for name, command in chosen.items()}
        one_line(tyro.extras.subcommand_cli_from_dict, later, args=arguments or ["--help"], prog=prog)()
