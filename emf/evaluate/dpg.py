"""DPG-Bench (arXiv 2403.05135; TencentQQGYLab/ELLA): yes-no questions about each image, children falling with parents.

Images: <root>/<item id>.png, a grid of 2 x 2. Questions: dpg_bench.csv. The official answers are mPLUG's, which is not
in transformers: another network's scores are of another scale, and labelled so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from emf.device import AUTO
from emf.evaluate.benchmark import (
    Result,
    Row,
    check_images,
    mean,
    score_images,
    stamps,
    write_results,
)
from emf.evaluate.network_names import BLIP
from emf.evaluate.vqa import IMAGES, VQA, BlipVQA, RecordedVQA
from emf.files import files_in, open_image, read_csv

PROMPTS = 1065


@dataclass(frozen=True)
class Question:
    """A proposition about an item."""

    text: str
    category: str
    """The tuple's head, as "entity - whole"; what is before the dash is its level 1."""
    parents: tuple[int, ...]
    """Propositions that it falls with."""


@dataclass(frozen=True)
class Quirks:
    """Which of the official script's quirks are kept."""

    skip_first_row: bool = True
    """The csv is read as the official script reads it. Its first question is never asked, and the item is left out
    where a question that depends on it is reached; of an item whose rows do not stand together, the last that do
    count."""
    last_crop_categories: bool = True
    """The category tables count the last of the four images alone, before children fall with their parents; else all
    four, after."""


Items = dict[str, dict[int, Question]]
"""Item id -> proposition id -> question, in the file's order."""


def read_questions(file: Path, skip_first_row: bool = True) -> Items:
    """The items of dpg_bench.csv; skip_first_row: see Quirks. Raises ValueError, naming file and line, on what cannot
    be read."""
    columns = {"item_id", "proposition_id", "dependency", "tuple", "question_natural_language"}
    if not file.is_file():
        raise ValueError(f"{file} does not exist; put DPG-Bench's dpg_bench.csv (ELLA's repository) there")
    rows = read_csv(file)
    if lacking := columns - (rows[0][1].keys() if rows else set()):
        raise ValueError(f"{file} lacks the column {min(lacking)}; expected DPG-Bench's dpg_bench.csv")
    items: Items = {}
    before = None
    for line, row in rows[skip_first_row:]:
        if skip_first_row and row["item_id"] != before:
            items[row["item_id"]] = {}
        before = row["item_id"]
        try:
            parents = tuple(int(p) for p in row["dependency"].split(",") if int(p))
            question = Question(row["question_natural_language"], row["tuple"].split("(")[0].strip(), parents)
            items.setdefault(row["item_id"], {})[int(row["proposition_id"])] = question
        except ValueError:
            raise ValueError(f"{file}:{line} has no whole number as proposition or dependency") from None
        if not (row["item_id"].strip() and question.text.strip()):
            raise ValueError(f"{file}:{line} has no item_id or no question_natural_language")
    return items


def incomplete(questions: Mapping[int, Question]) -> bool:
    """Whether a question's parent is missing."""
    return any(p not in questions for q in questions.values() for p in q.parents)


def hopeless(questions: Mapping[int, Question]) -> bool:
    """Whether a missing parent is reached whatever the answers are: it is a question's first."""
    return any(q.parents and q.parents[0] not in questions for q in questions.values())


def fall(questions: Mapping[int, Question], scores: Mapping[int, float]) -> dict[int, float] | None:
    """Scores with 0 for every question of which a parent has 0, in the file's order: so it passes on to later
    grandchildren. None where a parent is reached that is missing: the official script then drops the item. It looks at
    a question's parents in their order, up to the first that has 0."""
    fallen = dict(scores)
    for q, question in questions.items():
        for p in question.parents:
            if p not in fallen:
                return None
            if fallen[p] == 0:
                fallen[q] = 0.0
                break
    return fallen


def marks(answers: Mapping[str, str]) -> dict[int, float]:
    """Proposition -> 1 for "yes", 0 for anything else."""
    return {int(q): float(a == "yes") for q, a in answers.items()}


def summarize(rows: Sequence[Row], items: Items, quirks: Quirks) -> tuple[float, dict[str, dict[str, float]]]:
    """(overall, tables of level 1 and level 2), in percent. rows: filename, item and answers of each crop, of items
    that are not dropped."""
    overall = []
    level1: dict[str, list[float]] = defaultdict(list)
    level2: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        questions = items[row["item"]]
        plain = [marks(answers) for answers in row["answers"]]
        fallen = [f for m in plain if (f := fall(questions, m)) is not None]
        overall.append(mean(mean(f.values()) for f in fallen))
        for m in plain[-1:] if quirks.last_crop_categories else fallen:
            for q, question in questions.items():
                level2[question.category].append(m[q])
    for category in sorted(level2):
        level1[category.split("-")[0].strip()] += level2[category]
    tables = {
        "category, level 1": {c: 100 * mean(level1[c]) for c in sorted(level1)},
        "category, level 2": {c: 100 * mean(level2[c]) for c in sorted(level2)},
    }
    return 100 * mean(overall), tables


def crops(grid: Image.Image, path: Path, resolution: int | None) -> list[Image.Image]:
    """The four images of a grid, in reading order, of `resolution` pixels along a side; by default half the grid's.

    Raises ValueError where the grid is no such grid.
    """
    w, h = grid.size
    r = resolution or w // 2
    if (w, h) != (2 * r, 2 * r) or not r:
        raise ValueError(f"{path} is {w} x {h}; expected a grid of 2 x 2 square images, {2 * r} x {2 * r} in all")
    return [grid.crop((x, y, x + r, y + r)) for y in (0, r) for x in (0, r)]


def grids(root: Path) -> dict[str, Path]:
    """File name -> file of a folder's grids. Raises ValueError where there is none."""
    paths = {p.name: p for p in files_in(root, "*.png")}
    if not paths:
        raise ValueError(f"{root} holds no images; expected <item id>.png, a grid of 2 x 2 images each")
    return paths


def questions_of(
    names: Iterable[str], questions: Path, quirks: Quirks, root: Path = Path()
) -> dict[str, dict[int, Question]]:
    """By file name of a grid under `root`: the questions that are asked of it. The item that the official script leaves
    out is not there. Raises ValueError on a name of no item, on an item that depends on what it does not have, and
    where nothing is left to score."""
    everything, items = read_questions(questions, False), read_questions(questions, quirks.skip_first_row)
    names = list(names)
    if strange := next((n for n in names if _item(n) not in everything), None):
        raise ValueError(f"{root / strange} is of no item in {questions.name}; expected <item id>.png")
    lacking = hopeless if quirks.skip_first_row else incomplete
    left_out = [n for n in names if _item(n) not in items or lacking(items[_item(n)])]
    if left_out and not quirks.skip_first_row:
        raise ValueError(f"{questions}: item {_item(left_out[0])} depends on a proposition that it does not have")
    if len(left_out) == len(names):
        raise nothing_left(root / left_out[0], questions)
    return {n: items[_item(n)] for n in names if n not in left_out}


def nothing_left(grid: Path, questions: Path) -> ValueError:
    return ValueError(
        f"DPG-Bench: {grid} is all there is, and left out, as officially, since the first question of {questions.name} "
        "is skipped; add images of other items, or say --no-skip-first-row"
    )


def settings_of(vqa: VQA) -> dict[str, Any]:
    """What answers depend on beside the images and questions."""
    return {"benchmark": "DPG-Bench", **vqa.settings}


def score_dpg(
    root: Path,
    out: Path,
    questions: Path,
    vqa: VQA,
    quirks: Quirks | None = None,
    *,
    resolution: int | None = None,
    name: str = "",
    steps: int | None = None,
) -> Result:
    """Score a folder of grids; scored.jsonl, results.json and results.md in `out`. A killed run goes on where it was.

    questions: dpg_bench.csv. name, steps: what the images are of. Raises ValueError on a grid without questions.
    """
    quirks = quirks or Quirks()
    paths = grids(root)
    asked = {n: {q: x.text for q, x in of.items()} for n, of in questions_of(paths, questions, quirks, root).items()}
    kept, left_out = {n: paths[n] for n in asked}, [n for n in paths if n not in asked]
    everything, items = read_questions(questions, False), read_questions(questions, quirks.skip_first_row)
    digests = stamps({n: (p, [list(asked[n].items()), resolution]) for n, p in kept.items()})

    def score(names: Sequence[str]) -> list[Row]:
        rows = []
        for n in names:
            four = crops(open_image(kept[n]), kept[n], resolution)
            said = [vqa.answers(n, i, image, asked[n]) for i, image in enumerate(four)]
            rows.append({"item": _item(n), "answers": [{str(q): a for q, a in s.items()} for s in said]})
        return rows

    settings = settings_of(vqa)
    rows = score_images(out, root, settings, digests, score, each=IMAGES)
    reached = [r for r in rows if any(fall(items[r["item"]], marks(said)) is None for said in r["answers"])]
    rows = [r for r in rows if r not in reached]
    left_out += [r["filename"] for r in reached]
    if not rows:
        raise nothing_left(root / left_out[0], questions)
    overall, tables = summarize(rows, items, quirks)
    result = Result(
        benchmark="DPG-Bench",
        label=vqa.label,
        name=name or root.name,
        steps=steps,
        overall=overall,
        tables=tables,
        images=IMAGES * len(rows),
        settings=settings | vars(quirks),
        deviations=[*vqa.deviations, *_deviations(quirks, len(rows), len(everything), left_out)],
    )
    write_results(out, result)
    return result


def _item(filename: str) -> str:
    return filename.split(".")[0]


def _deviations(quirks: Quirks, n: int, items: int, left_out: Sequence[str]) -> list[str]:
    said = []
    if not quirks.skip_first_row:
        said.append("the csv's first question is asked too; the official script skips it")
    elif left_out:
        said.append(f"{', '.join(left_out)} left out, as officially, where the csv's first question is skipped")
    if not quirks.last_crop_categories:
        said.append("category tables count all four images, after children fell with their parents")
    if items != PROMPTS:
        said.append(f"the csv has {items} items instead of {PROMPTS}")
    if n + len(left_out) != items:
        said.append(f"images of {n + len(left_out)} of {items} items")
    return said


@dataclass(frozen=True)
class DPG:
    """DPG-Bench with what answers its questions, loaded once for however many folders are scored; a
    benchmark.Benchmark."""

    questions: Path
    vqa: VQA
    quirks: Quirks = field(default_factory=Quirks)
    resolution: int | None = None

    @classmethod
    def load(
        cls,
        questions: Path,
        *,
        vqa: str = BLIP,
        answers: Path | None = None,
        quirks: Quirks | None = None,
        resolution: int | None = None,
        device: str = AUTO,
    ) -> DPG:
        """With BLIP-VQA (a folder or Hub name), or with a file of recorded answers. Raises ValueError, saying what to
        put where."""
        read_questions(questions, False)
        network: VQA = RecordedVQA(answers) if answers else BlipVQA.load(vqa, device)
        return cls(questions, network, quirks or Quirks(), resolution)

    @property
    def label(self) -> str:
        return self.vqa.label

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.vqa)

    @property
    def result_settings(self) -> dict[str, Any]:
        """See benchmark.Benchmark."""
        return self.settings | vars(self.quirks)

    def check(self, files: Sequence[str]) -> None:
        """See benchmark.Benchmark."""
        asked = questions_of(files, self.questions, self.quirks)
        if isinstance(self.vqa, RecordedVQA):
            self.vqa.check({name: list(questions) for name, questions in asked.items()})

    def score(self, images: Path, out: Path, *, name: str = "", steps: int | None = None) -> Result:
        """See score_dpg."""
        how: Any = dict(resolution=self.resolution, name=name, steps=steps)
        return score_dpg(images, out, self.questions, self.vqa, self.quirks, **how)


def run_dpg(
    images: Path, out: Path, questions: Path, *, name: str = "", steps: int | None = None, **how: Any
) -> Result:
    """score_dpg on what DPG.load makes of the rest; the images are looked at before."""
    check_images(images)
    grids(images)
    return DPG.load(questions, **how).score(images, out, name=name, steps=steps)
