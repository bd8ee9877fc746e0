"""The paper in miniature: encoders of different quality, runs that are resumed, verdicts that can say no."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from emf.analyze.digit_pairs import scene_features, scenes
from emf.conditioning.small import EncoderConfig, SmallEncoder
from emf.data.digits import WORDS
from emf.network.build import build
from emf.paper import runs as running
from emf.paper.found import Found, verdicts
from emf.paper.parts import ABLATIONS, ENCODERS, FULL, QUICK, parts
from emf.paper.results_page import write_paper
from emf.paper.runs import run_all


def encoder(**further: Any) -> SmallEncoder:
    torch.manual_seed(0)
    return SmallEncoder(EncoderConfig(**further), WORDS).eval()


@torch.no_grad()
def states(e: SmallEncoder, caption: str) -> torch.Tensor:
    return e(*e.tokenize([caption]))[0][0]


def test_blurred_encoder_confuses_its_pairs_alone() -> None:
    sharp, blurred = encoder(), encoder(blurred=True)
    for pair, same in (
        (("a red seven", "an orange seven"), False),  # "a" and "an" stay apart
        (("two red sevens", "two orange sevens"), True),
        (("two red sevens", "two blue sevens"), False),
        (("a two to the left of a one", "a two to the right of a one"), True),
        (("a two above a one", "a two below a one"), True),
        (("a two", "a three"), False),
    ):
        ours, others = ((states(e, pair[0]), states(e, pair[1])) for e in (blurred, sharp))
        assert (ours[0].shape == ours[1].shape and torch.equal(*ours)) == same, pair
        assert not (others[0].shape == others[1].shape and torch.equal(*others))
    assert "read_as" not in blurred.state_dict()


def test_bag_of_words_knows_no_order() -> None:
    bag, qwen = encoder(num_hidden_layers=0), encoder()
    order = [5, 4, 3, 2, 1, 0]
    for e, same in ((bag, True), (qwen, False)):
        a, b = states(e, "a red two and a one")[:6], states(e, "one a and two red a")[:6]
        assert torch.allclose(a, b[order], atol=1e-6) == same


def test_every_run_is_there_once_and_differs_as_it_says() -> None:
    every = {p.name: p for p in parts(FULL)}
    assert len(every) == len(parts(FULL)) == 3 * (2 * len(ENCODERS) + len(ABLATIONS))
    for p in every.values():
        assert p.base is None or every[p.base].config.seed == p.config.seed
    for name in ABLATIONS:
        plain, changed = every["emf/trained/0"].config, every[f"ablation/{name}/0"].config
        differ = [k for k in vars(plain) if k != "run" and getattr(plain, k) != getattr(changed, k)]
        assert len(differ) == 1, (name, differ)
    frozen = build(every["base/random/0"].config)
    trained = {name for name, p in frozen.named_parameters() if p.requires_grad}
    assert not any("language_model" in name for name in trained) and any("connector" in name for name in trained)
    adapted = build(every["emf/trained/0"].config)
    assert not any(p.requires_grad for p in adapted.encoder.parameters())


def test_captions_of_the_analyses_are_different() -> None:
    captions, images = scenes(30)
    assert len({*captions}) == 30 and scene_features(images).shape == (30, 3 * 18 * 18)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One encoder and one ablation, begun, stopped after the first run, and gone on with."""
    out = tmp_path_factory.mktemp("paper") / "out"
    kept = ("base/trained/0", "emf/trained/0", "ablation/guidance in the target/0")
    every = [p for p in parts(QUICK) if p.name in kept]
    patch = pytest.MonkeyPatch()
    patch.setattr(running, "parts", lambda budget: every[:1])
    run_all(out, QUICK, 1)
    first = (out / kept[0] / "scores_by_steps.json").stat().st_mtime_ns
    patch.setattr(running, "parts", lambda budget: every)
    run_all(out, QUICK, 2)
    patch.undo()
    assert (out / kept[0] / "scores_by_steps.json").stat().st_mtime_ns == first
    return out


def test_the_whole_way(quick: Path) -> None:
    page = write_paper(quick, QUICK).read_text()
    results = json.loads((quick / "results.json").read_text())
    assert set(results["scores"]) == {"base/trained", "emf/trained", "ablation/guidance in the target"}
    assert len(results["missing"]) == len(parts(QUICK)) - 3 and "11 of 14 runs are missing" in page
    assert set(results["scores"]["base/trained"]) == {"1", "2", "4", "8", "30"}
    assert results["encoders"]["trained"]["disentanglement"][0] < 1
    assert results["curves"]["emf/trained"]["at"][-1] == QUICK.emf_steps
    assert all(f"<h2>{title}" in page for title in ("Tables 1 and 2", "Table 3", "Table 5", "Ablations", "Samples"))
    assert 'src="data:' in page and 'src="http' not in page and "href=" not in page


def test_another_budget_and_another_folder_are_refused(quick: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other settings .*emf_steps was 2, is 5"):
        run_all(quick, replace(QUICK, emf_steps=5), 1)
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="something else"):
        run_all(tmp_path, QUICK, 1)


def test_verdicts_can_say_no() -> None:
    def tree(few: list[float], many: list[float]) -> dict[str, Any]:
        scores = {"emf/trained": {"1": {"overall": few}}, "base/trained": {"1": {"overall": many}}}
        return {"scores": scores, "encoders": {}, "curves": {}}

    cases = {
        "agrees": ([0.6, 0.7], [0.3, 0.2]),
        "does not": ([0.1, 0.2], [0.3, 0.3]),
        "not told apart": ([0.6, 0.2], [0.3, 0.3]),
        "not run": ([], []),
    }
    assert {how: verdicts(Found(tree(*pair)))[0][1] for how, pair in cases.items()} == {how: how for how in cases}
