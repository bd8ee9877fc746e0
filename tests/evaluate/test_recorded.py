"""Recorded scores: what stands beside a run's own, and in the tables of the pages."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT

from bench import digits_scores as renewing
from emf.evaluate.digits_scorer import TAGS
from emf.evaluate.recorded import RECORD, entry, recorded, spreads, standard_error, table
from emf.evaluate.small_world import changed, print_scores
from emf.recipes import from_file


def scores(few: float, captions: int = 300, guidance: float = 1.25) -> dict[str, Any]:
    """As scores.json holds them."""
    rows = [("fm", 1, 0.25), ("fm", 4, 0.5), ("fm", 30, 0.75), ("emf", 1, few)]
    told = [{"model": m, "steps": n, "overall": x, "by_tag": dict.fromkeys(TAGS, x)} for m, n, x in rows]
    kept = dict(ceiling=0.97, noise=0.0, shuffled=0.0)
    return {"guidance": guidance, "captions": captions, "rows": told} | kept


def test_a_spread_is_the_mean_and_the_range_of_the_runs() -> None:
    runs = [entry(scores(few), seed, "here") for seed, few in enumerate((0.5, 0.65, 0.35))]
    assert runs[0]["emf"] == {"1": 0.5} and runs[0]["fm"] == {"1": 0.25, "4": 0.5, "30": 0.75}
    assert f"{spreads(runs, 'emf')[1]:.3f}" == "0.500 (0.350–0.650)"
    assert f"{spreads(runs, 'gap')[1]:.0%}" == "50% (20%–80%)" and f"{spreads(runs, 'fm')[30]:.2f}" == "0.75"
    runs[0]["emf"]["2"] = 0.6
    lines = table({"digits": runs})
    assert "| digits | 3 runs | 0.500 (0.350–0.650) | 0.600 of 1 | | | |" in lines
    assert "| gap closed, the paper's 3B | | 62% | 87% | 98% | | |" in lines
    assert lines[-1] == "Of `digits`: 3 runs, 3 seeds, 1 machine."
    assert table({"digits": runs, "short": runs[:2]}) == [
        *lines[:-1],
        "Of `digits`: 3 runs, 3 seeds, 1 machine.",
        "Too few seeds to be shown: `short`.",
    ]
    assert table({"short": runs[:2]})[-2:] == ["", "Too few seeds to be shown: `short`."]


def test_the_standard_error_is_that_of_a_mean_over_tags() -> None:
    """Against draws of as many captions as each tag has."""
    row = {"by_tag": dict(zip(TAGS, (0.9, 0.5, 0.8, 1.0, 0.7, 0.0), strict=True))}
    generator = np.random.default_rng(0)
    drawn = generator.binomial(50, list(row["by_tag"].values()), size=(20_000, len(TAGS))) / 50
    assert standard_error(row, 300) == pytest.approx(drawn.mean(1).std(), rel=0.02)
    assert standard_error(row, 1200) == pytest.approx(standard_error(row, 300) / 2, rel=0.02)
    two = [(np.array(tags) / 2).tolist() for tags in np.ndindex(*(3,) * len(TAGS))]  # every outcome of two a tag
    chances = [np.prod([0.5 if p == 0.5 else 0.25 for p in tags]) for tags in two]
    squares = [standard_error({"by_tag": dict(zip(TAGS, tags, strict=True))}, 2 * len(TAGS)) ** 2 for tags in two]
    assert np.dot(chances, squares) == pytest.approx(0.25 / 2 / len(TAGS))  # unbiased, of fair coins
    assert math.isnan(standard_error(row, len(TAGS)))  # one a tag says nothing


def test_the_pages_hold_the_record() -> None:
    """`python -m bench.digits_scores` renews them, and the runs under profiles/ are in it."""
    record = json.loads(RECORD.read_text())
    for page in renewing.PAGES:
        text = page.read_text()
        assert renewing.renewed(text, record) == text and "\n".join(table(record)) in text
    for recipe, runs in record.items():
        own = json.loads((ROOT / "profiles" / recipe / "scores.json").read_text())
        config = from_file(ROOT / "profiles" / recipe / "config.json")
        assert not changed(config) and changed(replace(config, optim=replace(config.optim, warmup=7)))
        seed = config.seed
        assert entry(own, seed, runs[0]["machine"]) == runs[0]
        places = [(run["seed"], run["machine"], run["captions"]) for run in runs]
        assert len({*places}) == len(places)


def test_a_run_stands_beside_the_record_of_its_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, asked, there in (
        ("digits", scores(0.5), True),
        ("digits", scores(0.5, captions=6), False),
        ("digits", scores(0.5, guidance=1.5), False),
        ("mine", scores(0.5), False),
    ):
        print_scores(asked, recipe)
        said = capsys.readouterr().out
        mean = f"{spreads(recorded('digits'), 'emf')[1]:.3f}"
        assert ("recorded: mean and range of" in said) == (mean in said) == there
        assert "differ between machines" in said or not there


def test_without_a_gap_none_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    asked = scores(0.5)
    for row in asked["rows"]:
        row["overall"] = 0.5
    print_scores(asked, "digits")
    said = capsys.readouterr().out
    assert "no gap" in said and "nan" not in said
    assert math.isnan(spreads([entry(asked, 0, "here")], "gap")[1].mean)


def test_runs_are_added_to_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, record = tmp_path / "page.md", tmp_path / "record.json"
    page.write_text("a\n<!-- digits-scores -->\nold\n<!-- /digits-scores -->\nb\n")
    record.write_text("{}")
    monkeypatch.setattr(renewing, "PAGES", (page,))
    monkeypatch.setattr(renewing, "RECORD", record)
    for seed, few in ((0, 0.5), (1, 0.6), (2, 0.6), (1, 0.7)):
        run = tmp_path / f"{seed}"
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps({"recipe": "digits", "seed": seed}))
        (run / "scores.json").write_text(json.dumps(scores(few)))
        renewing.main([str(run), "--machine", "here"])
    assert [run["emf"]["1"] for run in json.loads(record.read_text())["digits"]] == [0.5, 0.6, 0.7]
    assert "0.600 (0.500–0.700)" in page.read_text() and page.read_text().startswith("a\n<!--")
    kept = record.read_text()
    for own in ({"steps": 7}, {"optim": {"lr": 0.5}}):
        (run / "config.json").write_text(json.dumps({"recipe": "digits", "seed": 1, **own}))
        with pytest.raises(ValueError, match=r"recorded: .* has other settings than its recipe digits"):
            renewing.main([str(run), "--machine", "here"])
    assert record.read_text() == kept
    same = {"recipe": "digits", "seed": 1, "init": "base", "run": {"save_every": 7}}
    (run / "config.json").write_text(json.dumps(same))
    renewing.main([str(run), "--machine", "here"])  # these change nothing, or are told with a score
    for seed in range(3):
        (tmp_path / f"{seed}" / "scores.json").write_text(json.dumps(scores(0.6, captions=1200)))
        (tmp_path / f"{seed}" / "config.json").write_text(json.dumps(same | {"seed": seed}))
        renewing.main([str(tmp_path / f"{seed}"), "--machine", "here"])
    fewer, more = page.read_text().split("| 1,200 captions, mean (range) |")  # both stand, each with its runs
    assert "| 300 captions, mean (range) |" in fewer and "(0.500–" in fewer and "| digits | 3 runs | 0.600 |" in more
    for own, said in (
        ({"step": 300}, "has scores of step 300 of 500"),
        ({"seed": 7}, "drawn with seed 7; expected its last step's and seed 0's"),
    ):
        (run / "scores.json").write_text(json.dumps(scores(0.5) | own))
        with pytest.raises(ValueError, match=f"recorded: .*{said}"):
            renewing.main([str(run), "--machine", "here"])
    other, kept = scores(0.5), record.read_text()
    other["rows"][0]["overall"] = other["rows"][2]["overall"] = 0.0  # of a base that draws nothing: there is no gap
    (run / "scores.json").write_text(json.dumps(other))
    with pytest.raises(
        ValueError, match=r"recorded: .* of its base, where the recorded runs have \{'1': 0.25, '4': 0.5"
    ):
        renewing.main([str(run), "--machine", "here"])
    assert record.read_text() == kept
    (run / "scores.json").write_text(json.dumps(scores(0.5, captions=6)))
    with pytest.raises(ValueError, match="scores of 6 captions at guidance 1.25; expected an EMF run's of 300"):
        renewing.main([str(run), "--machine", "here"])
