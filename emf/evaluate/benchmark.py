"""What every benchmark's scorer shares: scores kept image by image, exact means, one shape of result."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track

from emf.evaluate.published import BENCHMARKS

Row = dict[str, Any]

SCORED, SETTINGS, RESULTS, TABLE = "scored.jsonl", "settings.json", "results.json", "results.md"


@dataclass(frozen=True)
class Result:
    """A benchmark's outcome: results.json holds these fields."""

    benchmark: str
    """A key of published.BENCHMARKS."""
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


def check_images(folder: Path) -> None:
    """Raises ValueError where there is no folder of images; asked before a network is loaded."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected that of the images to score")


def mean(values: Iterable[float]) -> float:
    """Exactly rounded, hence the same in any order (math.fsum); nan of none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def open_image(path: Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF data say. Raises ValueError where it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError(f"{path} cannot be read as an image; generate it again or remove it") from None


def stamp(path: Path, *asked: object) -> str:
    """A digest of an image file's bytes and of what is asked of it; another one means that it must be scored again."""
    digest = hashlib.sha256(path.read_bytes())
    digest.update(json.dumps(asked, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def stamps(work: Mapping[str, tuple[Path, object]]) -> dict[str, str]:
    """File name -> stamp of (image file, what is asked of it); shows progress, for it reads every image."""
    return {n: stamp(path, asked) for n, (path, asked) in track(work.items(), description="reading")}


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a jsonl file. A last line without its newline was torn by a kill, and is left out.

    Raises ValueError where there is no file, or another line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a jsonl file, one JSON object a line")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is no JSON object; repair or remove the line")
        rows.append(row)
    return rows


def score_images(
    out: Path,
    settings: dict[str, Any],
    work: Mapping[str, str],
    score: Callable[[Sequence[str]], Sequence[Row]],
    batch: int = 1,
) -> list[Row]:
    """Score what was not scored before; the rows of all, by file name.

    work: file name -> stamp. score: up to `batch` file names -> a row each. Rows are appended to out/scored.jsonl as
    they come (a kill loses one batch at most); at the end it holds just these images, sorted.
    Raises ValueError where `out` holds something else, or scores by other settings.
    """
    claim(out, settings)
    path = out / SCORED
    done: dict[str, Row] = {}
    if path.exists():
        with path.open("r+b") as file:  # a torn line must not be continued
            file.truncate(file.read().rfind(b"\n") + 1)
        done = {row["filename"]: row for row in read_jsonl(path)}
    names = sorted(work)
    missing = [n for n in names if done.get(n, {}).get("stamp") != work[n]]
    with path.open("a") as file:
        parts = [missing[i : i + batch] for i in range(0, len(missing), batch)]
        for part in track(parts, description="scoring", disable=not parts):
            for name, row in zip(part, score(part), strict=True):
                done[name] = {"filename": name, **row, "stamp": work[name]}
                file.write(json.dumps(done[name]) + "\n")
            file.flush()
    rows = [done[n] for n in names]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def claim(
    out: Path, settings: dict[str, Any], name: str = SETTINGS, own: Sequence[str] = (SCORED, RESULTS, TABLE)
) -> None:
    """Make `out` ours, by its file of settings: what was made by others must not be mixed with it, and nothing is
    overwritten. own: files that are there with the settings alone. Raises ValueError."""
    path = out / name
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError:
            old = None
        if not isinstance(old, dict):
            raise ValueError(f"{path} is not this scorer's; give another folder to write")
        changed = [k for k in sorted(old.keys() | settings.keys()) if old.get(k) != settings.get(k)]
        if changed:
            raise ValueError(
                f"{out} holds what was made by other settings ({', '.join(changed)}); give another folder to write"
            )
        return
    strange = next((n for n in own if (out / n).exists()), None)
    if strange:
        raise ValueError(f"{out / strange} exists without {name}: not this scorer's; give another folder to write")
    out.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(settings, indent=1, sort_keys=True) + "\n")


def replace_text(path: Path, text: str, rank: int = 0) -> None:
    """A file that is there whole or not at all, whichever ranks write it."""
    whole = path.with_name(f"{path.name}.{rank}.part")
    whole.write_text(text)
    os.replace(whole, path)


def write_results(out: Path, result: Result) -> None:
    """results.json and results.md in `out`; a later run over more images renews them."""
    replace_text(out / RESULTS, json.dumps(asdict(result) | {"paper": BENCHMARKS[result.benchmark]}, indent=1) + "\n")
    replace_text(out / TABLE, markdown([result]))


def write_comparison(out: Path, results: Sequence[Result]) -> None:
    """results.json and results.md of one model at several numbers of steps."""
    first = results[0]
    claim(out, {"benchmark": first.benchmark, "label": first.label, "name": first.name})
    tree = {"benchmark": first.benchmark, "label": first.label, "results": [asdict(r) for r in results]}
    replace_text(out / RESULTS, json.dumps(tree | {"paper": BENCHMARKS[first.benchmark]}, indent=1) + "\n")
    replace_text(out / TABLE, markdown(results))


def markdown(results: Sequence[Result]) -> str:
    """The paper's rows with ours below, ours by category, and every deviation from the official protocol."""
    first = results[0]
    digits = 3 if first.benchmark == "GenEval" else 2
    lines = [f"# {first.label}", "", f"| model | steps | {first.benchmark} |", "|--|--|--|"]
    lines += [f"| {model}, paper | {steps} | {x:.2f} |" for model, steps, x in BENCHMARKS[first.benchmark]]
    heads = ["" if r.steps is None else str(r.steps) for r in results]
    for r, steps in zip(results, heads, strict=True):
        lines += [f"| **{_cell(r.name)}**, {r.label} | {steps} | **{r.overall:.{digits}f}** |"]
    for title, table in first.tables.items():
        own = ["score"] if len(results) == 1 else [f"{n} step" + "s" * (n != "1") for n in heads]
        lines += ["", f"| {title} | {' | '.join(own)} |", "|--" * (1 + len(own)) + "|"]
        for category in table:
            scores = [r.tables[title].get(category, math.nan) for r in results]
            lines += [f"| {_cell(category)} | {' | '.join(f'{x:.{digits}f}' for x in scores)} |"]
    told = dict.fromkeys(text for r in results for text in r.deviations)
    lines += ["", f"{first.images} images{' each' * (len(results) > 1)}. Deviations from the official protocol:"]
    lines += [f"- {text}" for text in told] or ["- none known"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
