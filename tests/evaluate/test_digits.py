"""The digits world and its scorer: what a caption says is drawn, and only what is drawn is found."""

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from emf.data.digits import (
    BACKGROUND,
    CLASSES,
    COLORS,
    MAX_TOKENS,
    PLURALS,
    RELATIONS,
    TAGS,
    VOCAB,
    WORDS,
    World,
    arrange,
    make_batch,
    prompts,
    render,
    sample_spec,
    scans,
)
from emf.evaluate.digits_scorer import Scorer, calibrate
from emf.evaluate.rules import Detection, evaluate, relations

GREY = BACKGROUND / 127.5 - 1


def scenes(specs, seed=0, split="held_out", world=None):
    rng = np.random.default_rng(seed)
    return np.stack([render(spec, rng, split, world) for spec in specs])


@pytest.fixture(scope="module")
def scorer():
    return Scorer.fit()


@pytest.fixture(scope="module")
def specs():
    return prompts(30, seed=2)


# The world


def test_no_scan_is_in_both_splits():
    train, held_out = ({scan.tobytes() for pool in scans(split) for scan in pool} for split in ("train", "held_out"))
    assert not train & held_out
    counts = [[len(pool) for pool in scans(split)] for split in ("train", "held_out")]
    assert sum(map(sum, counts)) == 1797
    assert all(0.19 < h / (t + h) < 0.21 for t, h in zip(*counts, strict=True))


def test_a_batch_depends_on_its_arguments_alone():
    x, captions = make_batch(5, 16)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    y, again = make_batch(5, 16)
    assert torch.equal(x, y) and captions == again
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)
    assert captions != make_batch(6, 16)[1]
    assert not torch.equal(x, make_batch(5, 16, "held_out")[0])


def test_images_have_the_promised_range_and_type():
    x, captions = make_batch(0, 64)
    world = World()
    assert x.shape == (64, 3, world.size, world.size) and x.dtype == torch.float32 and len(captions) == 64
    assert x.min() >= -1 and x.max() <= 1 and x.min() < -0.9 and x.max() > 0.9


@pytest.mark.parametrize("tag", TAGS)
def test_metadata_is_in_genevals_schema_and_the_caption_says_the_same(tag):
    rng = np.random.default_rng(TAGS.index(tag))
    for _ in range(200):
        spec = sample_spec(rng, tag)
        assert json.loads(json.dumps(spec)) == spec
        assert spec["tag"] == tag and set(spec) <= {"tag", "include", "exclude", "prompt"}
        assert parse(spec["prompt"]) == [
            {k: e[k] for k in ("class", "count", "color", "position") if k in e} for e in spec["include"]
        ]
        assert all(e["class"] in CLASSES and e.get("color", "red") in COLORS for e in spec["include"])
        counting = tag == "counting"
        assert ("exclude" in spec) == counting
        if counting:
            (entry,) = spec["include"]
            assert 2 <= entry["count"] <= 4
            assert spec["exclude"] == [{"class": entry["class"], "count": entry["count"] + 1}]
        assert len({e["class"] for e in spec["include"]}) == len(spec["include"])
        if tag == "color_attr":
            assert len({e["color"] for e in spec["include"]}) == 2


def parse(prompt):
    """A caption back into GenEval's include list, written apart from the code that makes captions."""
    words = prompt.split()
    if words[0] in ("two", "three", "four"):
        entry = {"class": CLASSES[PLURALS.index(words[-1])], "count": ("two", "three", "four").index(words[0]) + 2}
        return [entry | ({"color": words[1]} if len(words) == 3 else {})]
    phrases = {f" {phrase} ": relation for relation, phrase in RELATIONS.items()} | {" and ": None}
    for phrase, relation in phrases.items():
        if phrase in prompt:
            a, b = (single(part) for part in prompt.split(phrase))
            return [b, a | {"position": [relation, 0]}] if relation else [a, b]
    return [single(prompt)]


def single(phrase):
    article, *color, digit = phrase.split()
    first = (color or [digit])[0]
    assert article == ("an" if first in ("orange", "eight") else "a")
    return {"class": digit, "count": 1} | ({"color": color[0]} if color else {})


def test_a_position_caption_is_drawn_as_it_reads():
    rng = np.random.default_rng(0)
    for _ in range(200):
        spec = sample_spec(rng, "position")
        (target, _, target_row, target_column), (placed, _, row, column) = arrange(spec, rng)
        assert [CLASSES[target], CLASSES[placed]] == [e["class"] for e in spec["include"]]
        step = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
        assert (row - target_row, column - target_column) == step[spec["include"][1]["position"][0]]


def test_counted_objects_share_a_mentioned_colour():
    rng = np.random.default_rng(0)
    named = [s for s in (sample_spec(rng, "counting") for _ in range(100)) if "color" in s["include"][0]]
    assert 30 < len(named) < 70
    assert all({c for _, c, *_ in arrange(s, rng)} == {s["include"][0]["color"]} for s in named)


def test_the_vocabulary_covers_every_caption():
    rng = np.random.default_rng(0)
    captions = [sample_spec(rng)["prompt"] for _ in range(5000)]
    ids, mask = WORDS.encode(captions)
    assert ids.shape == mask.shape == (5000, MAX_TOKENS) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert max(len(c.split()) for c in captions) == MAX_TOKENS
    assert (ids[~mask] == 0).all() and (ids[mask] > 0).all()
    assert [" ".join(VOCAB[i] for i in row[row > 0]) for row in ids] == captions
    assert set(ids.unique().tolist()) == set(range(len(VOCAB)))  # and has no word too many


@pytest.mark.parametrize(
    ("caption", "says"), [("a red eleven", "'eleven'"), ("", "0 words"), ("a " * (MAX_TOKENS + 1), "words")]
)
def test_a_caption_that_cannot_be_read_is_named(caption, says):
    with pytest.raises(ValueError, match=says):
        WORDS.encode(["a seven", caption])


def test_unknown_tags_and_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match="'colour'"):
        sample_spec(np.random.default_rng(0), "colour")
    with pytest.raises(ValueError, match="size here at least 19"):
        World(size=18, pitch=10, shift=1)
    with pytest.raises(ValueError, match="jitter 2"):
        World(pitch=9, jitter=2)


def test_the_evaluation_set_is_balanced_and_fixed():
    chosen = prompts(40, seed=1)
    assert [s["tag"] for s in chosen] == [tag for tag in TAGS for _ in range(40)]
    assert chosen == prompts(40, seed=1) != prompts(40, seed=2)
    for tag in TAGS:
        # there are only ten digits to ask for alone
        assert len({s["prompt"] for s in chosen if s["tag"] == tag}) == (10 if tag == "single_object" else 40)


@pytest.mark.parametrize("world", [World(), World(size=20, pitch=10, shift=1, jitter=1)])
def test_glyphs_never_touch(world):
    four = {"tag": "counting", "include": [{"class": "eight", "count": 4, "color": "black"}]}
    for image in scenes([four] * 50, world=world):
        assert ndimage.label((np.abs(image - GREY) > 1e-6).any(0), np.ones((3, 3)))[1] == 4


# GenEval's rules


def seen(label, box=(0, 0, 8, 8), color=None, score=1.0):
    return Detection(label, score, box, color)


def wants(*include, **more):
    return {"include": list(include), **more}


@pytest.mark.parametrize(("n", "holds"), [(0, False), (1, False), (2, True), (3, False), (4, False)])
def test_counting_wants_the_exact_number(n, holds):
    spec = wants({"class": "six", "count": 2}, exclude=[{"class": "six", "count": 3}])
    correct, reason = evaluate(spec, [seen("six")] * n + [seen("one")])
    assert correct == holds and bool(reason) != holds


def test_surplus_is_caught_by_exclude_alone():
    assert evaluate(wants({"class": "six", "count": 2}), [seen("six")] * 3) == (True, "")
    assert evaluate(wants({"class": "six", "count": 1}), [seen("six"), seen("two")]) == (True, "")


def test_colour_is_asked_of_the_highest_scored_only():
    red = {"class": "six", "count": 1, "color": "red"}
    low, high = seen("six", color="red", score=0.4), seen("six", color="blue", score=0.9)
    assert evaluate(wants(red), [low])[0]
    assert not evaluate(wants(red), [low, high])[0]
    assert not evaluate(wants(red | {"count": 2}), [low, high])[0]
    assert evaluate(wants(red | {"count": 2}), [low, seen("six", color="red")])[0]
    assert not evaluate(wants(red), [seen("six")])[0]  # no colour was seen


def test_position_is_asked_against_the_target():
    spec = wants({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    dog, cat = seen("dog", (20, 0, 28, 8)), seen("cat", (0, 0, 8, 8))
    assert evaluate(spec, [dog, cat]) == (True, "")
    assert evaluate(spec, [seen("dog", cat.box), seen("cat", dog.box)]) == (False, "expected cat left of target")
    assert evaluate(spec, [cat]) == (False, "expected dog>=1, found 0; no target for cat to be left of")


def test_a_target_of_the_wrong_colour_is_none():
    spec = wants({"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    correct, reason = evaluate(spec, [seen("dog", (20, 0, 28, 8), "blue"), seen("cat")])
    assert not correct and "red dog" in reason and "no target" in reason


def test_every_pair_must_stand_in_the_relation():
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
def test_relations_around_the_threshold(dx, dy, expected):
    assert relations(seen("a", (50 + dx, 50 + dy, 60 + dx, 60 + dy)), seen("b", (50, 50, 60, 60))) == expected


def test_the_threshold_is_a_setting():
    spec = wants({"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]})
    near = [seen("dog", (0, 0, 10, 10)), seen("cat", (3, 0, 13, 10))]
    assert not evaluate(spec, near)[0]
    assert evaluate(spec, near, threshold=0.05)[0]


# The detector


def test_the_scorer_can_be_trusted(scorer):
    trust = calibrate(scorer, per_tag=60, seed=1)
    assert trust["ceiling"] >= 0.95 and trust["noise"] <= 0.05 and trust["shuffled"] <= 0.05


def test_detections_say_what_was_drawn(scorer):
    spec = wants({"class": "zero", "count": 1, "color": "red"}, {"class": "four", "count": 1, "color": "white"})
    for image in scenes([spec] * 5):
        (found,) = scorer.detect(image[None])
        assert {(d.label, d.color) for d in found} == {("zero", "red"), ("four", "white")}
        ys, xs = np.nonzero((np.abs(image - GREY) > 0.5).any(0))
        x0, y0, x1, y1 = (f(d.box[i] for d in found) for i, f in enumerate((min, min, max, max)))
        assert abs(x0 - xs.min()) <= 1 and abs(x1 - xs.max() - 1) <= 1
        assert abs(y0 - ys.min()) <= 1 and abs(y1 - ys.max() - 1) <= 1


def test_colours_are_told_apart(scorer):
    specs = [wants({"class": "zero", "count": 1, "color": color}) for color in COLORS for _ in range(4)]
    found = scorer.detect(scenes(specs))
    assert all(d.color == s["include"][0]["color"] for s, here in zip(specs, found, strict=True) for d in here)
    assert sum(map(len, found)) >= 0.9 * len(specs)


def test_ghosts_do_not_count(scorer, specs):
    faded = GREY + 0.25 * (scenes(specs) - GREY)
    blended = np.mean([scenes(specs, seed) for seed in range(16)], 0, np.float32)
    assert scorer.score(faded, specs)["overall"] <= 0.02
    assert scorer.score(blended, specs)["overall"] <= 0.1


def test_small_flaws_are_forgiven(scorer, specs):
    real = scenes(specs)
    flawed = real + np.random.default_rng(0).normal(0, 0.1, real.shape).astype(np.float32)
    assert scorer.score(flawed, specs)["overall"] >= 0.85


def test_scores_are_means_of_tags(scorer, specs):
    result = scorer.score(scenes(specs)[:75], specs[:75])  # 30, 30 and 15 of three tags
    assert list(result["by_tag"]) == list(TAGS[:3])
    assert result["overall"] == pytest.approx(np.mean(list(result["by_tag"].values())))
    rows = result["images"]
    assert len(rows) == 75 and all(bool(r["reason"]) != r["correct"] for r in rows)
    assert json.loads(rows[0]["metadata"]) == specs[0]
    assert result["by_tag"]["single_object"] == pytest.approx(np.mean([r["correct"] for r in rows[:30]]))
    assert all(len(box) == 5 for r in rows for boxes in json.loads(r["details"]).values() for box in boxes)


def test_broken_images_score_nothing(scorer, specs):
    for value in (np.nan, np.inf, -1, 1, GREY):
        assert scorer.score(np.full((len(specs), 3, 18, 18), value, np.float32), specs)["overall"] == 0


def test_wrong_shapes_are_refused(scorer, specs):
    with pytest.raises(ValueError, match="expected \\[n, 3, height, width\\]"):
        scorer.score(np.zeros((1, 18, 18, 3), np.float32), specs[:1])
    with pytest.raises(ValueError, match="2 images for 1 descriptions"):
        scorer.score(np.zeros((2, 3, 18, 18), np.float32), specs[:1])
