"""Whatever a benchmark's or an analysis's files hold: what can be scored, or a ValueError of one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged import VALUES, changed, damaged, holds
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, noise

from emf.analyze.pairs import read_coco
from emf.analyze.prompts import read_prompts
from emf.data.digits import TAGS
from emf.data.scores_file import read_scores
from emf.evaluate.detector import CLASSES, RecordedDetector
from emf.evaluate.dpg import read_questions
from emf.evaluate.geneval import judge, read_folder
from emf.evaluate.hps import read_prompts as read_styles
from emf.evaluate.pictures import geneval_items
from emf.evaluate.vqa import RecordedVQA
from emf.files import check_claim, read_rows

METADATA = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0], "color": "red"}],
    "exclude": [{"class": "dog", "count": 2}],
    "prompt": "a red cat left of a dog",
}
FOUND = {"filename": "00000/samples/0000.png"}
FOUND |= {"detections": [{"label": "dog", "score": 0.9, "box": [0, 0, 4, 4], "color": "red"}] * 2}  # type: ignore[dict-item]
ANSWERS = {"filename": "item.png", "crop": 0, "answers": {"1": "yes", "2": "no"}}
COCO = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "id": 1, "caption": "a dog"}]}
QUESTIONS = b"item_id,text,proposition_id,dependency,tuple,question_natural_language\n1,a,1,0,entity - whole,is it?\n"
CLAIM = {"a": 1, "runs": {"b": "x"}}
ROW = {"by_tag": dict.fromkeys(TAGS, 0.5), "overall": 0.5}
SCORES = {"ceiling": 0.99, "noise": 0.0, "shuffled": 0.0, "captions": 300}
SCORES |= {"rows": [ROW | {"model": "fm", "steps": n} for n in (1, 4, 30)]}  # type: ignore[dict-item]


def scored(file: Path) -> None:
    """A folder of GenEval's, every image of which is judged by recorded detections."""
    root = file.parent
    work = read_folder(root.parent, CLASSES)
    (root.parent / "found.jsonl").write_text(json.dumps(FOUND))
    detector = RecordedDetector(root.parent / "found.jsonl")
    for name, metadata in work.items():
        assert isinstance(judge(metadata, root.parent / name, detector)["correct"], bool)


def judged(file: Path) -> None:
    """Recorded detections, by which an image is judged."""
    detector = RecordedDetector(file)
    assert isinstance(judge(METADATA, file.parent / FOUND["filename"], detector)["correct"], bool)


def answered(file: Path) -> None:
    """Recorded answers: none is made up."""
    said = RecordedVQA(file).answers("item.png", 0, noise(0), {1: "?", 2: "?"})
    assert len(said) == 2 and all(json.dumps(answer) in file.read_text() for answer in said.values())


Read = Callable[[Path], Any]
FILES: dict[str, tuple[Any, Read]] = {
    "geneval/00000/metadata.jsonl": (METADATA, scored),
    "found.jsonl": (FOUND, judged),
    "answers.jsonl": (ANSWERS, answered),
    "coco/annotations/captions_x.json": (COCO, lambda file: read_coco(file.parents[1], "x")),
    "photo.json": (["a dog", "a cat"], lambda file: read_styles(file.parent, "photo")),
    "prompts.jsonl": ({"prompt": "a dog", "text": "a cat"}, lambda file: (read_prompts(file), geneval_items(file))),
    "scores.json": (SCORES, lambda file: read_scores(file, "report")),
    "settings.json": (CLAIM, lambda file: check_claim(file.parent, CLAIM, (), growing="runs")),
    "log.jsonl": ({"step": 1}, lambda file: read_rows(file, ["step"])),
}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=80)
@given(data=st.data())
def test_any_record(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole, read = FILES[name]
    root = tmp_path_factory.getbasetemp() / "records"
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    for image in (root / "geneval/00000/samples/0000.png", root / "coco/x/1.jpg"):
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(encoded(noise(0)))
    file.write_text(json.dumps(whole) + "\n")
    read(file)
    tree = data.draw(changed([whole]))
    text = json.dumps(tree) if data.draw(st.booleans()) else json.dumps([tree, data.draw(VALUES)])[1:-1]
    file.write_text(text + "\n")
    holds(lambda: read(file), str(root))
    file.write_bytes(data.draw(damaged([json.dumps(whole).encode()])))
    holds(lambda: read(file), str(root))


@settings(max_examples=150)
@given(data=st.binary(max_size=60) | damaged([QUESTIONS]))
def test_any_questions(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "questions.csv"
    file.write_bytes(data)
    holds(lambda: read_questions(file, False), "questions.csv")
    for suffix in (".txt", ".jsonl"):
        prompts = file.with_suffix(suffix)
        prompts.write_bytes(data)
        holds(lambda prompts=prompts: read_prompts(prompts), "questions")
