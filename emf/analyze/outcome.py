"""What an analysis leaves in its folder: settings.json, results.json and results.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emf import files
from emf.analyze.bootstrap import LEVEL, Interval
from emf.evaluate.published import ENCODERS
from emf.show.table import Markdown, bold, markdown

RESULTS, TABLE = "results.json", "results.md"
HOW: dict[str, Any] = dict(who="analyze: ", advice="give another --out")
"""How the errors about a folder begin and end."""


@dataclass(frozen=True)
class Row:
    """An encoder's two scores: of its embeddings as they are, and less their mean."""

    name: str
    plain: Interval
    centred: Interval
    each: tuple[np.ndarray, np.ndarray] = field(compare=False, repr=False)
    """[n] float64, as they are and centred: what the scores are the means of, by query or prompt. It is the same one
    for every encoder of an analysis, so that encoders can be compared by it."""

    @property
    def told(self) -> dict[str, Any]:
        """As results.json holds it."""
        return {"name": self.name, "plain": asdict(self.plain), "centred": asdict(self.centred)}


def check_out(out: Path, own: Sequence[str]) -> None:
    """Raises ValueError where `out` is a file, cannot be written, or holds one of our names without our settings."""
    files.check_folder(out, (*own, RESULTS, TABLE), **HOW)
    files.check_writable(out / RESULTS, HOW["who"])


@contextmanager
def claimed(out: Path, settings: dict[str, Any], growing: str, own: Sequence[str]) -> Iterator[None]:
    """Make `out` ours, and no other process's while the block runs: results of other settings are not overwritten,
    and two analyses do not append to the same vectors. settings[growing], a dict by name, may get more names, and lose
    none; new ones are written down with the results. Raises ValueError."""
    with alone(out):
        files.claim(out, settings, (*own, RESULTS, TABLE), growing=growing, **HOW)
        yield


def alone(out: Path) -> AbstractContextManager[None]:
    """No other analysis works in `out` while the block runs. Raises ValueError where one does."""
    return files.alone(out, f"analyze: another process is at work in {out}; wait for it, or give another --out")


@dataclass(frozen=True)
class Outcome:
    """An analysis of text encoders: what was found, under which settings, and what is to be known of it."""

    analysis: str
    """A key of published.ENCODERS."""
    rows: Sequence[Row]
    settings: dict[str, Any]
    assumed: Sequence[str]
    """A sentence for each choice that the paper does not state."""
    notes: Sequence[str]
    further: dict[str, Any] = field(default_factory=dict)
    """What else results.json holds."""
    tail: Sequence[str] = ()
    """Lines at the end of results.md."""

    def write(self, out: Path) -> None:
        """results.json and results.md: ours beside the paper's; then the settings that there are now results of."""
        tree: dict[str, Any] = {"analysis": self.analysis, "rows": [row.told for row in self.rows]}
        tree |= {"paper": ENCODERS[self.analysis], "settings": self.settings, "assumed": list(self.assumed)}
        files.write_json(out / RESULTS, tree | {"notes": list(self.notes)} | self.further)
        files.write_settings(out, self.settings)
        paper = [[f"{name}, paper", f"{x:.3f}", ""] for name, x in ENCODERS[self.analysis].items()]
        ours = [[bold(row.name), Markdown(f"**{row.plain}**"), Markdown(f"{row.centred}")] for row in self.rows]
        heads = ("text encoder", self.analysis, "of centred embeddings")
        lines = [f"# {self.analysis.capitalize()}", "", *markdown(heads, [*paper, *ours])]
        lines += ["", f"In brackets the {LEVEL:.0%} bootstrap interval. Higher is better in the paper's reading.", ""]
        lines += ["The paper does not say the following; here it is assumed:"]
        lines += [f"- {text}" for text in self.assumed]
        lines += ["", "Notes:", *(f"- {text}" for text in self.notes)] if self.notes else []
        lines += ["", *self.tail] if self.tail else []
        files.write_text(out / TABLE, "\n".join(lines) + "\n")
