"""DPG-Bench: questions, grids, children that fall with their parents, and the whole path on a tiny BLIP."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import bert_tokenizer

from emf.evaluate.dpg import Question, Quirks, crops, fall, read_questions, run_dpg, score_dpg
from emf.evaluate.vqa import BlipVQA
from emf.files import read_rows

COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]
ROWS = [  # item, proposition, dependency, tuple
    ("first", 1, "0", "entity - whole (barn)"),
    ("first", 2, "1", "attribute - color (barn, red)"),
    ("pair", 1, "0", "entity - whole (dog)"),
    ("pair", 2, "0", "entity - whole (cat)"),
    ("pair", 3, "1", "attribute - color (dog, brown)"),
    ("pair", 4, "1,2", "relation - spatial (dog, cat, left of)"),
    ("pair", 5, "3", "attribute - texture (dog, furry)"),
    ("alone", 1, "0", "global - (style, oil painting)"),
]
YES = {1: "yes", 2: "yes", 3: "yes", 4: "yes", 5: "yes"}


def write_csv(file: Path, rows: list[tuple[str, int, str, str]] = ROWS) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*COLUMNS, "tuple", "question_natural_language"])
        for item, p, parents, t in rows:
            about = t.split("(")[1][:-1]
            writer.writerow([item, "a text, with a comma", "", p, parents, "", "", t, f"Is {about} there?"])
    return file


@pytest.fixture
def bench(tmp_path: Path) -> tuple[Path, Path]:
    """(images, csv): a grid for every item, each crop of another colour."""
    root = tmp_path / "grids"
    root.mkdir()
    for k, item in enumerate(("first", "pair", "alone")):
        grid = Image.new("RGB", (16, 16))
        for i in range(4):
            grid.paste((60 * i, 50 * k, 7), (8 * (i % 2), 8 * (i // 2), 8 * (i % 2) + 8, 8 * (i // 2) + 8))
        grid.save(root / f"{item}.png")
    return root, write_csv(tmp_path / "dpg_bench.csv")


class Said:
    """Answers "yes" but for what `no` names: (item, crop) -> propositions."""

    label, settings = "DPG-Bench (test)", {"vqa": "said"}

    def __init__(self, no: Mapping[tuple[str, int], Mapping[int, str]] | None = None) -> None:
        self.no, self.asked, self.deviations = no or {}, [], ["said by a test"]

    def answers(self, name: str, crop: int, image: Image.Image, questions: Mapping[int, str]) -> dict[int, str]:
        self.asked.append((name, crop, image.size, image.getpixel((0, 0))[0] // 60))
        return {q: self.no.get((name, crop), {}).get(q, "yes") for q in questions}


def test_questions_are_read_as_the_official_script_reads_them(tmp_path: Path) -> None:
    items = read_questions(write_csv(tmp_path / "q.csv"), skip_first_row=False)
    assert [(k, list(v)) for k, v in items.items()] == [("first", [1, 2]), ("pair", [1, 2, 3, 4, 5]), ("alone", [1])]
    assert items["pair"][4] == Question("Is dog, cat, left of there?", "relation - spatial", (1, 2))
    assert items["alone"][1].category == "global -" and items["alone"][1].parents == ()
    skipped = read_questions(tmp_path / "q.csv")
    assert list(skipped["first"]) == [2] and skipped["pair"] == items["pair"]


QUESTIONS = {q: Question("", "", p) for q, p in {1: (), 2: (), 3: (1,), 4: (1, 2), 5: (3,)}.items()}


@pytest.mark.parametrize(
    ("no", "left"),
    [
        ([], [1, 2, 3, 4, 5]),
        ([5], [1, 2, 3, 4]),
        ([3], [1, 2, 4]),  # 5 falls with 3
        ([2], [1, 3, 5]),  # 4 has two parents
        ([1], [2]),  # 5 falls with 3, which falls with 1
        ([1, 2, 3, 4, 5], []),
    ],
)
def test_children_fall_with_their_parents(no: list[int], left: list[int]) -> None:
    scores = {q: float(q not in no) for q in QUESTIONS}
    assert [q for q, s in fall(QUESTIONS, scores).items() if s] == left
    assert scores == {q: float(q not in no) for q in QUESTIONS}


def test_a_fall_passes_on_in_the_files_order_alone() -> None:
    late = {2: Question("", "", (1,)), 1: Question("", "", (3,)), 3: Question("", "", ())}
    assert fall(late, {1: 1, 2: 1, 3: 0}) == {1: 0, 2: 1, 3: 0}  # 2 was looked at before 1 fell


def test_scores_are_means_of_questions_images_and_prompts(bench: tuple[Path, Path], tmp_path: Path) -> None:
    vqa = Said({("pair.png", 0): {1: "no"}, ("pair.png", 3): {3: "a dog", 4: "Yes"}, ("alone.png", 2): {1: "no"}})
    result = score_dpg(bench[0], tmp_path / "out", bench[1], vqa, name="mine", steps=2)
    pair, alone = (0.2 + 1 + 1 + 0.4) / 4, 3 / 4
    assert result.overall == pytest.approx(100 * (pair + alone) / 2)
    assert result.images == 8 and result.label == "DPG-Bench (test)"
    # four crops of each grid, in reading order
    assert [a for a in vqa.asked if a[0] == "pair.png"] == [("pair.png", i, (8, 8), i) for i in range(4)]
    # of the last crop, before anything fell: 3 and 4 are no "yes", 5 is
    assert result.tables["category, level 2"] == pytest.approx(
        {
            "attribute - color": 0,
            "attribute - texture": 100,
            "entity - whole": 100,
            "global -": 100,
            "relation - spatial": 0,
        }
    )
    assert result.tables["category, level 1"] == pytest.approx(
        {"attribute": 50, "entity": 100, "global": 100, "relation": 0}
    )
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| EMF, paper | 8 | 81.94 |" in page and f"**mine**, DPG-Bench (test) | 2 | **{result.overall:.2f}**" in page


def test_category_tables_of_all_images_after_the_fall(bench: tuple[Path, Path], tmp_path: Path) -> None:
    no = {("pair.png", 0): {1: "no"}}
    official = score_dpg(bench[0], tmp_path / "out", bench[1], Said(no))
    assert set(official.tables["category, level 2"].values()) == {100.0}
    vqa = Said(no)
    ours = score_dpg(bench[0], tmp_path / "out", bench[1], vqa, Quirks(last_crop_categories=False))
    assert not vqa.asked  # the answers are kept: only the tables are made anew
    assert ours.overall == official.overall
    assert ours.tables["category, level 2"] == pytest.approx(
        {
            "attribute - color": 75,
            "attribute - texture": 75,
            "entity - whole": 100 * 7 / 8,
            "global -": 100,
            "relation - spatial": 75,
        }
    )
    assert any("all four images" in text for text in ours.deviations)
    assert not any("all four images" in text for text in official.deviations)


def test_the_first_row_is_skipped_or_not(bench: tuple[Path, Path], tmp_path: Path) -> None:
    no = {("first.png", i): {1: "no"} for i in range(4)}
    official = score_dpg(bench[0], tmp_path / "official", bench[1], Said(no))
    assert official.overall == 100 and official.images == 8  # the item is dropped with its first question
    assert any("first.png left out" in text for text in official.deviations)
    whole = score_dpg(bench[0], tmp_path / "whole", bench[1], Said(no), Quirks(skip_first_row=False))
    assert whole.overall == pytest.approx(200 / 3) and whole.images == 12
    assert any("first question is asked too" in text for text in whole.deviations)


def test_an_item_without_its_first_question_stays_where_nothing_depends_on_it(
    bench: tuple[Path, Path], tmp_path: Path
) -> None:
    file = write_csv(tmp_path / "free.csv", [("first", 1, "0", "a - b (c)"), ("first", 2, "0", "a - d (e)"), *ROWS[2:]])
    result = score_dpg(bench[0], tmp_path / "out", file, Said({("first.png", 0): {1: "no"}}))
    assert result.images == 12 and result.overall == 100
    assert "a - b" not in result.tables["category, level 2"]


@pytest.mark.parametrize(("no", "left_out"), [({}, True), ({2: "no"}, False), ({3: "no"}, True)])
@pytest.mark.parametrize("crops", [(0, 1, 2, 3), (0, 1, 2)])
def test_an_item_is_dropped_where_its_missing_question_is_reached(
    no: dict[int, str], left_out: bool, crops: tuple[int, ...], bench: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its question 3 falls with 2, and only where 2 holds does the official script look at 1, which it has not read."""
    first = [(1, "0", "a - b (c)"), (2, "0", "a - d (e)"), (3, "2,1", "a - f (g)")]
    file = write_csv(tmp_path / "reached.csv", [*(("first", *row) for row in first), *ROWS[2:]])
    result = score_dpg(bench[0], tmp_path / "out", file, Said({("first.png", i): no for i in crops}))
    dropped = left_out or crops == (0, 1, 2)  # one of the four images is enough
    assert any("first.png left out" in text for text in result.deviations) == dropped
    assert result.images == (8 if dropped else 12)
    assert result.overall == pytest.approx(100 if dropped else 200 / 3)  # 2 is no, and 3 falls with it
    assert ("a - f" in result.tables["category, level 2"]) != dropped


def test_of_an_item_in_pieces_the_last_counts(bench: tuple[Path, Path], tmp_path: Path) -> None:
    """As the official script reads it, which begins an item anew where its rows go on after another's."""
    rows = [*ROWS[:4], ("alone", 1, "0", "global - (style, ink)"), ("pair", 1, "0", "entity - part (tail)"), ROWS[-1]]
    file = write_csv(tmp_path / "pieces.csv", rows)
    assert {item: list(asked) for item, asked in read_questions(file).items()} == {
        "first": [2],
        "pair": [1],
        "alone": [1],
    }
    assert read_questions(file)["pair"][1].category == "entity - part"
    every = read_questions(file, skip_first_row=False)
    assert {item: list(asked) for item, asked in every.items()} == {"first": [1, 2], "pair": [1, 2], "alone": [1]}
    result = score_dpg(bench[0], tmp_path / "out", file, Said({("pair.png", i): {2: "no"} for i in range(4)}))
    assert result.overall == 100


def test_nothing_that_is_scored_is_one_line(bench: tuple[Path, Path], tmp_path: Path) -> None:
    """Where the item falls out before it is asked, and after."""
    for name in ("pair.png", "alone.png"):
        (bench[0] / name).unlink()
    for parents in ("1", "2,1"):
        rows = [(1, "0", "a - b (c)"), (2, "0", "a - d (e)"), (3, parents, "a - f (g)")]
        file = write_csv(tmp_path / "one.csv", [("first", *row) for row in rows])
        with pytest.raises(ValueError, match="first.png is all there is, and left out, as officially, since"):
            score_dpg(bench[0], tmp_path / "out", file, Said())


def test_a_killed_run_goes_on(bench: tuple[Path, Path], tmp_path: Path) -> None:
    whole = score_dpg(bench[0], tmp_path / "whole", bench[1], Said())
    pair = bench[0] / "pair.png"
    pair.rename(tmp_path / "pair.png")
    score_dpg(bench[0], tmp_path / "out", bench[1], Said())
    (tmp_path / "pair.png").rename(pair)
    vqa = Said()
    assert score_dpg(bench[0], tmp_path / "out", bench[1], vqa) == whole
    assert {a[0] for a in vqa.asked} == {"pair.png"}


def test_recorded_answers(bench: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [{"filename": f"{n}.png", "crop": i, "answers": YES} for n in ("pair", "alone") for i in range(4)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = run_dpg(bench[0], tmp_path / "out", bench[1], answers=file)
    assert result.overall == 100 and result.label == "DPG-Bench (recorded answers)"
    rows[2]["answers"] = {1: "yes"}
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match=r"no answer to proposition 2 of pair.png, crop 2"):
        run_dpg(bench[0], tmp_path / "other", bench[1], answers=file)
    for answer, says in ((None, "no answer to proposition 2 of pair.png"), (True, r"answers.jsonl:3 has .* true; ")):
        rows[2]["answers"] = YES | {2: answer}  # null is absent, and not the answer "None"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(ValueError, match=says):
            run_dpg(bench[0], tmp_path / str(answer), bench[1], answers=file)
    file.write_text('{"filename": "pair.png"}\n')
    with pytest.raises(ValueError, match="answers.jsonl:1 lacks 'crop'"):
        run_dpg(bench[0], tmp_path / "other", bench[1], answers=file)


def test_what_does_not_fit_is_named(bench: tuple[Path, Path], tmp_path: Path) -> None:
    root, file = bench
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="absent.csv does not exist; put DPG-Bench's dpg_bench.csv"):
        score_dpg(root, out, tmp_path / "absent.csv", Said())
    (tmp_path / "few.csv").write_text("item_id,text\n")
    with pytest.raises(ValueError, match="lacks the column dependency"):
        score_dpg(root, out, tmp_path / "few.csv", Said())
    with pytest.raises(ValueError, match=r"word.csv:5 has no whole number"):
        score_dpg(root, out, write_csv(tmp_path / "word.csv", [*ROWS[:3], ("pair", 2, "none", "a (b)")]), Said())
    orphans = write_csv(tmp_path / "orphans.csv", [*ROWS, ("alone", 3, "9", "a (b)")])
    with pytest.raises(ValueError, match="item alone depends on a proposition that it does not have"):
        score_dpg(root, out, orphans, Said(), Quirks(skip_first_row=False))
    with pytest.raises(ValueError, match="holds no images; expected <item id>.png"):
        score_dpg(tmp_path / "absent", out, file, Said())
    Image.new("RGB", (4, 4)).save(root / "stranger.png")
    with pytest.raises(ValueError, match=r"stranger.png is of no item in dpg_bench.csv"):
        score_dpg(root, out, file, Said())
    assert not out.exists()


@pytest.mark.parametrize(("size", "resolution"), [((16, 8), None), ((17, 17), None), ((16, 16), 16), ((1, 1), None)])
def test_what_is_no_grid_is_named(size: tuple[int, int], resolution: int | None) -> None:
    with pytest.raises(ValueError, match=f"a.png is {size[0]} x {size[1]}; expected a grid of 2 x 2"):
        crops(Image.new("RGB", size), Path("a.png"), resolution)


# The whole path on a tiny network of the real class


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BlipConfig, BlipForQuestionAnswering

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("blip")
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    tokens = dict(vocab_size=64, bos_token_id=5, eos_token_id=2, sep_token_id=3, pad_token_id=0)
    text = tower | tokens | dict(encoder_hidden_size=16, max_position_embeddings=64)
    config = BlipConfig(text_config=text, vision_config=tower | dict(image_size=16, patch_size=8), projection_dim=8)
    BlipForQuestionAnswering(config).save_pretrained(path)
    bert_tokenizer().save_pretrained(path)
    return path


def test_the_whole_path(weights: Path, bench: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_dpg(bench[0], tmp_path / "out", bench[1], vqa=str(weights))
    assert result.label == "DPG-Bench (BLIP-VQA; not comparable to mPLUG)"
    assert any("not comparable" in text for text in result.deviations)
    rows = read_rows(tmp_path / "out" / "scored.jsonl")
    assert [len(r["answers"]) for r in rows] == [4, 4]
    assert all(isinstance(a, str) and a for r in rows for four in r["answers"] for a in four.values())
    assert 0 <= result.overall <= 100


def test_a_batch_is_never_padded(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' BLIP lets its decoder see a question's padding."""
    vqa = BlipVQA.load(str(weights))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    questions = {3: "is the dog there ?", 1: "is the red barn there ?", 2: "is the cat there ?", 9: "sky ?"}
    generate, seen = vqa.model.generate, []
    monkeypatch.setattr(vqa.model, "generate", lambda **kw: seen.append(kw["input_ids"]) or generate(**kw))
    answers = vqa.answers("", 0, image, questions)
    assert list(answers) == list(questions)  # in their own order
    assert sorted(tuple(x.shape) for x in seen) == [(1, 4), (1, 8), (2, 7)] and all((x != 0).all() for x in seen)
    vqa.batch = 1
    assert vqa.answers("", 0, image, questions) == answers


def test_a_network_that_says_yes_scores_all(weights: Path, bench: tuple[Path, Path], tmp_path: Path) -> None:
    vqa = BlipVQA.load(str(weights))
    yes, end = vqa.tokenizer.convert_tokens_to_ids("yes"), vqa.model.config.text_config.sep_token_id
    vqa.model.generate = lambda input_ids, **_: torch.tensor([[5, yes, end]] * len(input_ids))
    assert score_dpg(bench[0], tmp_path / "out", bench[1], vqa).overall == 100


def test_a_network_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DPG-Bench's VQA network: .*absent cannot be loaded .* put config.json"):
        BlipVQA.load(str(tmp_path / "absent"))
