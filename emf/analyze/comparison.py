"""Text encoders compared before one is chosen: both scores of each in one table, ranked, and how sure the order is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from emf import files
from emf.analyze.bootstrap import LEVEL
from emf.analyze.choices import DINO, Computing, Embedding, Protocol, Shortening
from emf.analyze.digit_pairs import DIGITS
from emf.analyze.discriminability import run_discriminability
from emf.analyze.disentanglement import run_disentanglement
from emf.analyze.names import EncoderName
from emf.analyze.outcome import HOW, RESULTS, TABLE, Row, alone, check_out
from emf.analyze.ranking import Ranking, rank
from emf.show.table import Markdown, bold, console, markdown, terminal

SCORES = ("discriminability", "disentanglement")


def compare_encoders(
    encoders: Sequence[EncoderName],
    out: Path,
    data: Path | None = None,
    prompts: Path | None = None,
    *,
    split: str = Protocol.split,
    dino: str = DINO,
    seed: int = 0,
    embedding: Embedding | None = None,
    compute: Computing | None = None,
) -> dict[str, Ranking]:
    """Discriminability on `data` and disentanglement on `prompts` of every encoder, of the digits' scenes where neither
    is given: results.json and results.md in `out`, and each analysis in a folder of its name in it. Stopped, it goes
    on; more encoders can be named later. Returns the rankings by score; "centred" ones are of embeddings less their
    mean.

    split: of COCO's, see Protocol.

    Raises ValueError where one of data and prompts is given alone, something is missing, or `out` holds something
    else."""
    if (data is None) != (prompts is None):
        given, other = ("data", "prompts") if prompts is None else ("prompts", "data")
        raise ValueError(
            f"analyze: --{given} without --{other}; give both (the paper's: COCO 2017 and DPG-Bench's prompts), or "
            "neither, for the digits' scenes and their captions"
        )
    embedding, compute = embedding or Embedding(), compute or Computing()
    read = {"data": data, "prompts": prompts}
    settings: dict[str, Any] = {
        k: DIGITS if place is None else str(files.whole_path(place)) for k, place in read.items()
    }
    settings |= {"analysis": "encoders", "seed": seed, "dino": files.place_or_name(dino) if data else ""}
    settings |= {"split": split} if split != Protocol.split else {}
    settings |= {"dtype": compute.dtype, "text": asdict(embedding), "encoders": {e.name: e.place for e in encoders}}
    check_out(out, ())
    files.check_claim(out, settings, (RESULTS, TABLE), growing="encoders", **HOW)
    folders, protocol = [out / score for score in SCORES], Protocol(split=split, seed=seed)
    with alone(out):
        found = run_discriminability(encoders, data, folders[0], protocol, embedding, dino, compute=compute)
        apart = run_disentanglement(encoders, prompts, folders[1], Shortening(seed=seed), embedding, compute=compute)
        rows = dict(zip(SCORES, (found, apart), strict=True))
        files.claim(out, settings, (RESULTS, TABLE), growing="encoders", **HOW)
        rankings = {
            name: rank({row.name: row.each[i] for row in scored}, seed=seed)
            for score, scored in rows.items()
            for i, name in ((0, score), (1, f"{score}, centred"))
            if all(np.isfinite(row.each[i]).all() for row in scored)
        }
        _write(out, rows, rankings, settings)
        return rankings


def _write(out: Path, rows: dict[str, list[Row]], rankings: dict[str, Ranking], settings: dict[str, Any]) -> None:
    """results.json and results.md; the table and what follows from it in the terminal."""
    order = rankings[SCORES[0]].order
    by_name = {score: {row.name: row for row in scored} for score, scored in rows.items()}
    tree = [
        {"name": n} | {score: {k: v for k, v in by_name[score][n].told.items() if k != "name"} for score in SCORES}
        for n in order
    ]
    files.write_json(
        out / RESULTS,
        {"analysis": "encoders", "rows": tree, "rankings": {k: asdict(r) for k, r in rankings.items()}}
        | {"settings": settings},
    )
    files.write_settings(out, settings)
    heads = ["text encoder", *(name for score in SCORES for name in (score, "centred"))]
    cells = [
        [name, *(f"{x}" for score in SCORES for x in (by_name[score][name].plain, by_name[score][name].centred))]
        for name in order
    ]
    told = [f"{name}: {ranking}" for name, ranking in rankings.items() if len(order) > 1]
    shown = console()
    shown.print(terminal(heads, cells, words=(0,)))
    for line in told:
        shown.print(line)
    source = ", ".join(settings[k] for k in ("data", "split") if k in settings)
    lines = ["# Text encoders, compared", "", *markdown(heads, [[bold(row[0]), *row[1:]] for row in cells]), ""]
    lines += [f"- {line}" for line in map(Markdown, told)]
    lines += [
        "",
        f"In brackets the {LEVEL:.0%} bootstrap interval. > stands between neighbours that are told apart: the",
        "interval of their difference, by the same queries or prompts, excludes 0, at a level that holds for all",
        "pairs together (Student's). ~ stands between neighbours that are not.",
        "",
        f"Read from: {source}; {settings['prompts']}. Higher is better in the paper's reading. An",
        "encoder that gives every text nearly the same vector has a plain disentanglement near 1, so read it",
        "beside the centred one. The intervals hold the chance of the queries and prompts alone.",
        "",
        f"Each analysis with its settings: [{SCORES[0]}]({SCORES[0]}/{TABLE}), [{SCORES[1]}]({SCORES[1]}/{TABLE})",
    ]
    files.write_text(out / TABLE, "\n".join(lines) + "\n")
