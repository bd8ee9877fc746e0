"""`emf`: the commands. What a user got wrong is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from emf.arguments import NEEDS_EXTRA, one_line
from emf.errors import report_errors

try:
    import tyro
except ImportError:
    raise SystemExit(NEEDS_EXTRA) from None

from emf.cli import analyze as analyzing
from emf.cli import data as on_data
from emf.cli import evaluate as evaluating
from emf.cli import generate as generating
from emf.cli import pages, planning
from emf.cli import weights as on_weights
from emf.train.command import main as train


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
        return train(arguments[1:])

    def train_help() -> None:
        """Train a recipe, or a config.json again (`emf train --help`)."""

    def evaluate_help() -> None:
        """Score: digits (a run of the small world), geneval, dpg or hps (a folder of images)."""

    def analyze_help() -> None:
        """Compare text encoders: discriminability, disentanglement; flow matching at few steps: steps."""

    def data_help() -> None:
        """Look at image-text data: inspect."""

    e, a = evaluating, analyzing
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
        "generate": generating.generate,
        "evaluate": evaluate_help,
        "analyze": analyze_help,
        "report": pages.report,
        "plan": planning.plan,
        "convert": on_weights.convert,
        "data": data_help,
        "cache": on_data.cache,
        "export": on_weights.export,
        "release": on_weights.release,
        "paper": pages.paper,
    }
    with report_errors():
        parser = tyro.extras.subcommand_cli_from_dict
        prog = "emf"
        if arguments and arguments[0] in groups:
            prog, chosen, arguments = f"emf {arguments[0]}", groups[arguments[0]], arguments[1:]
        later = {name: _deferred(command) for name, command in chosen.items()}
        one_line(parser, later, args=arguments or ["--help"], prog=prog)()
