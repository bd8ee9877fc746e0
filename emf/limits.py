"""The range of a number, which stands in its type: `lr: Annotated[float, Within(above=0)]`.

A dataclass of settings calls check_limits when it is made, and emf.cli.main calls check_limit for the arguments of a
command: a number out of its range is refused in one line wherever it comes from, a command line, a config.json or
Python. This file imports nothing of emf: a config and its help need no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

LARGEST = 1e30
"""The end of every range that names none: its square is near the end of what float32 holds."""


@dataclass(frozen=True)
class Within:
    """The numbers from `least` on, or above `above`, up to `most`, or below `below`. NaN and infinities are not among
    them."""

    least: float = -LARGEST
    most: float = LARGEST
    above: float | None = None
    below: float | None = None

    def fault(self, x: float) -> str:
        """What would have to be so of a number that is out of the range; nothing of one that is in it."""
        low = x >= self.least if self.above is None else x > self.above
        high = x <= self.most if self.below is None else x < self.below
        if low and high:
            return ""
        if not math.isfinite(x):
            return "must be finite"
        first, last = self.ends
        if not all(self.named):
            return f"must be {last if low else first}"  # the other end is one that nobody set
        return f"must be {self.words}"

    @property
    def ends(self) -> tuple[str, str]:
        """Where it begins and where it ends, in words."""
        first = f"at least {self.least}" if self.above is None else f"above {self.above}"
        return first, f"at most {self.most}" if self.below is None else f"below {self.below}"

    @property
    def named(self) -> tuple[bool, bool]:
        """Whether somebody set where it begins, and where it ends."""
        return self.above is not None or self.least > -LARGEST, self.below is not None or self.most < LARGEST

    @property
    def words(self) -> str:
        """The ends that somebody set; empty where nobody set one."""
        return " and ".join(end for end, named in zip(self.ends, self.named, strict=True) if named)


ANY = Within()


@cache
def limits_of(kind: Any) -> dict[str, Within]:
    """The ranges that the fields of a class, or the arguments of a function, declare, by name."""
    found = {name: _limit(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: limit for name, limit in found.items() if limit is not None}


def _limit(hint: Any) -> Within | None:
    """The range in a type, or in a part of it, as in tuple[Steps, ...]."""
    own = next((note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Within)), None)
    return own or next(filter(None, map(_limit, get_args(hint))), None)


def check_limits(settings: Any, start: str) -> None:
    """Raises ValueError where a number among the fields of a dataclass, or in a tuple there, is out of its range, and
    where a text in a tuple is empty: as the beginning of a name it would stand for every name.

    start: what the error's text begins with, up to the field's name, as in "config: optim.". One that ends in dashes
    is of a command's options, which have dashes in their names.
    """
    kind: Any = type(settings)
    limits = limits_of(kind)
    for name, value in vars(settings).items():
        said = start + (name.replace("_", "-") if start.endswith("--") else name)
        check_limit(value, limits.get(name, ANY), said)
        if isinstance(value, tuple) and "" in value:
            raise ValueError(f"{said} holds an empty text; leave it out")


def check_limit(value: Any, limit: Within, name: str) -> None:
    """Raises ValueError where a number, or one in a tuple of them, is out of a range; other values are none."""
    for x in value if isinstance(value, tuple) else (value,):
        if isinstance(x, int | float) and not isinstance(x, bool) and (fault := limit.fault(x)):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{name} {shown} {fault}")
