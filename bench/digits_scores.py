"""Add runs' scores to the record of the digits' recipes, and renew the tables that are made of it:
`python -m bench.digits_scores RUN ... --machine NAME`; without a run it renews the tables alone."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import PROFILES
from emf.data.scores_file import CAPTIONS, SCORES, read_scores
from emf.errors import as_command
from emf.evaluate.recorded import RECORD, entry, table
from emf.evaluate.small_world import changed
from emf.files import read_json, write_json, write_text
from emf.recipes import from_file
from emf.sample.sampling_settings import GUIDANCE

BASE_ROUNDING = 0.02
"""By how much the shipped base's own scores may differ: only rounding, between machines, makes them other ones."""
PAGES = (PROFILES.parent / "README.md", PROFILES.parent / "docs" / "training.md")


def add(record: dict[str, list[dict[str, Any]]], run: Path, machine: str) -> None:
    """A run's entry, in the place of one of the same recipe, seed, machine and number of captions. Raises ValueError
    where the run was scored on fewer captions than the others, at another guidance, before its last step or with other
    noise, or was trained otherwise than its recipe says or from another base."""
    config, scores = from_file(run / "config.json"), read_scores(run / SCORES, "recorded")
    if scores is None:
        raise ValueError(f"recorded: {run} has no {SCORES}; `emf evaluate digits {run}` writes it")
    if changed(config):
        raise ValueError(
            f"recorded: {run} has other settings than its recipe {config.recipe}; a run without is recorded"
        )
    made = entry(scores, config.seed, machine)
    if made["guidance"] != GUIDANCE or made["captions"] < CAPTIONS or not made["emf"]:
        raise ValueError(
            f"recorded: {run} has scores of {made['captions']} captions at guidance {made['guidance']}; expected an "
            f"EMF run's of {CAPTIONS} or more at {GUIDANCE}, as `emf evaluate digits {run}` makes them"
        )
    if scores.get("step") not in (None, config.steps) or scores.get("seed") not in (None, 0):
        raise ValueError(
            f"recorded: {run} has scores of step {scores.get('step')} of {config.steps}, drawn with seed "
            f"{scores.get('seed')}; expected its last step's and seed 0's, as `emf evaluate digits {run}` makes them "
            "of a run that is done"
        )
    every = [old for runs in record.values() for old in runs]
    base = next((old["fm"] for old in every if old["captions"] == made["captions"]), made["fm"])
    if any(abs(score - base.get(steps, score)) > BASE_ROUNDING for steps, score in made["fm"].items()):
        raise ValueError(
            f"recorded: {run} has {made['fm']} of its base, where the recorded runs have {base}; a run from the "
            "shipped base is recorded"
        )
    same = ("seed", "machine", "captions")
    runs = record.setdefault(config.recipe, [])
    runs[:] = [old for old in runs if any(old[key] != made[key] for key in same)] + [made]


def renewed(page: str, record: dict[str, list[dict[str, Any]]]) -> str:
    """A page with the record's table between its two markers."""
    lines = "\n".join(table(record))
    return re.sub(
        r"(<!-- digits-scores -->\n).*?(\n<!-- /digits-scores -->)",
        lambda m: m[1] + lines + m[2],
        page,
        flags=re.DOTALL,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.digits_scores", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--machine", help="what the record calls the machine that trained them")
    asked = parser.parse_args(arguments)
    if asked.runs and not asked.machine:
        parser.error("say --machine: scores differ between machines")
    record = read_json(RECORD)
    for run in asked.runs:
        add(record, run, asked.machine)
    pages = {file: renewed(file.read_text(), record) for file in PAGES}
    write_json(RECORD, record)
    for file, text in pages.items():
        write_text(file, text)


if __name__ == "__main__":
    with as_command():
        main()
