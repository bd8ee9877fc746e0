"""Text encoders on named pictures: the whole way in small, correlations by hand, verdicts that can say no."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from named_pictures import shapes
from scipy.stats import spearmanr

pytest.importorskip("deepspeed")

from emf.network.build import build
from emf.network.outline import outline, tokens_of
from emf.paper import openmoji_runs
from emf.paper.found import MEASURES
from emf.paper.openmoji_found import SCORED, Found, by_chance, over_captions, spearman, verdicts
from emf.paper.openmoji_page import write_openmoji
from emf.paper.openmoji_parts import ENCODERS, FULL, QUICK, parts
from emf.paper.openmoji_record import odd_ranks, study
from emf.paper.openmoji_runs import run_openmoji
from emf.paper.record import ENCODER, SCORES, Column

TOYS = {name: ENCODERS[name] for name in ("bag of words", "frozen random")}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One encoder of two, all of it done."""
    out = tmp_path_factory.mktemp("openmoji") / "out"
    run_openmoji(out, shapes(), QUICK, 1, {"bag of words": TOYS["bag of words"]})
    return out


def test_the_whole_way(out: Path) -> None:
    done = (out / "base" / "bag of words" / "0" / "scores_by_steps.json").stat().st_mtime_ns
    run_openmoji(out, shapes(), QUICK, 1, {"bag of words": TOYS["bag of words"]})
    assert (out / "base" / "bag of words" / "0" / "scores_by_steps.json").stat().st_mtime_ns == done
    page = write_openmoji(out, shapes(), QUICK, TOYS).read_text()
    tree = json.loads((out / "results.json").read_text())
    assert tree["missing"] == ["base/frozen random/0", "emf/frozen random/0"] and "2 of 4 runs are missing" in page
    done = tree["parts"]
    assert set(done) == {"base/bag of words/0", "emf/bag of words/0"} and len(tree["captions"]) == QUICK.prompts
    assert set(done["emf/bag of words/0"]["scores"]) == {"1", "2", "4"}
    assert {*done["base/bag of words/0"]["encoder"]} == {*MEASURES} and "There is one seed" in page
    assert "Drawn by a test." in page and 'src="http' not in page and "an order needs three" in page.lower()
    with pytest.raises(ValueError, match="openmoji: .*other settings .*emf_steps was 2, is 250"):
        run_openmoji(out, shapes(), replace(FULL, seeds=(0, 1)), 1)


def test_a_record_is_gone_on_with(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More seeds are no other budget: of a copied record nothing is made again, but a base that a missing run starts
    from. A folder of an earlier version, whose ranks are no rows, keeps its runs."""
    few, two = {"bag of words": TOYS["bag of words"]}, replace(QUICK, seeds=(0, 1))
    write_openmoji(out, shapes(), QUICK, few)
    for name in ("results.json", "budget.json"):
        shutil.copy(out / name, tmp_path)
    made: list[str] = []
    monkeypatch.setattr(openmoji_runs, "run_parts", lambda out, left, *_, **__: made.extend(part.name for part in left))
    run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    assert not made and not (tmp_path / "world").exists()
    run_openmoji(tmp_path, shapes(), two, 1, few)
    assert made == ["base/bag of words/1", "emf/bag of words/1"]
    page = write_openmoji(tmp_path, shapes(), two, few).read_text()
    tree = json.loads((tmp_path / "results.json").read_text())
    assert tree["missing"] == made and "2 of 4 runs are missing" in page
    assert tree["parts"] == json.loads((out / "results.json").read_text())["parts"]
    tree["parts"].pop("emf/bag of words/0")
    (tmp_path / "results.json").write_text(json.dumps(tree))
    made.clear()
    run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    assert made == ["base/bag of words/0", "emf/bag of words/0"]
    for row, said in (
        ({"scores": {"1": [0]}}, "scores has 1 ranks at 1 steps; expected 6, one a caption; repair or remove"),
        ({"scores": {"1": 6 * [12]}}, "scores has the rank 12 at 1 steps; expected 0 to 11"),
        ({"scores": {"x": 6 * [1]}}, "scores is no object of ranks by number of steps"),
        ({"scores": {}, "encoder": dict.fromkeys(MEASURES, [0.5])}, "encoder has 1 values of discriminability; exp"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(tree | {"parts": {"base/bag of words/0": row}}))
        with pytest.raises(ValueError, match=f"openmoji: .*results.json, base/bag of words/0, {said}"):
            run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    (tmp_path / "results.json").write_text(json.dumps(tree | {"captions": tree["captions"][1:]}))
    with pytest.raises(ValueError, match="openmoji: .*is of other captions than are made here now; move it away"):
        run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    (tmp_path / "results.json").write_text(json.dumps({"budget": {}, "ranks": {}}))
    (tmp_path / "budget.json").write_text(json.dumps(asdict(QUICK)))
    made.clear()
    run_openmoji(tmp_path, shapes(), two, 1, few)
    assert made == [part.name for part in parts(tmp_path, two, few)]


def test_the_recorded_runs_are_a_record_to_go_on_with() -> None:
    """profiles/openmoji, as a copy of it is read; its captions are another world's."""
    folder = Path(__file__).parents[2] / "profiles" / "openmoji"
    tree = json.loads((folder / "results.json").read_text())
    budget = replace(FULL, **json.loads((folder / "budget.json").read_text()))
    whole = study(folder, shapes(), budget)
    ranks = partial(odd_ranks, captions=len(tree["captions"]), pictures=budget.pictures)
    columns = whole.columns | {"scores": Column(SCORES, ranks), "encoder": Column(ENCODER, lambda tree: None)}
    rows = replace(whole, columns=columns, fixed={}).recorded(folder)
    assert rows.keys() == {part.name for part in whole.parts} and Found(tree).encoders == [*ENCODERS]
    # as profiles/LOG.md has it, but for chance: three scores are alike, which more orders match
    agreed = Found(tree).agreement(MEASURES[1], "emf", 1)
    assert (agreed.n, agreed.verdict) == (1, "not told apart") and f"{agreed.seeds.mean:.2f}" == "0.89"
    assert f"{agreed.captions.low:.2f} {agreed.captions.high:.2f} {agreed.chance:.2f}" == "0.05 1.00 0.10"


def test_what_is_trained_is_what_is_told(out: Path) -> None:
    every = {p.name: p for p in parts(out, QUICK, TOYS)}
    for name, encoder in TOYS.items():
        if not (out / "encoders" / name).is_dir():
            continue
        base, few = (every[f"{group}/{name}/0"].config for group in ("base", "emf"))
        trained = {n for n, p in build(base).named_parameters() if p.requires_grad}
        assert any(n.startswith("encoder.") for n in trained) == encoder.trained
        assert not any(p.requires_grad for p in build(few).encoder.parameters())
        # the plan counts the same network, and the tokens that are read
        assert outline(base).state_dict().keys() == build(base).state_dict().keys() and tokens_of(base) == (16, 16)
    assert len(parts(out, FULL)) == 2 * len(ENCODERS) and all(p.base is None or p.base in every for p in every.values())


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(4, size=6), rng.normal(size=6)
        expected = spearmanr(a, b).statistic
        assert spearman(a, b) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def chance(*orders: list[float]) -> float:
    """Of encoders 0, 1, ... with such scores by seed."""
    scores = np.array(orders, float)
    return by_chance(np.broadcast_to(np.arange(scores.shape[1]), scores.shape), scores)


def test_chance_is_counted() -> None:
    assert chance([0, 1, 2]) == pytest.approx(2 / 6) and chance([0, 2, 1]) == 1 and chance([0, 1, 2, 3, 4]) == 2 / 120
    assert np.isnan(chance([1, 1, 1]))
    # one order in all seeds: a second one that says the same is no further evidence of the encoders
    assert chance([0, 1, 2], [0, 1, 2]) == pytest.approx(2 / 6)
    # 0.5 in both seeds, where single orders all reach it: the mean of two reaches it in one order to each side
    assert chance([0, 2, 1], [1, 0, 2]) == pytest.approx(2 / 6)


def found(*better: float, encoders: int = 5) -> Found:
    """Encoders, told well apart, whose scores rise with the measure (better 1), fall (-1), or are all alike, by
    seed."""
    rng, tree = np.random.default_rng(0), dict[str, Any](parts={}, budget={"seeds": [*range(len(better))]})
    tree["captions"] = [{"kind": "alias"}] * 400
    for k, name in enumerate("abcde"[:encoders]):
        measured = {m: (0.2 * k + 0.05 * rng.normal(size=400)).tolist() for m in MEASURES}
        for seed, b in enumerate(better):
            rows = {f"base/{name}/{seed}": {"scores": {}, "encoder": measured}, f"emf/{name}/{seed}": {"scores": {}}}
            for group, steps in SCORED:
                hit = rng.random(400) < 0.5 + 0.22 * b * (k - 2)
                rows[f"{group}/{name}/{seed}"]["scores"][str(steps)] = np.where(hit, 0, 7).tolist()
            tree["parts"] |= rows
    return Found(tree)


@pytest.mark.parametrize(
    ("better", "how"),
    [
        ((1, 1, 1), "agrees"),
        ((-1, -1), "does not"),
        ((0, 0, 0), "not told apart"),
        ((1,), "not told apart"),  # of another training one seed knows nothing
        ((1, 1, -1), "not told apart"),  # captions say so of the mean, seeds do not
        ((), "not run"),
    ],
)
def test_verdicts_can_say_no(better: tuple[float, ...], how: str) -> None:
    assert {line[1] for line in verdicts(found(*better))} == {how}
    if better:
        few = found(*better, encoders=3)  # chance alone gives a third
        assert {line[1] for line in verdicts(few)} == {"not told apart"}


def test_the_correlation_is_the_mean_of_every_seeds() -> None:
    """With Student's interval over seeds, within -1 and 1; a seed that lacks an encoder counts nowhere."""
    some = found(1, 1, -1, 1)
    some.tree["parts"]["emf/c/3"]["scores"].pop("2")
    agreed = Found(some.tree).agreement(MEASURES[0], "emf", 1)
    assert (agreed.n, agreed.seeds.mean, agreed.seeds.low, agreed.seeds.high) == (3, pytest.approx(1 / 3), -1, 1)
    assert str(agreed).startswith("+0.33 [-1.00, +1.00]\ncaptions +0.3")
    alone = found(1).agreement(MEASURES[0], "emf", 1)
    assert str(alone).startswith("+1.00, one seed\n") and (alone.seeds.low, alone.seeds.high) == (-1, 1)
    rho = [
        spearmanr(
            [some.measured(e, MEASURES[0])[0].mean() for e in "abcde"], [some.score("emf", e, 2)[s] for e in "abcde"]
        ).statistic
        for s in range(3)
    ]
    assert found(1, 1, -1).agreement(MEASURES[0], "emf", 2).seeds.mean == pytest.approx(np.mean(rho))


def test_scores_by_kind_and_a_missing_one() -> None:
    some = found(1.0, 1.0)
    assert min(some.score("emf", "e", 1).values()) > 0.8 > max(some.score("emf", "a", 1).values())
    assert some.score("emf", "c", 1, top=8) == {0: 1, 1: 1} and some.score("emf", "f", 1) == {}
    assert some.score("emf", "c", 1, kind="reworded") == {}
    assert over_captions(some.hits("emf", "c", 1, top=8)).low == 1 and np.isnan(over_captions({}).mean)
