"""GenEval: a folder of images scored by its rules on recorded detections."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from geneval_cases import CASES, make_folder, one, record
from PIL import Image

from emf.data.digits import TAGS
from emf.evaluate.benchmark import mean
from emf.evaluate.detector import RecordedDetector
from emf.evaluate.geneval import run_geneval, score_geneval
from emf.evaluate.published import BENCHMARKS
from emf.evaluate.rules import Detection
from emf.files import read_rows


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
    rows = read_rows(tmp_path / "out" / "scored.jsonl")
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
    whole = score_geneval(root, tmp_path / "whole", RecordedDetector(file))
    first, second = Counted(file), Counted(file)
    first.limit = 50
    with pytest.raises(KeyboardInterrupt):
        score_geneval(root, tmp_path / "out", first)
    scored = tmp_path / "out" / "scored.jsonl"
    assert len(read_rows(scored)) == 50
    scored.write_bytes(scored.read_bytes()[:-7])  # torn inside the 50th line
    assert score_geneval(root, tmp_path / "out", second) == whole
    assert second.looked == 2 * len(CASES) - 49
    for name in ("scored.jsonl", "results.json", "results.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    third = Counted(file)
    score_geneval(root, tmp_path / "out", third)
    assert third.looked == 0


def test_another_image_or_prompt_is_scored_again_and_a_removed_one_forgotten(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    root, file = folder
    score_geneval(root, tmp_path / "out", RecordedDetector(file))
    Image.new("RGB", (8, 8), "blue").save(root / "00003" / "samples" / "0000.png")
    other = json.loads((root / "00005" / "metadata.jsonl").read_text()) | {"prompt": "other"}
    (root / "00005" / "metadata.jsonl").write_text(json.dumps(other))
    (root / "00007" / "samples" / "0001.png").unlink()
    counted = Counted(file)
    with pytest.raises(ValueError, match="results.json is of 154 images, and of .* 153 are to be scored; put the"):
        score_geneval(root, tmp_path / "out", counted)
    assert not counted.looked
    (tmp_path / "out" / "results.json").unlink()
    result = score_geneval(root, tmp_path / "out", counted)
    assert counted.looked == 3 and result.images == 2 * len(CASES) - 1  # one image; one prompt with two images
    assert "other" in [r["prompt"] for r in read_rows(tmp_path / "out" / "scored.jsonl")]


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
    with pytest.raises(ValueError, match="; give another folder to write"):
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


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "holds no prompts; expected folders 00000"),
        ("no metadata", r"metadata.jsonl does not exist; expected the prompt's object"),
        ("no json", r"metadata.jsonl is JSON that ends too early; .*expected the prompt's object"),
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
    with pytest.raises(ValueError, match="detections.jsonl:1 lacks 'box'"):
        run_geneval(root, tmp_path / "out", detections=file)
    for found in ({"score": float("nan")}, {"box": [0, 0, float("inf"), 1]}):
        row = {"label": "dog", "score": 1, "box": [0, 0, 1, 1]} | found
        file.write_text(json.dumps({"filename": "a", "detections": [row]}) + "\n")
        with pytest.raises(ValueError, match="detections.jsonl:1 has a score or a box of NaN or inf"):
            run_geneval(root, tmp_path / "out", detections=file)
    file.write_text('{"filename": "a", "detections": [{"label": ["dog"], "score": 1, "box": [0, 0, 1, 1]}]}\n')
    with pytest.raises(ValueError, match="detections.jsonl:1 lacks a label or a colour that is text"):
        run_geneval(root, tmp_path / "out", detections=file)
    file.write_text("no json\n")
    with pytest.raises(ValueError, match="detections.jsonl:1 is not JSON"):
        run_geneval(root, tmp_path / "out", detections=file)
    with pytest.raises(ValueError, match="absent.jsonl does not exist"):
        run_geneval(root, tmp_path / "out", detections=tmp_path / "absent.jsonl")
