"""Text encoders compared in one command, and how sure their order is. A few seconds in all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from analyzed import write_coco, write_models
from image_files import write_folder

from emf.analyze.comparison import compare_encoders
from emf.analyze.encoders import embed_texts
from emf.analyze.names import SMALL, EncoderName, parse_encoders
from emf.analyze.ranking import rank
from emf.files import alone
from emf.recipes import BASE
from emf.weights.start import read_init


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def test_a_ranking_tells_apart_what_differs_in_the_same_queries() -> None:
    """A difference far below the spread of the queries is seen, for they are the same ones; one by chance is not."""
    rng = np.random.default_rng(0)
    hard, shuffled, own = rng.normal(0.5, 0.3, 400), rng.permutation(400), rng.normal(0, 0.05, 400)
    values = {"low": hard - 0.02, "noisy": hard[shuffled] - 0.01, "high": hard + own - own.mean()}
    made = rank(values, seed=3)
    assert made.order == ["high", "noisy", "low"] and made == rank(values, seed=3)
    assert made.alike == {"high": ["noisy"], "noisy": ["high", "low"], "low": ["noisy"]}
    assert str(made).startswith("high ~ noisy ~ low; the whole order in ") and 0.2 < made.sure < 0.99
    plain = rank({"a": np.tile([0.0, 1.0], 10), "b": np.tile([0.0, 1.0], 10), "c": np.tile([-3.0, -2.0], 10)})
    assert plain.alike == {"a": ["b"], "b": ["a"], "c": []} and str(plain).startswith(
        "a ~ b > c; the whole order in 0%"
    )
    # three prompts of which every resample says the same, and one
    few = rank({"a": np.array([0.5, 0.6, 0.7]), "b": np.array([0.4, 0.2, 0.1])})
    assert few.order == ["a", "b"] and few.alike == {"a": ["b"], "b": ["a"]} and few.sure == 1
    assert rank({"a": np.ones(1), "b": np.zeros(1)}).alike == {"a": ["b"], "b": ["a"]}
    assert rank({"alone": np.ones(3)}).sure == 1
    with pytest.raises(ValueError, match="expected finite numbers"):
        rank({"a": np.array([np.nan])})


def test_a_ranking_holds_its_level() -> None:
    """Of encoders that do not differ, a pair is told apart in about one ranking of twenty."""
    rng, told = np.random.default_rng(1), 0
    for _ in range(120):
        made = rank({n: rng.normal(size=60) for n in "abc"}, resamples=800)
        told += any(len(others) < 2 for others in made.alike.values())
    assert told <= 17  # of 120; 6 are expected, and 17 come once in ten thousand


def test_the_digits_own_encoders_are_read_by_name() -> None:
    every = {which: EncoderName.parse(f"digits:{which}") for which in SMALL}
    assert [e.name for e in every.values()] == [f"digits:{which}" for which in SMALL]
    loaded = {which: e.load() for which, e in every.items()}
    words = read_init(BASE)["encoder.language_model.embed_tokens.weight"]
    for which in ("trained", "blurred", "bag-of-words"):
        assert torch.equal(loaded[which].language_model.embed_tokens.weight, words.float())
    state = torch.random.get_rng_state()
    torch.testing.assert_close(every["random"].load().state_dict(), loaded["random"].state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    said = {which: embed_texts(e, ["two red sixes", "two orange sixes"]) for which, e in loaded.items()}
    assert torch.equal(*said["blurred"]) and not any(torch.equal(*x) for w, x in said.items() if w != "blurred")
    bag = embed_texts(loaded["bag-of-words"], ["a six to the left of a two", "a two to the left of a six"])
    torch.testing.assert_close(bag[0], bag[1])


def test_encoders_are_compared_on_the_digits_scenes(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders whose kind is found and an own one; the tables are true to the rankings; then one more is named."""
    from emf.analyze import comparison, digit_pairs, disentanglement, pairs

    for module in (digit_pairs, pairs, disentanglement):
        monkeypatch.setattr(module, "SCENES", 40)
    names = [f"{models / 'clip'}", f"five={models / 't5'}", "digits:trained"]
    encoders, out = parse_encoders(names), tmp_path / "out"
    assert [(e.name, e.kind) for e in encoders] == [("clip", "clip"), ("five", "t5"), ("digits:trained", "digits")]
    made = compare_encoders(encoders, out)
    printed, page = capsys.readouterr().out, (out / "results.md").read_text()
    tree = json.loads((out / "results.json").read_text())
    assert [*made] == ["discriminability", "discriminability, centred", "disentanglement", "disentanglement, centred"]
    for name, ranking in made.items():
        assert f"- {name}: {ranking}\n" in page and f"{name}: {ranking.order[0]}" in printed
        assert tree["rankings"][name]["order"] == ranking.order
        score, _, centred = name.partition(", ")
        means = {row["name"]: row[score][centred or "plain"]["mean"] for row in tree["rows"]}
        assert ranking.order == sorted(means, key=lambda n: -means[n])
    assert [row["name"] for row in tree["rows"]] == made["discriminability"].order
    for score in comparison.SCORES:
        assert (out / score / "results.md").is_file() and f"]({score}/results.md)" in page
        own = json.loads((out / score / "results.json").read_text())
        assert {r["name"]: r["plain"] for r in own["rows"]} == {r["name"]: r[score]["plain"] for r in tree["rows"]}
    assert "smoothed pixels" in (out / "discriminability" / "results.md").read_text()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with alone(out), pytest.raises(ValueError, match="another process is at work in .*out; wait for it"):
        compare_encoders(parse_encoders([*names, "digits:random"]), out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    again = compare_encoders(parse_encoders([*names, "digits:random"]), out)
    assert len(again["discriminability"].order) == 4
    with pytest.raises(ValueError, match="holds results of digits:random"):
        compare_encoders(encoders, out)
    with pytest.raises(ValueError, match=r"holds what was made by other settings \(seed\)"):
        compare_encoders(parse_encoders([*names, "digits:random"]), out, seed=1)


def test_encoders_are_compared_on_data_that_is_given(models: Path, tmp_path: Path) -> None:
    """A copy of an encoder is not told apart from it, nor is anything said of one encoder alone."""
    data, prompts = (
        write_coco(tmp_path / "coco"),
        write_folder(tmp_path / "p", {"1.txt": b"a cat, a dog", "2.txt": b"b c"}),
    )
    copy = shutil.copytree(models / "clip", tmp_path / "copy")
    how = dict(dino=str(models / "dinov2"))
    made = compare_encoders(parse_encoders([f"{models / 'clip'}", f"{copy}"]), tmp_path / "out", data, prompts, **how)
    for ranking in made.values():
        assert ranking.alike == {"clip": ["copy"], "copy": ["clip"]} and ranking.sure == 0
    alone = compare_encoders(parse_encoders([f"{copy}"]), tmp_path / "alone", data, prompts, **how)
    assert (
        alone["discriminability"].order == ["copy"] and "- disc" not in (tmp_path / "alone" / "results.md").read_text()
    )
