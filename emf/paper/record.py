"""results.json of a study: a row a run, which a later call goes on with, with more seeds too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emf.files import misfit, read_json, write_json
from emf.paper.parts import Part

RESULTS = "results.json"
AGAIN = "move its folder away, and the part is made again"
SCORES, ENCODER = "scores_by_steps.json", "encoder.json"
"""What a part writes in its folder. Not scores.json, which `emf evaluate digits` writes in a run's folder, and which
its page reads."""


@dataclass(frozen=True)
class Column:
    """One key of a row."""

    file: str
    """Of a part's folder, where it is read."""
    odd: Callable[[Any], str | None]
    """What is wrong with a value, in words to follow its name."""
    read: Callable[[Path], Any] = read_json
    there: Callable[[Path], bool] = Path.is_file


@dataclass(frozen=True)
class Study:
    """What is trained with several seeds, and what results.json holds of it."""

    who: str
    """The command, with which its errors begin."""
    budget: Any
    """A dataclass. A folder takes more of its seeds, and nothing else of it changes there."""
    parts: Sequence[Part]
    columns: Mapping[str, Column]
    """Of a row; it has scores, that of a base its encoder, and it may lack the others."""
    steps: Mapping[str, Sequence[int]]
    """By the first word of a part's name, the numbers of steps at which it is scored."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What results.json holds that every row rests on."""

    def sizes(self) -> dict[str, Any]:
        """The budget without its seeds."""
        return {key: value for key, value in asdict(self.budget).items() if key != "seeds"}

    def recorded(self, out: Path) -> dict[str, Any]:
        """What results.json in this folder holds of parts, a row each by their names; nothing where there is none, and
        of one by an earlier version, whose figures are not by part. Raises ValueError where it is of another budget or
        form, or rests on something else, where a row lacks something, and where an earlier version's has figures that
        no run in this folder has."""
        file = out / RESULTS
        if not file.is_file():
            return {}
        tree = read_json(file)
        if isinstance(tree, dict) and ("scores" in tree or "ranks" in tree):
            if lost := self._lost(out, tree):
                old = f"is of an earlier version, with figures of {lost[0]}, whose run is not in this folder"
                raise ValueError(f"{self.who}: {file} {old}; move it away, and what it has is made again")
            return {}
        if said := misfit(tree, {"budget": dict[str, Any], "parts": dict[str, dict[str, Any]]}):
            raise ValueError(f"{self.who}: {file} {said}; move it away")
        away = "move it away, or choose another --out"
        if {key: value for key, value in tree["budget"].items() if key != "seeds"} != self.sizes():
            raise ValueError(f"{self.who}: {file} is of another budget than this folder; {away}")
        if other := [key for key, value in self.fixed.items() if tree.get(key) != value]:
            raise ValueError(f"{self.who}: {file} is of other {other[0]} than are made here now; {away}")
        rows = {name: {k: v for k, v in row.items() if v is not None} for name, row in tree["parts"].items()}
        for name, row in rows.items():
            repair = "repair or remove that part's row"
            if "scores" not in row:
                raise ValueError(f"{self.who}: {file}, {name} has no scores; {repair}")
            if odd := self._odd(row):
                raise ValueError(f"{self.who}: {file}, {name}, {odd[0]} {odd[1]}; {repair}")
            if lacks := self._lacks(name, row):
                raise ValueError(f"{self.who}: {file}, {name} {lacks}; {repair}")
        return rows

    def _lost(self, out: Path, tree: Mapping[str, Any]) -> list[str]:
        """The parts of which an earlier version's results.json, {ranks or scores: by group, as emf/trained}, has
        figures, and that have no run in the folder."""
        groups, missing, budget = tree.get("ranks") or tree.get("scores"), tree.get("missing"), tree.get("budget")
        groups = groups if isinstance(groups, dict) else {}
        missing = missing if isinstance(missing, list) else []
        seeds = budget.get("seeds") if isinstance(budget, dict) else None
        names = [f"{group}/{seed}" for group in groups for seed in (seeds if isinstance(seeds, list) else [0])]
        return [name for name in names if name not in missing and not (out / name / SCORES).is_file()]

    def _lacks(self, name: str, row: Mapping[str, Any]) -> str | None:
        """What the row of a part that is done must have and has not: such a part would not be made again, and what
        compares it with others would leave it out."""
        group = name.partition("/")[0]
        if less := [steps for steps in self.steps.get(group, ()) if str(steps) not in row["scores"]]:
            return f"has no scores at {less[0]} steps"
        return "has no encoder" if group == "base" and "encoder" not in row else None

    def row(self, folder: Path) -> dict[str, Any]:
        """What a part has left in its folder. Raises ValueError where that is not what a part writes."""
        row = {k: c.read(folder / c.file) for k, c in self.columns.items() if c.there(folder / c.file)}
        if odd := self._odd(row):
            raise ValueError(f"{self.who}: {folder / self.columns[odd[0]].file} {odd[1]}; {AGAIN}")
        return row

    def _odd(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """(key, what is wrong with its value) of the first such value of a row."""
        every = ((key, column.odd(row[key])) for key, column in self.columns.items() if key in row)
        return next(((key, said) for key, said in every if said), None)

    def gather(self, out: Path, **further: Any) -> dict[str, Any]:
        """What the parts that are done have found, written to results.json too: a row a part, by its name, of the
        results.json that was there or else of this folder. Its key `missing` names the parts that are not done. Raises
        ValueError as `recorded` and `row` do, and where a part's folder lacks something."""
        names = [part.name for part in self.parts]
        # A base that is trained again, for a part that is not recorded, is another one by rounding. Where parts of the
        # old one are recorded its row stays, since they are compared with it.
        known = self.recorded(out)
        renewed = {part.base for part in self.parts} - {part.base for part in self.parts if part.name in known}
        own = [name for name in names if name not in known or name in renewed]
        rows = known | {name: self.row(out / name) for name in own if (out / name / SCORES).is_file()}
        for name in names:
            if name in rows and (lacks := self._lacks(name, rows[name])):
                raise ValueError(f"{self.who}: {out / name} {lacks}; {AGAIN}")
        missing = [name for name in names if name not in rows]
        found = {"budget": asdict(self.budget), **further, **self.fixed, "missing": missing, "parts": rows}
        write_json(out / RESULTS, found)
        return found


class Rows:
    """The contents of results.json, of the seeds of its budget: figures are asked for by name, and come by seed. What
    is missing has no seeds."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree

    def of(self, group: str, key: str) -> dict[int, Any]:
        """What the runs of a group, as in emf/trained, have under a key of theirs."""
        rows = {seed: self.tree["parts"].get(f"{group}/{seed}", {}) for seed in self.tree["budget"]["seeds"]}
        return {seed: row[key] for seed, row in rows.items() if key in row}
