"""The paper in miniature: encoders of different quality, runs that are resumed, verdicts that can say no."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("deepspeed")

from emf.analyze.bootstrap import interval
from emf.analyze.digit_pairs import scene_features, scenes
from emf.conditioning.small import EncoderConfig, SmallEncoder
from emf.data.digits import WORDS
from emf.files import alone
from emf.network.build import build
from emf.paper import paper_record
from emf.paper import runs as running
from emf.paper.found import Found, seeds_to_tell, verdicts
from emf.paper.parts import ABLATIONS, ENCODERS, FULL, QUICK, Part, parts
from emf.paper.record import SCORES
from emf.paper.results_page import write_paper
from emf.paper.runs import run_all
from emf.train.launcher import ended


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
    patch.setattr(paper_record, "parts", lambda budget: every[:1])
    run_all(out, QUICK, 1)
    first = (out / kept[0] / "scores_by_steps.json").stat().st_mtime_ns
    patch.setattr(paper_record, "parts", lambda budget: every)
    run_all(out, QUICK, 2)
    patch.undo()
    assert (out / kept[0] / "scores_by_steps.json").stat().st_mtime_ns == first
    return out


def test_the_whole_way(quick: Path) -> None:
    page = write_paper(quick, QUICK).read_text()
    results = json.loads((quick / "results.json").read_text())
    done = results["parts"]
    assert set(done) == {"base/trained/0", "emf/trained/0", "ablation/guidance in the target/0"}
    assert len(results["missing"]) == len(parts(QUICK)) - 3 and "11 of 14 runs are missing" in page
    assert set(done["base/trained/0"]["scores"]) == {"1", "2", "4", "8", "30"}
    assert done["base/trained/0"]["encoder"]["disentanglement"] < 1
    assert done["emf/trained/0"]["curve"]["at"][-1] == QUICK.emf_steps
    assert all(f"<h2>{title}" in page for title in ("Tables 1 and 2", "Table 3", "Table 5", "Ablations", "Samples"))
    assert 'src="data:' in page and 'src="http' not in page and "href=" not in page


def fails_beside_another(part: Part, out: Path) -> None:
    """Work of two parts, each in a process of its own."""
    if part.name == "long":
        time.sleep(600)
    while not (out / "long" / "log.txt").is_file():
        time.sleep(0.1)
    if part.name == "wrong":
        raise ValueError("x" * 100_000 + "\nfurther")
    sys.exit(1)


@pytest.mark.parametrize(("name", "reason"), [("wrong", "x{500}"), ("stopped", "exit code 1")])
def test_a_part_that_fails_is_told_with_its_log(name: str, reason: str, tmp_path: Path) -> None:
    """By the first line of what was wrong, whose rest stands in the log; the part beside it is ended."""
    both = [Part(part, parts(QUICK)[0].config) for part in ("long", name)]
    with pytest.raises(ValueError, match=rf"^paper: {name} failed \({reason}\); see .*/{name}/log\.txt$"):
        running.run_parts(tmp_path, both, partial(fails_beside_another, out=tmp_path), 2)
    assert not multiprocessing.active_children()
    assert ("further" in (tmp_path / name / "log.txt").read_text()) == (name == "wrong")


def test_no_jobs_at_once_are_refused(tmp_path: Path) -> None:
    """They would wait for nothing, without end."""
    with pytest.raises(ValueError, match="paper: 0 jobs at once; expected at least 1"):
        running.run_parts(tmp_path, parts(QUICK)[:1], sys.exit, 0)


LONG = """
import os, sys, time
from pathlib import Path
from emf.paper.parts import QUICK, Part, parts
from emf.paper.runs import run_parts

out = Path(sys.argv[1])

def work(part):
    (out / "number").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    run_parts(out, [Part("long", parts(QUICK)[0].config)], work, 1)
"""


def test_a_part_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """Else it would train on beside the same command called again."""
    (tmp_path / "long.py").write_text(LONG)
    command = subprocess.Popen([sys.executable, tmp_path / "long.py", tmp_path])
    number = tmp_path / "number"
    until = time.monotonic() + 120
    while not (number.is_file() and number.read_text()):
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    command.kill()
    command.wait()
    of = psutil.Process(int(number.read_text()))
    while not ended(of):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_another_budget_and_another_folder_are_refused(quick: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other settings .*emf_steps was 2, is 5"):
        run_all(quick, replace(QUICK, emf_steps=5), 1)
    with alone(quick), pytest.raises(ValueError, match="paper: another process is at work in .*; wait for it"):
        run_all(quick, QUICK, 1)
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="something else"):
        run_all(tmp_path, QUICK, 1)


def test_a_record_is_gone_on_with(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs are not made again, but a base that a missing run starts from; and more seeds are no other budget."""
    write_paper(quick, QUICK)
    for name in ("results.json", "budget.json"):
        shutil.copy(quick / name, tmp_path)
    made: list[str] = []
    monkeypatch.setattr(running, "run_parts", lambda out, left, *_, **__: made.extend(part.name for part in left))
    names = ("base/trained/0", "emf/trained/0", "ablation/guidance in the target/0", "base/random/0")
    few = [p for p in parts(replace(QUICK, seeds=(0, 1))) if p.name in {*names, "base/trained/1"}]
    monkeypatch.setattr(paper_record, "parts", lambda budget: few)
    run_all(tmp_path, replace(QUICK, seeds=(0, 1)), 1)
    assert made == ["base/random/0", "base/trained/1"]
    made.clear()
    few.append(next(p for p in parts(QUICK) if p.name == "ablation/times x 1/0"))
    run_all(tmp_path, QUICK, 1)
    assert "base/trained/0" in made and "emf/trained/0" not in made
    again = json.loads((quick / "base/trained/0" / SCORES).read_text())
    again["1"]["overall"] = 0.123  # trained again for the ablation: the row of which the others stem stays
    for name in ("0", "0.old"):  # a folder that was put aside is none of a seed
        (tmp_path / "base/trained" / name).mkdir(parents=True)
        shutil.copy(quick / "base/trained/0/samples.npy", tmp_path / "base/trained" / name)
    (tmp_path / "base/trained/0" / SCORES).write_text(json.dumps(again))
    write_paper(tmp_path, QUICK)
    theirs, ours = (json.loads((folder / "results.json").read_text())["parts"] for folder in (quick, tmp_path))
    assert theirs == ours
    shutil.rmtree(tmp_path / "base")
    curve: dict[str, Any] = {"steps": [1], "error": [0.1], "at": [1], "score": {"1": [0.5], "2": [0.5], "4": [0.5]}}
    before = json.loads((tmp_path / "results.json").read_text())
    few_steps = before["parts"]["emf/trained/0"]["scores"]
    for row, said in (
        ({"scores": {"1": {}}}, "scores has no score of every task at 1 steps; repair or remove"),
        ({"scores": {}, "curve": {"at": [1]}}, "curve is no JSON object with steps, error, at, score"),
        ({"scores": {}, "curve": curve | {"score": {}}}, "curve is no JSON object with 1, 2, 4"),
        ({"scores": {}, "curve": curve | {"at": [1, 2]}}, "curve has lists of other lengths"),
        ({"scores": {}, "encoder": 3}, "encoder is no object of numbers"),
        ({"scores": {n: x for n, x in few_steps.items() if n != "2"}}, "has no scores at 2 steps; repair or remove"),
    ):
        rows = before | {"parts": {"emf/trained/0": row}}
        (tmp_path / "results.json").write_text(json.dumps(rows))
        with pytest.raises(ValueError, match=f"results.json, emf/trained/0,? {said}"):
            run_all(tmp_path, QUICK, 1)
    rows = before | {"parts": {"emf/trained/0": {"scores": few_steps, "curve": None, "encoder": None}}}
    (tmp_path / "results.json").write_text(json.dumps(rows))
    write_paper(tmp_path, QUICK)
    bare = {k: x for k, x in before["parts"]["base/trained/0"].items() if k != "encoder"}
    for tree, said in (
        (before | {"parts": {"base/trained/0": bare}}, "base/trained/0 has no encoder; repair or remove"),
        (before | {"parts": []}, r"has parts \[\]; expected an object.*; move it away"),
        (before | {"budget": before["budget"] | {"emf_steps": 200}}, "is of another budget than this folder; move it"),
    ):
        (tmp_path / "results.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=f"results.json,? {said}"):
            run_all(tmp_path, QUICK, 1)


def test_a_folder_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It told its seeds among its settings, and had results.json by figures, not by parts."""
    made: list[str] = []
    monkeypatch.setattr(running, "run_parts", lambda out, left, *_, **__: made.extend(part.name for part in left))
    (tmp_path / "budget.json").write_text(json.dumps(asdict(QUICK)))
    (tmp_path / "results.json").write_text('{"scores": {}, "encoders": {}, "curves": {}}')
    run_all(tmp_path, replace(QUICK, seeds=(0, 1)), 1)
    assert made == [part.name for part in parts(replace(QUICK, seeds=(0, 1)))]


def test_verdicts_can_say_no() -> None:
    """By Student's interval over seeds, of differences within a seed: one that lacks a run counts nowhere."""

    def tree(few: list[float], many: list[float]) -> dict[str, Any]:
        groups = (("emf/trained", few), ("base/trained", many))
        rows = {f"{g}/{seed}": {"scores": {"1": {"overall": x}}} for g, xs in groups for seed, x in enumerate(xs)}
        return {"budget": {"seeds": [*range(6)]}, "parts": rows}

    cases = {
        "agrees": ([0.6, 0.7, 0.6], [0.3, 0.3, 0.3, 0.9]),
        "does not": ([0.1, 0.2, 0.1], [0.3, 0.3, 0.3]),
        "not told apart": ([0.6, 0.4, 0.9], [0.3, 0.3, 0.3]),  # every seed says so, and yet
        "not run": ([], []),
    }
    told = {how: verdicts(Found(tree(*pair)))[0] for how, pair in cases.items()}
    assert {how: line[1] for how, line in told.items()} == {how: how for how in cases}
    assert told["agrees"][2] == "EMF 1 - FM 1: +0.333 [+0.190, +0.477]"  # 0.0577 / sqrt(3) * 4.303
    assert told["not told apart"][2].endswith("; 7 seeds would tell")
    # figures of few values often agree by chance, and Student's interval of them is a point
    alike = verdicts(Found(tree([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])))[0]
    assert alike[1:] == ("not told apart", "EMF 1 - FM 1: +0.250 in each of 3 seeds")
    assert verdicts(Found(tree(6 * [0.5], 6 * [0.25])))[0][1] == "agrees"  # six are no chance
    two = verdicts(Found(tree([0.6, 0.61], [0.3, 0.3])))[0]
    assert two[1] == "not told apart" and two[2].startswith("EMF 1 - FM 1: +0.305 [+0.241, +0.369]; 3 seeds")
    assert verdicts(Found(tree([0.6], [0.3])))[0][1:] == ("not told apart", "EMF 1 - FM 1: +0.300, one seed")


def test_how_many_seeds_would_tell() -> None:
    """The first number of which four in five draws have an interval that leaves 0 out."""
    gaps, rng = [0.3, 0.1, 0.6], np.random.default_rng(0)
    n = seeds_to_tell(gaps)
    assert n is not None

    def told(n: int) -> float:
        """Of drawn seeds with the mean and the spread of `gaps`."""
        drawn = rng.normal(np.mean(gaps), np.std(gaps, ddof=1), (4000, n))
        return float(np.mean([interval(own).low > 0 for own in drawn.tolist()]))

    assert told(n) > 0.78 and told(n - 1) < 0.8
    assert seeds_to_tell([0.3]) is None and seeds_to_tell([0.1, -0.1]) is None
