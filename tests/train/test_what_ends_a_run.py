"""What ends a run is said by the rank that sees it, and after what was computed is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training import train

from emf.data import feed
from emf.train import loop


def _break_the_data_of_rank_1() -> None:
    whole = feed.Digits.__call__

    def broken(self: feed.Digits, step: int, part: int, parts: int) -> Any:
        if part == 1 and step == 3:
            raise ValueError("data: a.tar: none of 7 samples can be used")
        return whole(self, step, part, parts)

    feed.Digits.__call__ = broken  # type: ignore[method-assign]


def test_a_fault_that_one_rank_sees_is_said(recipe: list[str], tmp_path: Path) -> None:
    """The others learn that it has ended, and say no more than that."""
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), ranks=2, before=_break_the_data_of_rank_1)
    assert "error: rank 1: data: a.tar: none of 7 samples can be used\n" in result.text, result.text
    assert "error: rank 0: another rank has ended; what it said is what was wrong\n" in result.text, result.text
    assert result.code == 1 and "Traceback" not in result.text, result.text
    assert (tmp_path / "run" / "checkpoints" / "step_0000003" / "model.safetensors").is_file()


def _fail_in_validation() -> None:
    def fail(*_: object) -> None:
        raise ValueError("sample: no validation today")

    loop.Training.validate = fail  # type: ignore[assignment]


def test_a_step_is_saved_before_it_is_validated(recipe: list[str], tmp_path: Path) -> None:
    flags = ["--run.eval-every", "3", "--out", str(tmp_path / "run")]
    result = train(tmp_path, *recipe, *flags, before=_fail_in_validation)
    assert result.code == 2 and "error: sample: no validation today" in result.text, result.text
    assert (tmp_path / "run" / "checkpoints" / "step_0000003" / "model.safetensors").is_file()
