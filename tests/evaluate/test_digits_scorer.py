"""The digits' scorer finds what is drawn, and only that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scenes import GREY, scenes

from emf.data.digits import COLORS, TAGS, Spec, prompts
from emf.evaluate.digits_scorer import Scorer, calibrate


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.fit()


@pytest.fixture(scope="module")
def specs() -> list[Spec]:
    return prompts(30, seed=2)


def test_the_scorer_can_be_trusted(scorer: Scorer) -> None:
    trust = calibrate(scorer, per_tag=60, seed=1)
    assert trust["ceiling"] >= 0.95 and trust["noise"] <= 0.05 and trust["shuffled"] <= 0.05


def test_detections_say_what_was_drawn(scorer: Scorer) -> None:
    spec = {"include": [{"class": "zero", "count": 1, "color": "red"}, {"class": "four", "count": 1, "color": "white"}]}
    for image in scenes([spec] * 5):
        (found,) = scorer.detect(image[None])
        assert {(d.label, d.color) for d in found} == {("zero", "red"), ("four", "white")}
        ys, xs = np.nonzero((np.abs(image - GREY) > 0.5).any(0))
        x0, y0, x1, y1 = (f(d.box[i] for d in found) for i, f in enumerate((min, min, max, max)))
        assert abs(x0 - xs.min()) <= 1 and abs(x1 - xs.max() - 1) <= 1
        assert abs(y0 - ys.min()) <= 1 and abs(y1 - ys.max() - 1) <= 1


def test_colours_are_told_apart(scorer: Scorer) -> None:
    specs = [{"include": [{"class": "zero", "count": 1, "color": color}]} for color in COLORS for _ in range(4)]
    found = scorer.detect(scenes(specs))
    assert all(d.color == s["include"][0]["color"] for s, here in zip(specs, found, strict=True) for d in here)
    assert sum(map(len, found)) >= 0.9 * len(specs)


def test_ghosts_do_not_count(scorer: Scorer, specs: list[Spec]) -> None:
    faded = GREY + 0.25 * (scenes(specs) - GREY)
    blended = np.mean([scenes(specs, seed) for seed in range(16)], 0, np.float32)
    assert scorer.score(faded, specs)["overall"] <= 0.02
    assert scorer.score(blended, specs)["overall"] <= 0.1


def test_small_flaws_are_forgiven(scorer: Scorer, specs: list[Spec]) -> None:
    real = scenes(specs)
    flawed = real + np.random.default_rng(0).normal(0, 0.1, real.shape).astype(np.float32)
    assert scorer.score(flawed, specs)["overall"] >= 0.85


def test_scores_are_means_of_tags(scorer: Scorer, specs: list[Spec]) -> None:
    result = scorer.score(scenes(specs)[:75], specs[:75])  # 30, 30 and 15 of three tags
    assert list(result["by_tag"]) == list(TAGS[:3])
    assert result["overall"] == pytest.approx(np.mean(list(result["by_tag"].values())))
    rows = result["images"]
    assert len(rows) == 75 and all(bool(r["reason"]) != r["correct"] for r in rows)
    assert json.loads(rows[0]["metadata"]) == specs[0]
    assert result["by_tag"]["single_object"] == pytest.approx(np.mean([r["correct"] for r in rows[:30]]))
    assert all(len(box) == 5 for r in rows for boxes in json.loads(r["details"]).values() for box in boxes)


def test_broken_images_score_nothing(scorer: Scorer, specs: list[Spec]) -> None:
    for value in (np.nan, np.inf, -1, 1, GREY):
        assert scorer.score(np.full((len(specs), 3, 18, 18), value, np.float32), specs)["overall"] == 0


def test_wrong_shapes_are_refused(scorer: Scorer, specs: list[Spec]) -> None:
    with pytest.raises(ValueError, match="expected \\[n, 3, height, width\\]"):
        scorer.score(np.zeros((1, 18, 18, 3), np.float32), specs[:1])
    with pytest.raises(ValueError, match="2 images for 1 descriptions"):
        scorer.score(np.zeros((2, 3, 18, 18), np.float32), specs[:1])
