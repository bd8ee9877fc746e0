"""Text encoders on named pictures: the whole way in small, correlations by hand, verdicts that can say no."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from named_pictures import shapes
from scipy.stats import spearmanr

pytest.importorskip("deepspeed")

from emf.analyze.bootstrap import Interval
from emf.network.build import build
from emf.network.outline import outline, tokens_of
from emf.paper import openmoji_runs
from emf.paper.found import MEASURES
from emf.paper.openmoji_found import SCORED, Agreement, Found, by_chance, over_pictures, spearman, verdicts
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
    strange = {n.replace("bag of words", "stranger"): row for n, row in tree["parts"].items()}
    (tmp_path / "results.json").write_text(json.dumps(tree | {"parts": tree["parts"] | strange}))
    assert "stranger" not in write_openmoji(tmp_path, shapes(), two, few).read_text()
    kept = tree["parts"].pop("emf/bag of words/0")
    (tmp_path / "results.json").write_text(json.dumps(tree))
    made.clear()
    run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    assert made == ["base/bag of words/0", "emf/bag of words/0"]
    for row, said in (
        ({"scores": {"1": [0]}}, "scores has 1 ranks at 1 steps; expected 6, one a caption; repair or remove"),
        ({"scores": {"1": 6 * [12]}}, "scores has the rank 12 at 1 steps; expected 0 to 11"),
        ({"scores": {"x": 6 * [1]}}, "scores is no object of ranks by number of steps"),
        ({"scores": {}, "encoder": dict.fromkeys(MEASURES, [0.5])}, "encoder has 1 values of discriminability; exp"),
        (
            {k: x for k, x in tree["parts"]["base/bag of words/0"].items() if k != "encoder"},
            "has no encoder; repair or",
        ),
        ({"scores": kept["scores"]}, "has no scores at 30 steps; repair or remove that part's row"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(tree | {"parts": {"base/bag of words/0": row}}))
        with pytest.raises(ValueError, match=f"openmoji: .*results.json, base/bag of words/0,? {said}"):
            run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    (tmp_path / "results.json").write_text(json.dumps(tree | {"captions": tree["captions"][1:]}))
    with pytest.raises(ValueError, match="openmoji: .*is of other captions than are made here now; move it away"):
        run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    less = {"scores": {n: x for n, x in kept["scores"].items() if n != "2"}}
    (tmp_path / "results.json").write_text(json.dumps(tree | {"parts": {"emf/bag of words/0": less}}))
    with pytest.raises(ValueError, match="results.json, emf/bag of words/0 has no scores at 2 steps; repair or remove"):
        run_openmoji(tmp_path, shapes(), QUICK, 1, few)
    old = {"budget": {"seeds": [0]}, "ranks": {"base/bag of words": {}, "emf/bag of words": {}}}
    (tmp_path / "results.json").write_text(json.dumps(old | {"missing": ["emf/bag of words/0"]}))
    with pytest.raises(
        ValueError, match="of an earlier version, with figures of base/bag of words/0, whose run is not"
    ):
        write_openmoji(tmp_path, shapes(), QUICK, few)
    assert json.loads((tmp_path / "results.json").read_text())["ranks"] == old["ranks"]
    shutil.copytree(out / "base", tmp_path / "base")
    write_openmoji(tmp_path, shapes(), QUICK, few)  # now its run is there
    (tmp_path / "base" / "bag of words" / "0" / ENCODER).unlink()
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match="bag of words/0 has no encoder; move its folder away, and the part"):
        write_openmoji(tmp_path, shapes(), QUICK, few)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "results.json").write_text(json.dumps({"budget": {}, "ranks": {}}))
    (tmp_path / "budget.json").write_text(json.dumps(asdict(QUICK)))
    made.clear()
    run_openmoji(tmp_path, shapes(), two, 1, few)
    assert made == [part.name for part in parts(tmp_path, two, few)]


def test_the_recorded_runs_are_a_record_to_go_on_with() -> None:
    """profiles/openmoji, as a copy of it is read; its captions are another world's."""
    folder = Path(__file__).parents[2] / "profiles" / "openmoji"
    tree = json.loads((folder / "results.json").read_text())
    budget = replace(FULL, seeds=(0, 1, 2), **json.loads((folder / "budget.json").read_text()))
    whole = study(folder, shapes(), budget)
    ranks = partial(odd_ranks, captions=len(tree["captions"]), pictures=budget.pictures)
    columns = whole.columns | {"scores": Column(SCORES, ranks), "encoder": Column(ENCODER, lambda tree: None)}
    rows = replace(whole, columns=columns, fixed={}).recorded(folder)
    assert rows.keys() == {part.name for part in whole.parts} and Found(tree, ENCODERS).encoders == [*ENCODERS]
    # as profiles/LOG.md has it
    agreed = Found(tree, ENCODERS).agreement(MEASURES[1], "emf", 1)
    assert (agreed.n, agreed.verdict) == (3, "not told apart") and f"{agreed.seeds.mean:.2f}" == "0.78"
    assert f"{agreed.pictures.low:.2f} {agreed.pictures.high:.2f} {agreed.chance:.2f}" == "0.30 0.94 0.10"


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
    tree["captions"] = [{"kind": "alias", "picture": i} for i in range(400)]
    tree["measured"] = dict.fromkeys(MEASURES, [*range(400)])
    for k, name in enumerate("abcde"[:encoders]):
        measured = {m: (0.2 * k + 0.05 * rng.normal(size=400)).tolist() for m in MEASURES}
        for seed, b in enumerate(better):
            rows = {f"base/{name}/{seed}": {"scores": {}, "encoder": measured}, f"emf/{name}/{seed}": {"scores": {}}}
            for group, steps in SCORED:
                hit = rng.random(400) < 0.5 + 0.22 * b * (k - 2)
                rows[f"{group}/{name}/{seed}"]["scores"][str(steps)] = np.where(hit, 0, 7).tolist()
            tree["parts"] |= rows
    return Found(tree, "abcde")


def exact(*shares: list[float]) -> Found:
    """Five encoders whose measures rise from one to the next, with these scores by seed, in tenths."""
    some = found(*len(shares) * [1])
    for seed, own in enumerate(shares):
        for (group, steps), (k, share) in product(SCORED, enumerate(own)):
            ranks = np.where(np.arange(400) % 10 < 10 * share, 0, 7).tolist()
            some.tree["parts"][f"{group}/{'abcde'[k]}/{seed}"]["scores"][str(steps)] = ranks
    return some


@pytest.mark.parametrize(
    ("better", "how"),
    [
        ((1, 1, 1), "agrees"),
        ((-1, -1, -1), "does not"),
        ((1, 1), "not told apart"),  # two often agree exactly by chance
        ((0, 0, 0), "not told apart"),
        ((1,), "not told apart"),  # of another training one seed knows nothing
        ((1, 1, -1), "not told apart"),  # pictures say so of the mean, seeds do not
        ((), "not run"),
    ],
)
def test_verdicts_can_say_no(better: tuple[float, ...], how: str) -> None:
    assert {line[1] for line in verdicts(found(*better))} == {how}
    if better:
        few = found(*better, encoders=3)  # chance alone gives a third
        assert {line[1] for line in verdicts(few)} == {"not told apart"}


@pytest.mark.parametrize(
    ("seeds", "pictures", "chance", "n", "how"),
    [
        ((0.8, 1), (0.1, 1), 0.05, 3, "agrees"),
        ((-1, -0.8), (-1, -0.1), 0.05, 3, "does not"),
        ((0.8, 1), (-0.1, 1), 0.02, 3, "not told apart"),
        ((-1, -0.8), (-1, 0.1), 0.02, 3, "not told apart"),
        ((-0.1, 1), (0.8, 1), 0.02, 3, "not told apart"),
        ((-1, 0.1), (-1, -0.8), 0.02, 3, "not told apart"),
        ((0.8, 1), (0.8, 1), 0.06, 3, "not told apart"),
        ((-1, -0.8), (-1, -0.8), 0.06, 3, "not told apart"),
        ((1, 1), (0.8, 1), 0.02, 2, "not told apart"),
    ],
)
def test_a_verdict_asks_all(
    seeds: tuple[float, float], pictures: tuple[float, float], chance: float, n: int, how: str
) -> None:
    """Both intervals on one side of 0, chance below 5 %, and three seeds: one alone that fails is enough."""
    assert Agreement(Interval(0.0, *seeds), Interval(0.0, *pictures), chance, n, 3).verdict == how


def test_chance_is_that_of_the_mean_of_every_seeds_order() -> None:
    """Not of the order of the mean over seeds, in which the first two are the other way round: 10 of 120 orders are as
    far from 0 as that, 4 as the mean of 1 and 0.9."""
    agreed = exact([0, 0.2, 0.4, 0.6, 0.8], [0.3, 0, 0.4, 0.6, 0.8]).agreement(MEASURES[0], "emf", 1)
    assert agreed.seeds.mean == pytest.approx(0.95) and agreed.chance == pytest.approx(4 / 120)


def test_a_seed_in_which_all_score_alike_is_left_out() -> None:
    rising, alike = [0, 0.2, 0.4, 0.6, 0.8], 5 * [0.5]
    none, some = (exact(*x).agreement(MEASURES[0], "emf", 1) for x in ([alike], [rising, alike, rising]))
    assert (str(none), none.verdict) == ("all score alike", "not told apart")
    assert str(some).startswith("+1.00 [+1.00, +1.00], 2 of 3 seeds\npictures +") and "nan" not in str(some)
    assert (some.n, some.of, some.verdict) == (2, 3, "not told apart")


def test_an_encoder_of_no_part_is_not_ranked() -> None:
    some = found(1)
    rows = {name: row for name, row in some.tree["parts"].items() if "/e/" in name}
    some.tree["parts"] |= {name.replace("/e/", "/z/"): row for name, row in rows.items()}
    assert Found(some.tree, "abcde").encoders == [*"abcde"]


def test_the_correlation_is_the_mean_of_every_seeds() -> None:
    """With Student's interval over seeds, within -1 and 1; a seed that lacks an encoder counts nowhere."""
    some = found(1, 1, -1, 1)
    some.tree["parts"]["emf/c/3"]["scores"].pop("2")
    agreed = Found(some.tree, "abcde").agreement(MEASURES[0], "emf", 1)
    assert (agreed.n, agreed.seeds.mean, agreed.seeds.low, agreed.seeds.high) == (3, pytest.approx(1 / 3), -1, 1)
    assert str(agreed).startswith("+0.33 [-1.00, +1.00]\npictures +0.3")
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
    assert some.over_asked(some.hits("emf", "c", 1, top=8)).low == 1
    assert np.isnan(some.over_named(MEASURES[0], {}).mean)


def test_captions_of_one_picture_are_drawn_together() -> None:
    """Two captions a picture that say the same are no more evidence than one of them; of pictures with several captions
    the mean is over captions."""
    values = np.random.default_rng(0).random(50)
    one = over_pictures({0: values}, np.arange(50))
    two = over_pictures({0: np.repeat(values, 2)}, np.repeat(np.arange(50), 2))
    assert (two.mean, two.low, two.high) == pytest.approx((one.mean, one.low, one.high))
    assert one.high - one.low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.1)
    few = over_pictures({0: np.array([1.0, 1.0, 1.0, 0.0])}, np.array([0, 0, 0, 1]))
    assert (few.mean, few.low, few.high) == (0.75, 0, 1)


def test_a_measure_and_a_score_are_drawn_by_the_same_pictures() -> None:
    """Where what an encoder says of a picture is what is drawn of it, every draw has the same order in both."""
    some = found(1, 1, 1)
    rng, of = np.random.default_rng(1), np.repeat(np.arange(100), 4)
    some = Found(some.tree | {"captions": [{"kind": "alias", "picture": int(i)} for i in of]}, "abcde")
    some.tree["measured"] = dict.fromkeys(MEASURES, [*range(100)] * 2)  # two captions a picture, in another order
    for name in "abcde":
        hit = rng.random(100) < 0.5  # told apart by chance alone
        for seed, (group, steps) in product(range(3), SCORED):
            parts = some.tree["parts"]
            parts[f"{group}/{name}/{seed}"]["scores"][str(steps)] = np.where(hit[of], 0, 7).tolist()
            parts[f"base/{name}/{seed}"]["encoder"] = {m: np.tile(hit, 2).astype(float).tolist() for m in MEASURES}
    agreed = some.agreement(MEASURES[0], "emf", 1)
    assert (agreed.seeds.mean, agreed.pictures.low, agreed.pictures.high) == pytest.approx((1, 1, 1))
