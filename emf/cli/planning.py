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
    from emf.train.plan import plan as planned  # seconds, which --help need not take
    from emf.train.plan_tables import show

    show(planned(asked.config, asked.hardware), asked.out)
