"""GenEval's rules on hand-made detections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from geneval_cases import CASES, TWO_RED, at, one

from emf.data.digits import TAGS
from emf.evaluate.detector import CLASSES
from emf.evaluate.rules import Detection, check_metadata, evaluate, relations, select


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


def test_of_equal_scores_the_later_counts() -> None:
    """The official order is numpy's argsort of float32 scores, reversed."""
    spec = dict(include=[one("dog", color="red")])
    blue, red = at("dog", 0.5, color="blue"), at("dog", 0.5, color="red")
    assert evaluate(spec, select([blue, red], "colors"))[0]
    assert not evaluate(spec, select([red, blue], "colors"))[0]
    near = at("dog", 0.5 + 1e-9, color="blue")  # the same in float32
    assert evaluate(spec, select([near, red], "colors"))[0] and evaluate(spec, select([near, red, at("cat")], "x"))[0]
    many = [at("dog", 0.95, x=i) for i in range(18)]  # of equal ones the last sixteen are kept
    assert [d.box[0] for d in select(many, "counting")] == list(range(17, 1, -1))


@pytest.mark.parametrize(("tag", "least"), [("colors", 0.3), ("counting", 0.9)])
def test_a_score_at_the_threshold_in_float32_does_not_count(tag: str, least: float) -> None:
    single = np.float32(least)
    above = float(np.nextafter(single, np.float32(1)))
    scores = [least, float(single), above]
    assert [d.score for d in select([at("dog", s) for s in scores], tag)] == [above]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ([], "prompt is missing"),
        ({"tag": "position", "include": []}, "prompt is missing"),
        ({"prompt": "", "include": []}, "tag or include"),
        ({"prompt": "", "tag": "position", "include": [one("seven")]}, r"include\[0\] is none"),
        ({"prompt": "", "tag": "position", "include": [one("dog", 0)]}, "no positive number"),
        ({"prompt": "", "tag": "position", "include": [], "exclude": [one("seven")]}, r"exclude\[0\]"),
        ({"prompt": "", "tag": "position", "include": [], "exclude": 5}, "exclude is no list"),
        ({"prompt": "", "tag": "colors", "include": [one("dog", color=["red"])]}, r"color of include\[0\] is no text"),
        ({"prompt": "", "tag": "position", "include": [one("dog", position=["on", 0])]}, "no relation"),
        ({"prompt": "", "tag": "position", "include": [one("dog", position=["above", 0])]}, "earlier entry"),
    ],
)
def test_metadata_that_cannot_hold_is_named(metadata: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{says}"):
        check_metadata(metadata, CLASSES, "here")


@pytest.mark.parametrize("key", ["color", "position"])
def test_a_key_of_null_is_as_if_it_were_not_there(key: str) -> None:
    """As metadata come back that went through Hugging Face datasets."""
    spec = {"tag": "colors", "prompt": "a dog", "include": [one("dog", **{key: None})], "exclude": None}
    check_metadata(spec, CLASSES, "here")
    assert evaluate(spec, [at("dog")]) == (True, "")


@pytest.mark.parametrize("position", [3, "above", ["above"], [0, 0, 0], ["above", None]])
def test_a_position_of_another_form_is_named(position: Any) -> None:
    spec = {"tag": "position", "prompt": "", "include": [one("dog"), one("cat", position=position)]}
    with pytest.raises(ValueError, match=r"^here: the position of include\[1\] names no relation"):
        check_metadata(spec, CLASSES, "here")


def seen(
    label: str, box: tuple[float, float, float, float] = (0, 0, 8, 8), color: str | None = None, score: float = 1.0
) -> Detection:
    return Detection(label, score, box, color)


def wants(*include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"include": list(include), **more}


@pytest.mark.parametrize(("n", "holds"), [(0, False), (1, False), (2, True), (3, False), (4, False)])
def test_counting_wants_the_exact_number(n: int, holds: bool) -> None:
    spec = wants({"class": "six", "count": 2}, exclude=[{"class": "six", "count": 3}])
    correct, reason = evaluate(spec, [seen("six")] * n + [seen("one")])
    assert correct == holds and bool(reason) != holds


def test_surplus_is_caught_by_exclude_alone() -> None:
    assert evaluate(wants({"class": "six", "count": 2}), [seen("six")] * 3) == (True, "")
    assert evaluate(wants({"class": "six", "count": 1}), [seen("six"), seen("two")]) == (True, "")


def test_colour_is_asked_of_the_highest_scored_only() -> None:
    red = {"class": "six", "count": 1, "color": "red"}
    low, high = seen("six", color="red", score=0.4), seen("six", color="blue", score=0.9)
    assert evaluate(wants(red), [low])[0]
    assert not evaluate(wants(red), [low, high])[0]
    assert not evaluate(wants(red | {"count": 2}), [low, high])[0]
    assert evaluate(wants(red | {"count": 2}), [low, seen("six", color="red")])[0]
    assert not evaluate(wants(red), [seen("six")])[0]  # no colour was seen


def test_position_is_asked_against_the_target() -> None:
    spec = wants({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    dog, cat = seen("dog", (20, 0, 28, 8)), seen("cat", (0, 0, 8, 8))
    assert evaluate(spec, [dog, cat]) == (True, "")
    assert evaluate(spec, [seen("dog", cat.box), seen("cat", dog.box)]) == (False, "expected cat left of target")
    assert evaluate(spec, [cat]) == (False, "expected dog>=1, found 0; no target for cat to be left of")


def test_a_target_of_the_wrong_colour_is_none() -> None:
    spec = wants({"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    correct, reason = evaluate(spec, [seen("dog", (20, 0, 28, 8), "blue"), seen("cat")])
    assert not correct and "red dog" in reason and "no target" in reason


def test_every_pair_must_stand_in_the_relation() -> None:
    spec = wants({"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    cat, far, behind = seen("cat", (20, 0, 28, 8)), seen("dog", (40, 0, 48, 8)), seen("dog", (0, 0, 8, 8))
    assert evaluate(spec, [cat, far, far])[0]
    assert not evaluate(spec, [cat, far, behind])[0]


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-20, 0, {"left of"}),
        (20, 0, {"right of"}),
        (0, -20, {"above"}),
        (0, 20, {"below"}),
        (20, 20, {"right of", "below"}),
        (2.0, 0, set()),  # the sizes add up to 20: offsets up to 2 are none
        (3.9, 0, set()),  # 1.9 / 3.9 < 1/2
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 > 1/2
        (0, -4.1, {"above"}),
        (20, 11, {"right of"}),  # 9 / |(20, 11)| < 1/2
        (0, 0, set()),
    ],
)
def test_relations_around_the_threshold(dx: float, dy: float, expected: set[str]) -> None:
    assert relations(seen("a", (50 + dx, 50 + dy, 60 + dx, 60 + dy)), seen("b", (50, 50, 60, 60))) == expected


def test_the_threshold_is_a_setting() -> None:
    spec = wants({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]})
    near = [seen("dog", (0, 0, 10, 10)), seen("cat", (3, 0, 13, 10))]
    assert not evaluate(spec, near)[0]
    assert evaluate(spec, near, threshold=0.05)[0]
