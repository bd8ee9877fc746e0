"""What every benchmark's scorer shares: scores kept image by image, exact means, one shape of result."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from emf.evaluate.published import BENCHMARKS
from emf.files import (
    SETTINGS,
    alone,
    append_rows,
    check_claim,
    claim,
    filled,
    finite,
    fits,
    mend_rows,
    misfit,
    read_bytes,
    read_json,
    whole_path,
    write_json,
    write_rows,
    write_text,
)
from emf.show.progress import track
from emf.show.table import Markdown, bold, cell, markdown

Row = dict[str, Any]

SCORED, RESULTS, TABLE = OWN = ("scored.jsonl", "results.json", "results.md")
ELSEWHERE = "give another folder to write"


@dataclass(frozen=True)
class Result:
    """A benchmark's outcome: results.json holds these fields."""

    benchmark: str
    """Its name: a key of published.BENCHMARKS, or one that the paper does not report."""
    label: str
    """The benchmark's name with what replaces the official part of it: only equal labels may be compared."""
    name: str
    """Of what was scored."""
    steps: int | None
    """Of its sampler, where known."""
    overall: float
    tables: dict[str, dict[str, float]]
    """By the table's name: category -> score, in the benchmark's unit."""
    images: int
    settings: dict[str, Any]
    deviations: list[str] = field(default_factory=list)
    """Every difference to the official protocol, a sentence each."""


class Benchmark(Protocol):
    """A benchmark with all that it scores by, loaded: nothing that it needs is found missing once it is there."""

    @property
    def label(self) -> str:
        """See Result."""

    @property
    def settings(self) -> dict[str, Any]:
        """What scored.jsonl in a folder of results depends on; `benchmark` among them."""

    @property
    def result_settings(self) -> dict[str, Any]:
        """See Result.settings: the same, and how scores of images become a result."""

    def check(self, files: Sequence[str]) -> None:
        """Raises ValueError where images of these names, relative to their folder, could not be scored; asked before
        they are drawn."""

    def score(self, images: Path, out: Path, *, name: str = "", steps: int | None = None) -> Result:
        """Score a folder of images; scored.jsonl, results.json and results.md in `out`. name, steps: of what the images
        are of, for the table."""


def check_images(folder: Path) -> None:
    """Raises ValueError where there is no folder of images; asked before a network is loaded."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected that of the images to score")


def mean(values: Iterable[float]) -> float:
    """Exactly rounded, hence the same in any order (math.fsum); nan of none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def stamp(path: Path, *asked: object) -> str:
    """A digest of an image file's bytes and of what is asked of it; another one means that it must be scored again."""
    digest = hashlib.sha256(read_bytes(path))
    digest.update(json.dumps(asked, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def stamps(work: Mapping[str, tuple[Path, object]]) -> dict[str, str]:
    """File name -> stamp of (image file, what is asked of it); shows progress, for it reads every image."""
    return {n: stamp(path, asked) for n, (path, asked) in track(list(work.items()), "reading")}


def take(out: Path, root: Path, settings: Mapping[str, Any], images: int, own: Sequence[str] = OWN) -> None:
    """Claim `out` for the scores of so many images of the folder `root`. Raises ValueError where it holds those of
    another folder's images, by other settings, or a result of more images."""
    claim(out, at(out, root, settings), own, advice=ELSEWHERE, writer=os.getpid())
    tree: Any = {}
    with suppress(ValueError):  # a damaged one is no loss
        tree = read_json(out / RESULTS) if (out / RESULTS).is_file() else {}
    before = tree.get("images") if isinstance(tree, dict) else None
    if isinstance(before, int) and before > images:
        raise ValueError(
            f"evaluate: {out / RESULTS} is of {before} images, and of {root} {images} are to be scored; put the "
            f"others back, move {RESULTS} away, or {ELSEWHERE}"
        )


def at(out: Path, root: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the folder of the images that are scored; one in `out` moves with it. Scores of an earlier version
    tell it otherwise or not at all, and are gone on with."""
    place, whole = whole_path(root), whole_path(out)
    with suppress(ValueError):  # a damaged one is refused by claim
        told = read_json(out / SETTINGS) if (out / SETTINGS).is_file() else None
        if isinstance(told, dict) and told.get("images") in (None, str(place)):
            return {**settings, **({"images": str(place)} if "images" in told else {})}
    return {**settings, "images": str(place.relative_to(whole) if place.is_relative_to(whole) else place)}


def score_images(
    out: Path,
    root: Path,
    settings: dict[str, Any],
    work: Mapping[str, str],
    score: Callable[[Sequence[str]], Sequence[Row]],
    *,
    batch: int = 1,
    each: int = 1,
) -> list[Row]:
    """Score what was not scored before; the rows of all, by file name.

    root: the folder of the images. work: file name -> stamp. score: up to `batch` file names -> a row each. each:
    images in a file. Rows are appended to out/scored.jsonl as they come (a kill loses one batch at most); at the end it
    holds just these images, sorted.
    Raises ValueError where `out` holds something else, or other scores, see take.
    """
    take(out, root, settings, len(work) * each)
    path = out / SCORED
    done = {row["filename"]: row for row in mend_rows(path, ["filename"])}
    names = sorted(work)
    missing = [n for n in names if done.get(n, {}).get("stamp") != work[n]]
    parts = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    for part in track(parts, "scoring", disable=not parts):
        new = [{"filename": name, **row, "stamp": work[name]} for name, row in zip(part, score(part), strict=True)]
        append_rows(path, new)
        done |= {row["filename"]: row for row in new}
    rows = [done[n] for n in names]
    write_rows(path, rows, os.getpid())
    return rows


def write_results(out: Path, result: Result) -> None:
    """results.json and results.md in `out`; a later run over more images renews them. Two commands may write there at
    the same time: each writes parts of its own, and the later one's results stay."""
    tree = asdict(result) | {"paper": BENCHMARKS.get(result.benchmark, ())}
    write_json(out / RESULTS, tree, writer=os.getpid())
    write_text(out / TABLE, page([result]), os.getpid())


def compared(benchmark: str, label: str, name: str) -> dict[str, Any]:
    """What a folder with one model's results at several numbers of steps is claimed by."""
    return {"benchmark": benchmark, "label": label, "name": name}


def check_outs(out: Path, benchmark: Benchmark, name: str, images: Mapping[int, Path]) -> list[int]:
    """The other numbers of steps of which the table in `out` has rows, which stay in it. Raises ValueError where the
    results of a model could not be written there, or beside those; asked before its images are drawn. images: by number
    of steps the folder that they will be in."""
    claimed = compared(benchmark.settings["benchmark"], benchmark.label, name)
    check_claim(out, claimed, OWN, advice=ELSEWHERE)
    for steps, root in images.items():
        place = out / str(steps)
        check_claim(place, at(place, root, benchmark.settings), OWN, advice=ELSEWHERE)
    now, there = finite(benchmark.result_settings), rows_beside(out, images)
    for row in there:
        if other := [key for key in sorted(row.settings.keys() | now.keys()) if row.settings.get(key) != now.get(key)]:
            raise ValueError(f"{has_row(out, row.steps)} scored by other settings ({', '.join(other)}); {ELSEWHERE}")
    return [row.steps for row in there if row.steps is not None]


def has_row(out: Path, steps: int | None) -> str:
    """How an error begins that is about a row of the table in `out`, which stays there."""
    return f"evaluate: {out / RESULTS} has a row of {steps} step{'s' * (steps != 1)}"


def rows_beside(out: Path, steps: Collection[int]) -> list[Result]:
    """The rows of the table in `out` of other numbers of steps than these. Raises ValueError on a damaged one."""
    if not (out / RESULTS).is_file():
        return []
    try:
        tree = read_json(out / RESULTS)
        if said := misfit(tree, {"results": list[dict[str, Any]]}):
            raise ValueError(f"it {said}")
        for row in tree["results"]:  # what had no score has none
            if fits(row.get("tables"), dict[str, dict[str, float | None]]):
                row["tables"] = {k: {c: x for c, x in t.items() if x is not None} for k, t in row["tables"].items()}
        rows = [filled(Result, row, f"row {number} of its results") for number, row in enumerate(tree["results"], 1)]
    except ValueError as error:
        raise ValueError(
            f"evaluate: {out / RESULTS} is no table that can be added to: {error}; move it away, or {ELSEWHERE}"
        ) from None
    return [row for row in rows if row.steps not in steps]


def write_comparison(out: Path, results: Sequence[Result]) -> None:
    """results.json and results.md of one model at several numbers of steps: these, in the place of earlier ones of the
    same steps, and beside them the rows of other steps that the table had."""
    first = results[0]
    with alone(out):  # two commands may add to it
        claim(out, compared(first.benchmark, first.label, first.name), OWN, advice=ELSEWHERE)
        every = [*results, *rows_beside(out, [r.steps for r in results if r.steps is not None])]
        every.sort(key=lambda r: r.steps or 0)
        tree = {"benchmark": first.benchmark, "label": first.label, "results": [asdict(r) for r in every]}
        write_json(out / RESULTS, tree | {"paper": BENCHMARKS.get(first.benchmark, ())})
        write_text(out / TABLE, page(every))


def page(results: Sequence[Result]) -> str:
    """Markdown: the paper's rows with ours below, ours by category, and every deviation from the official protocol."""
    first = results[0]
    digits = 3 if first.benchmark == "GenEval" else 2
    heads = ["" if r.steps is None else str(r.steps) for r in results]
    rows = [[f"{model}, paper", str(steps), f"{x:.2f}"] for model, steps, x in BENCHMARKS.get(first.benchmark, ())]
    for r, steps in zip(results, heads, strict=True):
        rows.append([Markdown(f"{bold(r.name)}, {cell(r.label)}"), steps, bold(f"{r.overall:.{digits}f}")])
    lines = [f"# {first.label}", "", *markdown(["model", "steps", first.benchmark], rows)]
    for title in dict.fromkeys(title for r in results for title in r.tables):
        own = ["score"] if len(results) == 1 else [f"{n} step" + "s" * (n != "1") for n in heads]
        tables = [r.tables.get(title, {}) for r in results]
        scores = {c: [t.get(c, math.nan) for t in tables] for c in dict.fromkeys(c for t in tables for c in t)}
        lines += ["", *markdown([title, *own], [[c, *(f"{x:.{digits}f}" for x in xs)] for c, xs in scores.items()])]
    told = dict.fromkeys(text for r in results for text in r.deviations)
    counts = [str(r.images) for r in results]
    images = f"{counts[0]} images{' each' * (len(results) > 1)}"
    if len({*counts}) > 1:
        images = f"{', '.join(counts)} images, in the order of the steps: only rows of the same images compare"
    lines += ["", f"{images}. Deviations from the official protocol:"]
    lines += [f"- {text}" for text in told] or ["- none known"]
    return "\n".join(lines) + "\n"
