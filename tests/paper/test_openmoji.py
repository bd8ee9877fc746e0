"""Text encoders on named pictures: the whole way in small, correlations by hand, verdicts that can say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from named_pictures import shapes
from scipy.stats import spearmanr

pytest.importorskip("deepspeed")

from emf.network.build import build
from emf.network.outline import outline, tokens_of
from emf.paper.found import MEASURES
from emf.paper.openmoji_found import SCORED, Found, by_chance, spearman, verdicts
from emf.paper.openmoji_page import write_openmoji
from emf.paper.openmoji_parts import ENCODERS, FULL, QUICK, parts
from emf.paper.openmoji_runs import run_openmoji

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
    assert set(tree["ranks"]) == {"base/bag of words", "emf/bag of words"} and len(tree["captions"]) == QUICK.prompts
    assert set(tree["ranks"]["emf/bag of words"]) == {"1", "2", "4"} and set(tree["encoders"]) == {"bag of words"}
    assert "Drawn by a test." in page and 'src="http' not in page and "an order needs three" in page.lower()
    with pytest.raises(ValueError, match="openmoji: .*other settings"):
        run_openmoji(out, shapes(), FULL, 1)


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


def test_spearman_is_scipys_and_chance_is_counted() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(4, size=6), rng.normal(size=6)
        expected = spearmanr(a, b).statistic
        assert spearman(a, b) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert by_chance(1, 3) == pytest.approx(2 / 6) and by_chance(0.5, 3) == 1 and by_chance(1, 5) == 2 / 120


def found(better: float, encoders: int = 5) -> Found:
    """Encoders, told well apart, whose scores rise with the measure (better 1), fall (-1), or are all alike."""
    rng, tree = np.random.default_rng(0), dict[str, Any](ranks={}, encoders={})
    tree["captions"] = [{"kind": "alias"}] * 400
    for k, name in enumerate("abcde"[:encoders]):
        tree["encoders"][name] = {m: [(0.2 * k + 0.05 * rng.normal(size=400)).tolist()] for m in MEASURES}
        for group, steps in SCORED:
            hit = rng.random(400) < 0.5 + 0.22 * better * (k - 2)
            tree["ranks"].setdefault(f"{group}/{name}", {})[str(steps)] = [np.where(hit, 0, 7).tolist()]
    return Found(tree)


@pytest.mark.parametrize(("better", "how"), [(1.0, "agrees"), (-1.0, "does not"), (0.0, "not told apart")])
def test_verdicts_can_say_no(better: float, how: str) -> None:
    assert {line[1] for line in verdicts(found(better))} == {how}
    assert {line[1] for line in verdicts(found(better, encoders=3))} == {"not told apart"}  # chance alone gives a third


def test_scores_by_kind_and_a_missing_one() -> None:
    some = found(1.0)
    assert some.score("emf", "e", 1).mean > 0.8 > some.score("emf", "a", 1).mean
    assert some.score("emf", "c", 1, top=8).mean == 1 and np.isnan(some.score("emf", "f", 1).mean)
    assert np.isnan(some.score("emf", "c", 1, kind="reworded").mean)
