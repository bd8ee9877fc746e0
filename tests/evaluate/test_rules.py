"""GenEval's rules on hand-made detections."""

from __future__ import annotations

from typing import Any

import pytest
from geneval_cases import CASES, TWO_RED, at, one

from emf.data.digits import TAGS
from emf.evaluate.detector import CLASSES
from emf.evaluate.rules import check_metadata, evaluate, select


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
