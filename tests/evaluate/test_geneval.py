"""GenEval: its rules on hand-made detections, a folder scored through them, and the whole path on tiny networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import clip_tokenizer

from emf.data.digits import COLORS, TAGS
from emf.evaluate import benchmark
from emf.evaluate.benchmark import mean, read_jsonl
from emf.evaluate.clip import Clip, center_square, normalized
from emf.evaluate.detector import (
    CLASSES,
    HFDetector,
    RecordedDetector,
    Views,
    cut_out,
    detector_pixels,
    instances,
)
from emf.evaluate.geneval import run_geneval, score_geneval
from emf.evaluate.published import BENCHMARKS
from emf.evaluate.rules import Detection, check_metadata, evaluate, select

# The rules: (tag, include, exclude, detections as (class, score, x, y, colour) of 10 x 10 pixels, correct)


def one(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


def at(label: str, score: float = 0.95, x: float = 0, y: float = 0, color: str = "red") -> Detection:
    return Detection(label, score, (x, y, x + 10, y + 10), color)


def beside(relation: str, **more: Any) -> list[dict[str, Any]]:
    return [one("dog"), one("cat", position=[relation, 0], **more)]


def dogs(n: int, score: float = 0.95) -> list[Detection]:
    return [at("dog", score)] * n


def placed(dx: float, dy: float = 0) -> list[Detection]:
    """A cat whose centre lies (dx, dy) from the dog's; their sizes sum to 20, so that offsets up to 2 are none."""
    return [at("dog", x=100, y=100), at("cat", x=100 + dx, y=100 + dy)]


FOUR = dict(include=[one("dog", 4)], exclude=[one("dog", 5)])
RED = dict(include=[one("dog", color="red")])
TWO_RED = dict(include=[one("dog", 2, color="red")])
CASES: dict[str, tuple[str, dict[str, Any], list[Detection], bool]] = {
    "there": ("single_object", dict(include=[one("dog")]), dogs(1), True),
    "not there": ("single_object", dict(include=[one("dog")]), [], False),
    "another class": ("single_object", dict(include=[one("dog")]), [at("cat")], False),
    "also another class": ("single_object", dict(include=[one("dog")]), [at("cat"), at("dog")], True),
    "surplus without exclude": ("single_object", dict(include=[one("dog")]), dogs(3), True),
    "score above 0.3": ("single_object", dict(include=[one("dog")]), dogs(1, 0.3001), True),
    "score at 0.3": ("single_object", dict(include=[one("dog")]), dogs(1, 0.3), False),
    "score below 0.3": ("single_object", dict(include=[one("dog")]), dogs(1, 0.2999), False),
    "0.9 is for counting only": ("two_object", dict(include=[one("dog")]), dogs(1, 0.5), True),
    "both there": ("two_object", dict(include=[one("dog"), one("cat")]), [at("cat"), at("dog")], True),
    "second missing": ("two_object", dict(include=[one("dog"), one("cat")]), dogs(2), False),
    "first missing": ("two_object", dict(include=[one("dog"), one("cat")]), [at("cat")], False),
    "nothing is asked": ("two_object", dict(include=[]), [], True),
    "count: none": ("counting", FOUR, [], False),
    "count: under by one": ("counting", FOUR, dogs(3), False),
    "count: exact": ("counting", FOUR, dogs(4), True),
    "count: over by one": ("counting", FOUR, dogs(5), False),
    "count: far over": ("counting", FOUR, dogs(20), False),
    "count: one is at 0.9": ("counting", FOUR, dogs(3) + dogs(1, 0.9), False),
    "count: one is above 0.9": ("counting", FOUR, dogs(3) + dogs(1, 0.9001), True),
    "count: surplus below 0.9": ("counting", FOUR, dogs(4) + dogs(3, 0.89), True),
    "count: surplus above 0.9": ("counting", FOUR, dogs(4) + dogs(1, 0.91), False),
    "count: others do not count": ("counting", FOUR, dogs(4) + [at("cat")] * 5, True),
    "exclude alone, kept": ("counting", dict(include=[], exclude=[one("dog", 2)]), dogs(1), True),
    "exclude alone, broken": ("counting", dict(include=[], exclude=[one("dog", 2)]), dogs(2), False),
    "exclude another class": ("two_object", dict(include=[one("cat")], exclude=[one("dog")]), [at("cat")], True),
    "excluded class seen": (
        "two_object",
        dict(include=[one("cat")], exclude=[one("dog")]),
        [at("cat"), *dogs(1)],
        False,
    ),
    "excluded at 0.3": (
        "two_object",
        dict(include=[one("cat")], exclude=[one("dog")]),
        [at("cat"), at("dog", 0.3)],
        True,
    ),
    "sixteen at most": ("counting", dict(include=[one("dog", 16)], exclude=[one("dog", 17)]), dogs(20), True),
    "sixteen, not fifteen": ("counting", dict(include=[one("dog", 16)]), dogs(15), False),
    "seventeen cannot be": ("counting", dict(include=[one("dog", 17)]), dogs(20), False),
    "sixteen of each class": (
        "counting",
        dict(include=[one("dog", 16), one("cat", 16)]),
        dogs(16) + [at("cat")] * 17,
        True,
    ),
    "colour right": ("colors", RED, [at("dog", color="red")], True),
    "colour wrong": ("colors", RED, [at("dog", color="blue")], False),
    "colour of the best alone, right": ("colors", RED, [at("dog", 0.9), at("dog", 0.8, color="blue")], True),
    "colour of the best alone, wrong": ("colors", RED, [at("dog", 0.8), at("dog", 0.9, color="blue")], False),
    "colour of one below 0.3": ("colors", RED, [at("dog", 0.3), at("dog", 0.4, color="blue")], False),
    "colour of both": ("colors", TWO_RED, dogs(2), True),
    "colour of one of two": ("colors", TWO_RED, [at("dog"), at("dog", color="blue")], False),
    "colour of the best two of three": ("colors", TWO_RED, [at("dog", 0.4, color="blue"), *dogs(2)], True),
    "coloured but too few": ("colors", TWO_RED, dogs(1), False),
    "colour of another class": ("colors", RED, [at("dog", color="blue"), at("cat", color="red")], False),
    "two colours right": (
        "color_attr",
        dict(include=[one("dog", color="red"), one("cat", color="blue")]),
        [at("dog"), at("cat", color="blue")],
        True,
    ),
    "two colours swapped": (
        "color_attr",
        dict(include=[one("dog", color="red"), one("cat", color="blue")]),
        [at("dog", color="blue"), at("cat", color="red")],
        False,
    ),
    "one colour of two": (
        "color_attr",
        dict(include=[one("dog", color="red"), one("cat", color="blue")]),
        [at("dog"), at("cat")],
        False,
    ),
    "left": ("position", dict(include=beside("left of")), placed(-30), True),
    "right": ("position", dict(include=beside("right of")), placed(30), True),
    "above": ("position", dict(include=beside("above")), placed(0, -30), True),
    "below": ("position", dict(include=beside("below")), placed(0, 30), True),
    "left, mirrored": ("position", dict(include=beside("left of")), placed(30), False),
    "right, mirrored": ("position", dict(include=beside("right of")), placed(-30), False),
    "above, mirrored": ("position", dict(include=beside("above")), placed(0, 30), False),
    "below, mirrored": ("position", dict(include=beside("below")), placed(0, -30), False),
    # along one axis what is left, d - 2, must exceed d / 2: d > 4
    "left at the threshold": ("position", dict(include=beside("left of")), placed(-4), False),
    "left beyond the threshold": ("position", dict(include=beside("left of")), placed(-4.01), True),
    "right at the threshold": ("position", dict(include=beside("right of")), placed(4), False),
    "right beyond the threshold": ("position", dict(include=beside("right of")), placed(4.01), True),
    "above at the threshold": ("position", dict(include=beside("above")), placed(0, -4), False),
    "above beyond the threshold": ("position", dict(include=beside("above")), placed(0, -4.01), True),
    "below at the threshold": ("position", dict(include=beside("below")), placed(0, 4), False),
    "below beyond the threshold": ("position", dict(include=beside("below")), placed(0, 4.01), True),
    "same place": ("position", dict(include=beside("left of")), placed(0), False),
    "within the slack": ("position", dict(include=beside("left of")), placed(-2), False),
    "diagonal counts as left": ("position", dict(include=beside("left of")), placed(-30, 30), True),
    "diagonal counts as below": ("position", dict(include=beside("below")), placed(-30, 30), True),
    "steep is not left": ("position", dict(include=beside("left of")), placed(-15, 40), False),
    "no target": ("position", dict(include=beside("left of")), [at("cat")], False),
    "nothing at the target": ("position", dict(include=beside("left of")), dogs(1), False),
    "the best cat is asked": (
        "position",
        dict(include=beside("left of")),
        [*placed(30), at("cat", 0.5, x=0, y=100)],
        False,
    ),
    "target of the wrong colour is none": (
        "position",
        dict(include=[one("dog", color="blue"), one("cat", position=["left of", 0])]),
        placed(-30),
        False,
    ),
    "coloured target": (
        "position",
        dict(include=[one("dog", color="red"), one("cat", position=["left of", 0])]),
        placed(-30),
        True,
    ),
    "placed but of the wrong colour": ("position", dict(include=beside("left of", color="blue")), placed(-30), False),
    "a misplaced object is no target": (
        "position",
        dict(include=[*beside("left of"), one("cow", position=["above", 1])]),
        [*placed(30), at("cow", x=130, y=0)],
        False,
    ),
    "a chain of relations": (
        "position",
        dict(include=[*beside("left of"), one("cow", position=["above", 1])]),
        [*placed(-30), at("cow", x=70, y=0)],
        True,
    ),
    "every dog must be passed": (
        "position",
        dict(include=[one("dog", 2), one("cat", position=["left of", 0])]),
        [*placed(-30), at("dog", x=0, y=100)],
        False,
    ),
    "every dog is passed": (
        "position",
        dict(include=[one("dog", 2), one("cat", position=["left of", 0])]),
        [*placed(-30), at("dog", x=200, y=100)],
        True,
    ),
    "every cat must stand there": (
        "position",
        dict(include=[one("dog"), one("cat", 2, position=["left of", 0])]),
        [*placed(-30), at("cat", x=200, y=100)],
        False,
    ),
}


def test_there_are_cases_enough() -> None:
    assert len(CASES) >= 60 and {tag for tag, *_ in CASES.values()} == set(TAGS)


@pytest.mark.parametrize("case", CASES)
def test_rules(case: str) -> None:
    tag, spec, detections, correct = CASES[case]
    said, reason = evaluate(spec, select(detections, tag))
    assert said == correct and bool(reason) != correct


@pytest.mark.parametrize("case", CASES)
def test_rules_do_not_depend_on_the_order_of_detections(case: str) -> None:
    tag, spec, detections, correct = CASES[case]
    assert evaluate(spec, select(detections[::-1], tag))[0] == correct


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no target", "no target for cat to be left of"),
        ("target of the wrong colour is none", "no target for cat to be left of"),
        ("a misplaced object is no target", "no target for cow to be above"),
        ("placed but of the wrong colour", "expected blue cat>=1, found red"),  # its position is not asked
    ],
)
def test_an_entry_that_failed_is_no_target_for_later_ones(case: str, says: str) -> None:
    tag, spec, detections, _ = CASES[case]
    assert evaluate(spec, select(detections, tag))[1].split("; ")[-1] == says


def test_colours_are_asked_of_the_count_best_alone_and_only_where_they_matter() -> None:
    asked: list[tuple[str, list[float]]] = []

    def colors(label: str, found: Any) -> list[str]:
        asked.append((label, [d.score for d in found]))
        return ["red"] * len(found)

    many = [at("dog", s) for s in (0.4, 0.8, 0.6)]
    assert evaluate(TWO_RED, many, colors=colors)[0] and asked == [("dog", [0.8, 0.6])]
    asked.clear()
    assert not evaluate(TWO_RED, many[:1], colors=colors)[0] and not asked  # too few: the colours do not matter
    assert evaluate(dict(include=[one("dog")]), many, colors=colors)[0] and not asked


def test_selection_is_by_score_and_class() -> None:
    found = [at("dog", 0.31 + i / 100) for i in range(20)] + [at("cat", 0.95)]
    kept = select(found, "position")
    assert [d.score for d in kept] == sorted((d.score for d in kept), reverse=True)
    assert sorted(d.score for d in kept if d.label == "dog") == [0.31 + i / 100 for i in range(4, 20)]
    assert [d.label for d in select(found, "counting")] == ["cat"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ([], "prompt is missing"),
        ({"tag": "position", "include": []}, "prompt is missing"),
        ({"prompt": "", "include": []}, "tag or include"),
        ({"prompt": "", "tag": "position", "include": [one("seven")]}, r"include\[0\] is none"),
        ({"prompt": "", "tag": "position", "include": [one("dog", 0)]}, "no positive number"),
        ({"prompt": "", "tag": "position", "include": [], "exclude": [one("seven")]}, r"exclude\[0\]"),
        ({"prompt": "", "tag": "position", "include": [one("dog", position=["on", 0])]}, "no relation"),
        ({"prompt": "", "tag": "position", "include": [one("dog", position=["above", 0])]}, "earlier entry"),
    ],
)
def test_metadata_that_cannot_hold_is_named(metadata: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{says}"):
        check_metadata(metadata, CLASSES, "here")


# A folder


def make_folder(root: Path, specs: list[dict[str, Any]], images: int = 2) -> list[str]:
    """GenEval's layout, every image another; the images' names."""
    rng, names = np.random.default_rng(0), []
    for i, spec in enumerate(specs):
        samples = root / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(spec) + "\n")
        for j in range(images):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(samples / f"{j:04d}.png")
            names.append(f"{i:05d}/samples/{j:04d}.png")
    return names


def record(file: Path, found: dict[str, list[Detection]]) -> Path:
    keys = ("label", "score", "box", "color")
    rows = [{"filename": n, "detections": [{k: getattr(d, k) for k in keys} for d in ds]} for n, ds in found.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Path]:
    """(root, detections file) of every case twice, the second time without any detection."""
    cases = [CASES[c] for c in CASES]
    specs = [{"tag": tag, "prompt": f"case {i}", **spec} for i, (tag, spec, *_) in enumerate(cases)]
    names = make_folder(tmp_path / "images", specs)
    found = {n: cases[i // 2][2] if i % 2 == 0 else [] for i, n in enumerate(names)}
    return tmp_path / "images", record(tmp_path / "detections.jsonl", found)


def test_a_folder_is_scored_as_its_cases(folder: tuple[Path, Path], tmp_path: Path) -> None:
    root, detections = folder
    result = run_geneval(root, tmp_path / "out", detections=detections, name="mine", steps=4)
    rows = read_jsonl(tmp_path / "out" / "scored.jsonl")
    assert len(rows) == result.images == 2 * len(CASES)
    assert [r["correct"] for r in rows[::2]] == [c[3] for c in CASES.values()]
    assert [r["filename"] for r in rows] == sorted(r["filename"] for r in rows)
    for row, (tag, spec, *_) in zip(rows[::2], CASES.values(), strict=True):
        assert row["tag"] == tag and json.loads(row["metadata"])["include"] == spec["include"]
        assert all(len(box) == 5 for boxes in json.loads(row["details"]).values() for box in boxes)
    by_tag = {tag: np.mean([r["correct"] for r in rows if r["tag"] == tag]) for tag in TAGS}
    assert result.tables["task"] == pytest.approx(by_tag) and list(by_tag) == list(result.tables["task"])
    assert result.overall == pytest.approx(np.mean(list(by_tag.values())))
    assert result.tables["over all tasks"] == {
        "correct images": np.mean([r["correct"] for r in rows]),
        "prompts with a correct image": np.mean(
            [a["correct"] or b["correct"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
        ),
    }
    assert result.overall != pytest.approx(np.mean([r["correct"] for r in rows]))  # tags, not images


def test_results_stand_beside_the_papers(folder: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_geneval(folder[0], tmp_path / "out", detections=folder[1], name="mine", steps=4)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["overall"] == result.overall and written["deviations"] == result.deviations
    assert [tuple(row) for row in written["paper"]] == list(BENCHMARKS["GenEval"])
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| EMF, paper | 4 | 0.90 |" in page and "| BLIP3o-NEXT, paper | 30 | 0.91 |" in page
    assert f"| **mine**, GenEval (recorded detections) | 4 | **{result.overall:.3f}** |" in page
    assert all(f"- {text}\n" in page for text in result.deviations)
    assert any(f"{len(CASES)} prompts instead of 553" in text for text in result.deviations)
    assert any("2 to 2 images a prompt instead of 4" in text for text in result.deviations)


class Counted(RecordedDetector):
    """Counts the images looked at, and stops after `limit` of them."""

    limit = 10**9
    looked = 0

    def detect(self, path: Path) -> list[Detection]:
        if self.looked == self.limit:
            raise KeyboardInterrupt
        self.looked += 1
        return super().detect(path)


def test_a_killed_run_goes_on_where_it_was(folder: tuple[Path, Path], tmp_path: Path) -> None:
    root, file = folder
    whole = score_geneval(root, tmp_path / "whole", RecordedDetector(file, root))
    first, second = Counted(file, root), Counted(file, root)
    first.limit = 50
    with pytest.raises(KeyboardInterrupt):
        score_geneval(root, tmp_path / "out", first)
    scored = tmp_path / "out" / "scored.jsonl"
    assert len(read_jsonl(scored)) == 50
    scored.write_bytes(scored.read_bytes()[:-7])  # torn inside the 50th line
    assert score_geneval(root, tmp_path / "out", second) == whole
    assert second.looked == 2 * len(CASES) - 49
    for name in ("scored.jsonl", "results.json", "results.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    third = Counted(file, root)
    score_geneval(root, tmp_path / "out", third)
    assert third.looked == 0


def test_another_image_or_prompt_is_scored_again_and_a_removed_one_forgotten(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    root, file = folder
    score_geneval(root, tmp_path / "out", RecordedDetector(file, root))
    Image.new("RGB", (8, 8), "blue").save(root / "00003" / "samples" / "0000.png")
    other = json.loads((root / "00005" / "metadata.jsonl").read_text()) | {"prompt": "other"}
    (root / "00005" / "metadata.jsonl").write_text(json.dumps(other))
    (root / "00007" / "samples" / "0001.png").unlink()
    counted = Counted(file, root)
    result = score_geneval(root, tmp_path / "out", counted)
    assert counted.looked == 3 and result.images == 2 * len(CASES) - 1  # one image; one prompt with two images
    assert "other" in [r["prompt"] for r in read_jsonl(tmp_path / "out" / "scored.jsonl")]


def test_scores_by_other_settings_are_not_mixed(folder: tuple[Path, Path], tmp_path: Path) -> None:
    root, file = folder
    run_geneval(root, tmp_path / "out", detections=file)
    before = (tmp_path / "out" / "results.json").read_bytes()
    file.write_text(file.read_text() + json.dumps({"filename": "x", "detections": []}) + "\n")
    with pytest.raises(ValueError, match=r"other settings \(detections\); give another folder"):
        run_geneval(root, tmp_path / "out", detections=file)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["scored.jsonl", "results.json", "results.md", "settings.json"])
def test_a_users_file_is_not_overwritten(folder: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="not this scorer's; give another folder"):
        run_geneval(folder[0], tmp_path / "out", detections=folder[1])
    assert mine.read_text() == "mine"


def test_a_mean_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    values = list(rng.normal(0, 1, 1000) * 10.0 ** rng.integers(-12, 12, 1000))
    assert len({mean(rng.permutation(values).tolist()) for _ in range(50)}) == 1
    assert len({sum(rng.permutation(values).tolist()) for _ in range(50)}) > 1


def break_folder(root: Path, how: str) -> None:
    first = root / "00000"
    if how == "empty":
        for folder in root.iterdir():
            folder.rename(root.parent / f"moved-{folder.name}")
    elif how == "no metadata":
        (first / "metadata.jsonl").unlink()
    elif how == "no json":
        (first / "metadata.jsonl").write_text("{")
    elif how == "class":
        (first / "metadata.jsonl").write_text(json.dumps({"tag": "colors", "prompt": "", "include": [one("seven")]}))
    elif how == "no images":
        for image in (first / "samples").iterdir():
            image.rename(image.with_suffix(".jpg"))
    elif how == "no image":
        (first / "samples" / "0000.png").write_text("text")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "holds no prompts; expected folders 00000"),
        ("no metadata", r"metadata.jsonl is missing or not JSON"),
        ("no json", r"metadata.jsonl is missing or not JSON"),
        ("class", r"metadata.jsonl: the class of include\[0\]"),
        ("no images", r"00000 holds no images; expected samples/0000.png"),
    ],
)
def test_a_broken_folder_is_named(folder: tuple[Path, Path], tmp_path: Path, how: str, says: str) -> None:
    break_folder(folder[0], how)
    with pytest.raises(ValueError, match=says) as error:
        run_geneval(folder[0], tmp_path / "out", detections=folder[1])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_recorded_detections_that_do_not_fit_are_named(folder: tuple[Path, Path], tmp_path: Path) -> None:
    root, file = folder
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="has no line for 00000/samples/0000.png"):
        run_geneval(root, tmp_path / "out", detections=file)
    file.write_text('{"filename": "a", "detections": [{"label": "dog", "score": 1}]}\n')
    with pytest.raises(ValueError, match="lacks 'box'"):
        run_geneval(root, tmp_path / "out", detections=file)
    file.write_text("no json\n")
    with pytest.raises(ValueError, match="detections.jsonl:1 is no JSON object"):
        run_geneval(root, tmp_path / "out", detections=file)
    with pytest.raises(ValueError, match="absent.jsonl does not exist"):
        run_geneval(root, tmp_path / "out", detections=tmp_path / "absent.jsonl")


# Mask2Former's pixels and answers


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [  # width, height; mmdet's rescaling to at most 1333 x 800, then padding to multiples of 32
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((640, 480), (800, 1067), (800, 1088)),
        ((480, 640), (1067, 800), (1088, 800)),
        ((1000, 300), (400, 1333), (416, 1344)),
    ],
)
def test_pixels_are_scaled_and_padded(size: tuple[int, int], inner: tuple[int, int], padded: tuple[int, int]) -> None:
    pixels, shape = detector_pixels(Image.new("RGB", size, (255, 0, 0)), Views())
    assert shape == inner and tuple(pixels.shape[1:]) == padded
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    inside = torch.zeros(padded, dtype=torch.bool)
    inside[: inner[0], : inner[1]] = True
    assert (pixels[:, inside] == pixels[:, :1, 0]).all() and (pixels[:, ~inside] == 0).all()


def test_answers_become_instances_as_in_the_official_detector() -> None:
    logits = torch.full((3, 4), -50.0)
    logits[0, 1] = logits[1, 2] = 50  # sure
    logits[2, 0] = logits[2, 3] = 50  # half void
    masks = torch.full((3, 8, 8), -3.0)
    masks[0, 2:4, 1:5] = 2.0
    masks[2, :, :4] = 1.0
    found = instances(logits, masks, (8, 8), (8, 8), (8, 8), Views(least=0.3))
    by_class = {k: (score, box, mask) for k, score, box, mask in found}
    assert by_class.keys() == {0, 1}  # query 1 has no mask
    sigmoid = torch.sigmoid(torch.tensor([1.0, 2.0])).tolist()
    assert by_class[1][0] == pytest.approx(sigmoid[1], abs=1e-5) and by_class[1][1] == (1, 2, 5, 4)
    assert by_class[0][0] == pytest.approx(0.5 * sigmoid[0], abs=1e-5) and by_class[0][1] == (0, 0, 4, 8)
    assert by_class[1][2].sum() == 8 and by_class[1][2].dtype == bool


def test_padding_is_cut_off_before_masks_are_scaled_to_the_image() -> None:
    logits = torch.tensor([[50.0, -50, -50]])
    masks = torch.full((1, 8, 16), -4.0)
    masks[0, :, 8:] = 4.0  # the right half of 16, of which 12 are image
    ((_, _, box, mask),) = instances(logits, masks, (32, 64), (32, 48), (64, 96), Views())
    assert mask.shape == (64, 96) and box == (64, 0, 96, 64)


def test_one_query_may_be_several_objects_and_the_top_is_kept() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.35, 0.25], [0.05, 0.9, 0.05]]))
    masks = torch.full((2, 4, 4), 5.0)
    both = instances(logits, masks, (4, 4), (4, 4), (4, 4), Views())
    assert [(k, round(score, 2)) for k, score, *_ in both] == [(1, 0.89), (0, 0.4), (1, 0.35)]
    assert len(instances(logits, masks, (4, 4), (4, 4), (4, 4), Views(top=2))) == 2
    # what is left out for its class alone could not have passed the threshold
    every = instances(logits, masks, (4, 4), (4, 4), (4, 4), Views(least=0.0))
    assert [f[:3] for f in every if f[1] > 0.3] == [f[:3] for f in both if f[1] > 0.3]


def test_objects_are_cut_out_over_grey() -> None:
    image = Image.new("RGB", (10, 8), "red")
    mask = np.zeros((8, 10), bool)
    mask[2:6, 3:5] = True
    crop = np.array(cut_out(image, Detection("dog", 1, (3, 2, 7, 6), mask=mask)))
    assert crop.shape == (4, 4, 3)
    assert (crop[:, :2] == (255, 0, 0)).all() and (crop[:, 2:] == 0x99).all()
    assert cut_out(image, Detection("dog", 1, (3, 2, 7, 6))).getcolors() == [(16, (255, 0, 0))]


def test_clips_view_is_the_central_square() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    view = center_square(Image.fromarray(pixels), 10)
    assert view.size == (10, 10) and np.array(view)[:, 1:-1].min() > 200
    assert center_square(Image.new("RGB", (33, 77)), 16).size == (16, 16)


# The whole path on tiny networks of the real classes


def tiny_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = tower | dict(vocab_size=300, max_position_embeddings=40, bos_token_id=298, eos_token_id=299)
    vision = tower | dict(image_size=16, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random Mask2Former that is sure of itself, and of a random CLIP."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages)
    sizes = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16)
    layers = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6, num_labels=80)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **sizes, **layers))
    with torch.no_grad():
        model.class_predictor.weight.mul_(40)
        model.class_predictor.bias[-1] = -40  # never void
    model.save_pretrained(root / "mask2former")
    tiny_clip().save_pretrained(root / "clip")
    clip_tokenizer().save_pretrained(root / "clip")
    return root / "mask2former", root / "clip"


def test_the_whole_path(weights: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    detector.views = Views(long=120, short=64)
    specs = [
        {"tag": "colors", "prompt": f"a red {label}", "include": [one(label, color="red")]} for label in CLASSES[::20]
    ]
    names = make_folder(tmp_path / "images", specs)
    for n in names:
        Image.open(tmp_path / "images" / n).resize((48, 40)).save(tmp_path / "images" / n)
    found = detector.detect(tmp_path / "images" / names[0])
    assert found
    for d in found:
        ys, xs = np.nonzero(d.mask)
        assert d.mask is not None and d.mask.shape == (40, 48) and 0 < d.score <= 1 and d.label in CLASSES
        assert d.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    # ask for what is there, so that colours are classified too
    best = max(found, key=lambda d: d.score)
    color = detector.colors(tmp_path / "images" / names[0], best.label, [best])[0]
    asked = {"tag": "colors", "prompt": "", "include": [one(best.label, color=color)]}
    (tmp_path / "images" / "00000" / "metadata.jsonl").write_text(json.dumps(asked))
    result = score_geneval(tmp_path / "images", tmp_path / "out", detector)
    rows = read_jsonl(tmp_path / "out" / "scored.jsonl")
    assert rows[0]["correct"] and result.label == "GenEval (HF detector)"
    assert any("not interchangeable" in text for text in result.deviations)
    assert f"{best.label}" in json.loads(rows[0]["details"])
    monkeypatch.setattr(HFDetector, "detect", lambda *_: pytest.fail("was scored already"))
    assert score_geneval(tmp_path / "images", tmp_path / "out", detector) == result


def test_colours_are_clips_nearest_mean_of_templates(weights: tuple[Path, Path], tmp_path: Path) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(weights[1]).eval(), AutoTokenizer.from_pretrained(weights[1])
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    boxes = [(0, 0, 20, 20), (10, 5, 40, 30), (3, 9, 8, 12)]
    texts = [[f"a photo of a {c} dog", f"a photo of a {c}-colored dog", f"a photo of a {c} object"] for c in COLORS]
    with torch.no_grad():  # CLIP's own forward: unit vectors of a batch of texts and images
        tokens = tokenizer(sum(texts, []), padding=True, return_tensors="pt")
        crops = [normalized(center_square(Image.open(path).crop(b), 16)) for b in boxes]
        out = model(**tokens, pixel_values=torch.stack(crops))
        means = out.text_embeds.reshape(10, 3, -1).mean(1)
        similar = out.image_embeds @ (means / means.norm(dim=-1, keepdim=True)).T
    found = [Detection("dog", 1, b) for b in boxes]
    assert detector.colors(path, "dog", found) == [COLORS[i] for i in similar.argmax(1)]
    assert torch.allclose(detector.clip.texts(sum(texts, [])), out.text_embeds, atol=1e-5)
    assert torch.allclose(detector.clip.images(torch.stack(crops)), out.image_embeds, atol=1e-5)


def test_weights_that_are_not_there_are_named(weights: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="GenEval's detector: .*absent cannot be loaded .* put config.json") as error:
        HFDetector.load(str(tmp_path / "absent"), str(weights[1]))
    assert "\n" not in str(error.value)
    from safetensors.torch import load_file, save_file

    half = tmp_path / "half"
    half.mkdir()
    state = load_file(weights[1] / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    (half / "config.json").write_bytes((weights[1] / "config.json").read_bytes())
    with pytest.raises(ValueError, match="lacks 1 weights of CLIPModel, visual_projection.weight"):
        HFDetector.load(str(weights[0]), str(half))


def test_a_detector_of_other_classes_is_refused(weights: tuple[Path, Path]) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    with pytest.raises(ValueError, match="80 classes; expected COCO's 2"):
        HFDetector(detector.model, Clip(tiny_clip(), clip_tokenizer()), classes=("cat", "dog"))


def test_an_image_that_cannot_be_read_is_named(weights: tuple[Path, Path], tmp_path: Path) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    make_folder(tmp_path / "images", [{"tag": "colors", "prompt": "", "include": [one("dog")]}])
    break_folder(tmp_path / "images", "no image")
    with pytest.raises(ValueError, match=r"0000.png cannot be read as an image"):
        score_geneval(tmp_path / "images", tmp_path / "out", detector)
    assert not (tmp_path / "out" / benchmark.RESULTS).exists()
