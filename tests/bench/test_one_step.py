"""The comparison of what lifts one step: what its record holds, and that it goes on with its own alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import one_step
from emf.files import write_json
from emf.paper.parts import Part
from emf.paper.runs import SCORES


def scored(out: Path, value: float, done: list[str]) -> Callable[..., None]:
    """In the place of run_parts: every part has a score at once."""

    def run(_: Path, parts: Sequence[Part], *__: Any, **___: Any) -> None:
        for part in parts:
            done.append(part.name)
            (out / part.name).mkdir(parents=True)
            write_json(out / part.name / SCORES, {str(n): {"overall": value} for n in one_step.COUNTS})

    return run


def test_the_record_goes_on_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, out, done = tmp_path / "record.json", tmp_path / "runs", list[str]()
    monkeypatch.setattr(one_step, "RECORD", record)
    for seed, value in ((0, 0.25), (1, 0.75)):
        monkeypatch.setattr(one_step, "run_parts", scored(out, value, done))
        one_step.main(["--out", str(out), "--seeds", "0", str(seed)] if seed else ["--out", str(out), "--seeds", "0"])
    assert len(done) == len({*done}) == 2 * len(one_step.MEANS)  # what is recorded is not made again
    assert capsys.readouterr().out.count("0.500 (0.250–0.750)") == len(one_step.MEANS) * len(one_step.COUNTS)
    tree = json.loads(record.read_text())
    assert [row["seed"] for row in tree["rows"]] == [0, 1] * len(one_step.MEANS)
    # another command records a seed meanwhile, and a mean of earlier versions keeps its row
    more = [
        dict(mean="as EMF", seed=7, scores={"1": 0.5}),
        dict(mean="gone", seed=0, scores={"1": 0.1, "2": 0, "4": 0}),
    ]

    def meanwhile(*_: Any, **__: Any) -> None:
        record.write_text(json.dumps(tree | {"rows": tree["rows"] + more}))

    monkeypatch.setattr(one_step, "run_parts", meanwhile)
    monkeypatch.setattr(one_step, "table", lambda rows: (("",), []))
    one_step.main(["--out", str(out), "--seeds", "0"])
    rows = json.loads(record.read_text())["rows"]
    assert more[0] in rows and rows[-1] == more[1] and len(rows) == len(tree["rows"]) + 2
    record.write_text(json.dumps(tree | {"captions": 300}))
    with pytest.raises(ValueError, match=r"one step: .*record\.json has captions 300, not 1200; move it away"):
        one_step.main(["--out", str(out)])


def test_every_mean_is_a_run_of_its_own() -> None:
    configs = [part.config for part in one_step.parts((0, 1))]
    assert len(configs) == len({repr(config) for config in configs}) == 2 * len(one_step.MEANS)


def test_runs_of_another_score_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those were that were scored on 300 captions."""
    monkeypatch.setattr(one_step, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(one_step, "run_parts", lambda *_, **__: None)
    write_json(tmp_path / "runs" / "settings.json", dict(steps=500, batch=32, captions=300, guidance=1.25))
    with pytest.raises(ValueError, match=r"one step: .*captions was 300, is 1200"):
        one_step.main(["--out", str(tmp_path / "runs")])
    assert not (tmp_path / "record.json").exists()
