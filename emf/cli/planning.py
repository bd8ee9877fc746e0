"""`emf plan`: what the command does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from emf.train.command import Run, parse_run
from emf.train.hardware import Hardware


@dataclass(frozen=True)
class _Planned(Run):
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)


def plan(arguments: list[str]) -> None:
    """`emf plan` with what stands behind it: the arguments of `emf train`, and what the run is planned for."""
    asked = parse_run(arguments, _Planned, "plan")
    from emf.train import plan as planning  # seconds, which --help need not take

    planning.show(planning.plan(asked.config, asked.hardware), asked.out)
