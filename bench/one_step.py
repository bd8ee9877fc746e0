"""What lifts one step: the means that are known from the field, on the digits, with several seeds each:
`python -m bench.one_step` writes profiles/one-step.json and prints its table.

Every run is the recipe `digits` in 500 steps of 32 with a mean's settings, then scored on 1,200 captions, whose
standard error is half of that of 300; two runs at once, one thread each. Ended early, the same command goes on; what is
done is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.records import PROFILES, begun, write_record
from emf.config import Config
from emf.errors import as_command
from emf.evaluate.recorded import Spread
from emf.files import claim, read_json, write_json
from emf.flow_config import FlowConfig
from emf.paper.parts import Part
from emf.paper.runs import SCORES, run_parts, train_whole
from emf.paper.scoring import score
from emf.recipes import digits, digits_one_step
from emf.sample.sampling_settings import GUIDANCE

RECORD = PROFILES / "one-step.json"
STEPS, BATCH, SEEDS, PER_TAG = 500, 32, (0, 1, 2), 200
COUNTS = (1, 2, 4)


def flow(**settings: Any) -> Callable[[Config], Config]:
    """Guidance inside the target, and settings of the flow beside it."""
    return lambda c: replace(c, flow=replace(FlowConfig(guidance=GUIDANCE), **settings))


def matched(**settings: Any) -> Callable[[Config], Config]:
    """The same, and distribution matching as the recipe digits-one-step has it."""
    return lambda c: replace(flow(**settings)(c), match=digits_one_step().match)


MEANS: dict[str, Callable[[Config], Config]] = {
    "as EMF": lambda c: c,
    "the tangent along the network": lambda c: replace(c, flow=FlowConfig(along="network")),
    "guidance in the target": flow(),
    "the same, and distribution matching": matched(),
    "guidance, and the tangent along the network": flow(along="network"),
    "that, and distribution matching": matched(along="network"),
    "guidance, and alpha-Flow's start": flow(derivative="alpha"),
    # of the same guidance, omega / (1 - kappa)
    "guidance with kappa 0.5": flow(guidance=GUIDANCE / 2, kappa=0.5),
    "guidance, and a third of the conditions dropped": lambda c: replace(flow()(c), drop=1 / 3),
    "guidance, and no adaptive weight": flow(weight_p=0.0),
}


def parts(seeds: Sequence[int]) -> list[Part]:
    """Every mean with the first seed, then with the next: what is there early compares all of them."""
    config = digits()
    config = replace(config, steps=STEPS, batch_size=BATCH, run=replace(config.run, eval_every=0, log_every=50))
    return [
        Part(f"{name.replace(' ', '-').replace(',', '')}/{seed}", make(replace(config, seed=seed)))
        for seed in seeds
        for name, make in MEANS.items()
    ]


def run_part(part: Part, out: Path) -> None:
    folder = out / part.name
    train_whole(part.config, folder)
    write_json(folder / SCORES, score(folder, PER_TAG, COUNTS))


def gathered(out: Path, old: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row a run: those that are recorded, and those that are done in `out`, which replace them."""
    rows = {(row["mean"], row["seed"]): row for row in old}
    named = [(name, seed) for seed in seeds for name in MEANS]
    for key, part in zip(named, parts(seeds), strict=True):
        if (file := out / part.name / SCORES).is_file():
            scores = {n: round(found["overall"], 4) for n, found in read_json(file).items()}
            rows[key] = dict(mean=key[0], seed=key[1], scores=scores)
    order = {name: place for place, name in enumerate(MEANS)}  # a mean that is there no more stands last
    return sorted(rows.values(), key=lambda row: (order.get(row["mean"], len(order)), row["mean"], row["seed"]))


def table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and cells: mean and range of a score by number of steps."""
    cells = []
    for name in MEANS:
        mine = [row["scores"] for row in rows if row["mean"] == name]
        if mine:
            cells.append([name, str(len(mine)), *(f"{Spread.of([s[str(n)] for s in mine]):.3f}" for n in COUNTS)])
    return ("mean, 500 steps of 32", "seeds", *(f"EMF in {n}" for n in COUNTS)), cells


def main(arguments: Sequence[str] | None = None) -> None:
    from emf.show.table import console, terminal

    parser = argparse.ArgumentParser(prog="python -m bench.one_step", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/one-step"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    asked = parser.parse_args(arguments)
    head = dict(steps=STEPS, batch=BATCH, captions=6 * PER_TAG, guidance=GUIDANCE)
    old = begun(RECORD, head, "one step").get("rows", [])
    claim(asked.out, head, None, who="one step: ", advice="choose another --out")
    done = {(row["mean"], row["seed"]) for row in old}
    named = [(name, seed) for seed in asked.seeds for name in MEANS]
    left = [part for key, part in zip(named, parts(asked.seeds), strict=True) if key not in done]
    try:
        run_parts(asked.out, left, partial(run_part, out=asked.out), asked.jobs, who="one step")
    finally:
        # read again: another command may have recorded other seeds meanwhile
        rows = gathered(asked.out, begun(RECORD, head, "one step").get("rows", []), asked.seeds)
        write_record(RECORD, dict(**head, rows=rows))
    console().print(terminal(*table(rows), words=(0,)))


if __name__ == "__main__":
    with as_command():
        main()
