"""The bench of long runs measures the ratio that it says, and shows a run that ended."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.stability import CASES, RECORD, main, plot, ratios, shown
from emf.config import Config
from emf.files import read_json
from emf.train import loop
from emf_kernels import Dual


class Known(nn.Module):
    """u = 2 z + t, whose derivative along (v, 0, 1) is 2 v + 1."""

    def read(self, *captions: Tensor) -> tuple[Tensor, ...]:
        return captions

    def forward(self, z: Dual, t: Dual, r: Tensor, *_: tuple[Tensor, ...]) -> Dual:
        self.seen = t.primal, r, z
        u = 2 * z.primal + t.primal.reshape(-1, 1, 1, 1)
        return Dual(u, 2 * z.tangent + t.tangent.reshape(-1, 1, 1, 1))


def test_the_ratio_is_of_the_tangent_to_the_value() -> None:
    network = Known()
    got = ratios(network)
    t, r, z = network.seen
    u, u_dot = 2 * z.primal + t.reshape(-1, 1, 1, 1), 2 * z.tangent + 1
    want = (u_dot.square().mean((1, 2, 3)) / u.square().mean((1, 2, 3))).sqrt()
    assert (r < t).all()
    torch.testing.assert_close(got, want)
    assert torch.equal(got, ratios(network))  # the same pictures, noise and times for every checkpoint


def test_the_record_has_every_run_to_its_end_or_its_fault() -> None:
    record = read_json(RECORD)
    assert [(run["embedder_init"], run["time_scale"]) for run in record["runs"]] == list(CASES)
    for run in record["runs"]:
        assert run["fault"] or run["rows"][-1]["step"] == record["steps"]
        assert all(math.isfinite(row[name]) for row in run["rows"] for name in ("median", "most", "error", "gradient"))


def test_a_run_that_ended_is_shown_with_its_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = dict(step=1000, median=0.5, most=2.0, error=0.1, gradient=3.0)
    runs: list[dict[str, Any]] = [dict(embedder_init="duplicate", time_scale=1000.0, fault="not finite", rows=[row])]
    runs.append(runs[0] | dict(fault="not finite at once", rows=[]))  # before the first checkpoint
    plot(runs, tmp_path / "stability.png")
    shown(runs)
    said = capsys.readouterr().out
    assert "not finite" in said and said.count("–") == 6
    assert (tmp_path / "stability.png").stat().st_size > 5000


def test_a_run_that_was_asked_to_stop_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on with it; a part of a run would stand in the record as the whole of one."""

    def stopped(config: Config, out: Path, **_: object) -> None:
        reached = config.steps if out.name == "base" else config.steps // 2
        (out / "checkpoints" / f"step_{reached:07d}").mkdir(parents=True)

    monkeypatch.setattr(loop, "train", stopped)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "runs"), "--steps", "40", "--record", str(tmp_path / "record.json")])
    assert not (tmp_path / "record.json").exists()


def test_a_record_of_another_length_is_not_replaced(tmp_path: Path) -> None:
    record = tmp_path / "stability.json"
    record.write_text('{"steps": 20000, "batch": 8, "runs": []}')
    with pytest.raises(ValueError, match=r"stability: .*stability\.json has steps 20000, not 10; move it away"):
        main(["--steps", "10", "--record", str(record), "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
