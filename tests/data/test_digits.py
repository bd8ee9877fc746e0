"""The digits' world: what a caption says is drawn, from scans that training and evaluation do not share."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scenes import GREY, scenes
from scipy import ndimage

from emf.data.digits import (
    CLASSES,
    COLORS,
    MAX_TOKENS,
    PLURALS,
    RELATIONS,
    TAGS,
    VOCAB,
    WORDS,
    Spec,
    arrange,
    make_batch,
    prompts,
    sample_spec,
    scans,
)
from emf.data.world import World


def test_no_scan_is_in_both_splits() -> None:
    train, held_out = ({scan.tobytes() for pool in scans(split) for scan in pool} for split in ("train", "held_out"))
    assert not train & held_out
    counts = [[len(pool) for pool in scans(split)] for split in ("train", "held_out")]
    assert sum(map(sum, counts)) == 1797
    assert all(0.19 < h / (t + h) < 0.21 for t, h in zip(*counts, strict=True))


def test_a_batch_depends_on_its_arguments_alone() -> None:
    x, captions = make_batch(5, 16)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    y, again = make_batch(5, 16)
    assert torch.equal(x, y) and captions == again
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)
    assert captions != make_batch(6, 16)[1]
    assert not torch.equal(x, make_batch(5, 16, "held_out")[0])


def test_images_have_the_promised_range_and_type() -> None:
    x, captions = make_batch(0, 64)
    world = World()
    assert x.shape == (64, 3, world.size, world.size) and x.dtype == torch.float32 and len(captions) == 64
    assert x.min() >= -1 and x.max() <= 1 and x.min() < -0.9 and x.max() > 0.9


@pytest.mark.parametrize("tag", TAGS)
def test_metadata_is_in_genevals_schema_and_the_caption_says_the_same(tag: str) -> None:
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


def parse(prompt: str) -> list[Spec]:
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


def single(phrase: str) -> Spec:
    article, *color, digit = phrase.split()
    first = (color or [digit])[0]
    assert article == ("an" if first in ("orange", "eight") else "a")
    return {"class": digit, "count": 1} | ({"color": color[0]} if color else {})


def test_a_position_caption_is_drawn_as_it_reads() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        spec = sample_spec(rng, "position")
        (target, _, target_row, target_column), (placed, _, row, column) = arrange(spec, rng)
        assert [CLASSES[target], CLASSES[placed]] == [e["class"] for e in spec["include"]]
        step = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
        assert (row - target_row, column - target_column) == step[spec["include"][1]["position"][0]]


def test_counted_objects_share_a_mentioned_colour() -> None:
    rng = np.random.default_rng(0)
    named = [s for s in (sample_spec(rng, "counting") for _ in range(100)) if "color" in s["include"][0]]
    assert 30 < len(named) < 70
    assert all({c for _, c, *_ in arrange(s, rng)} == {s["include"][0]["color"]} for s in named)


def test_the_vocabulary_covers_every_caption() -> None:
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
def test_a_caption_that_cannot_be_read_is_named(caption: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WORDS.encode(["a seven", caption])


def test_unknown_tags_and_impossible_worlds_are_refused() -> None:
    with pytest.raises(ValueError, match="'colour'"):
        sample_spec(np.random.default_rng(0), "colour")
    with pytest.raises(ValueError, match="size here at least 19"):
        World(size=18, pitch=10, shift=1)
    with pytest.raises(ValueError, match="jitter 2"):
        World(pitch=9, jitter=2)


def test_the_evaluation_set_is_balanced_and_fixed() -> None:
    chosen = prompts(40, seed=1)
    assert [s["tag"] for s in chosen] == [tag for tag in TAGS for _ in range(40)]
    assert chosen == prompts(40, seed=1) != prompts(40, seed=2)
    for tag in TAGS:
        # there are only ten digits to ask for alone
        assert len({s["prompt"] for s in chosen if s["tag"] == tag}) == (10 if tag == "single_object" else 40)


@pytest.mark.parametrize("world", [World(), World(size=20, pitch=10, shift=1, jitter=1)])
def test_glyphs_never_touch(world: World) -> None:
    four = {"tag": "counting", "include": [{"class": "eight", "count": 4, "color": "black"}]}
    for image in scenes([four] * 50, world=world):
        assert ndimage.label((np.abs(image - GREY) > 1e-6).any(0), np.ones((3, 3)))[1] == 4
