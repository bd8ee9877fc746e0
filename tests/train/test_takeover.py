"""One process at a time trains in a folder; what a run says when it starts in one, and when it is interrupted."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training import files, metrics, train

pytest.importorskip("deepspeed")

from emf.config import to_json
from emf.recipes import digits
from emf.train import takeover
from emf.train.takeover import check_folder_of_run, own_folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """This process has the lock, as a run in the folder would."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, without a process group."""
    monkeypatch.setattr(takeover, "gather", lambda value: [value])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_in_the_folder_of_a_live_one(
    recipe: list[str], straight: Path, ranks: int, tmp_path: Path
) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    shutil.copytree(straight, run)
    fresh.mkdir()
    for out, flags in ((run, ["--resume", "True"]), (fresh, [])):
        before = files(out)
        with held(out):
            result = train(tmp_path, *recipe, "--out", str(out), *flags, ranks=ranks)
        (line,) = (line for line in result.text.splitlines() if line.startswith("error:"))
        assert line == f"error: train: another process is training in {out}; wait for it, or choose another --out"
        assert result.code == 2 and "Traceback" not in result.text and files(out) == before, result.text
    result = train(tmp_path, *recipe, "--out", str(fresh), "--steps", "1")
    assert result.code == 0, result.text  # nothing of the lock is left
    assert sorted(p.name for p in fresh.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]


def test_of_two_that_start_at_once_one_trains(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(train, tmp_path, *recipe, "--out", str(run), name=name) for name in "ab"]
        first, second = sorted((future.result() for future in both), key=lambda result: result.code)
    assert (first.code, second.code) == (0, 2), (first.text, second.text)
    assert "another process is training" in second.text or "holds a run already" in second.text, second.text
    assert metrics(run) == metrics(straight)


def test_a_run_that_was_written_before_the_lock_is_seen(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, lock = digits(), takeover.alone

    @contextmanager
    def late(out: Path, taken: str) -> Iterator[None]:
        with lock(out, taken):
            (out / "config.json").write_text(to_json(config))
            yield

    monkeypatch.setattr(takeover, "alone", late)
    with pytest.raises(ValueError, match="holds a run already"), own_folder(tmp_path / "run", config, False, 0):
        pass
    assert (tmp_path / "run" / "config.json").is_file()
    with held(tmp_path / "run"):  # it was given back
        pass


def test_a_folder_is_held_until_the_run_ends(alone: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with own_folder(run, digits(), False, 0) as saved:
        assert saved == [] and list(run.iterdir()) == []
        with pytest.raises(ValueError, match="another process is training"), own_folder(run, digits(), False, 0):
            pass
        assert run.is_dir()
    assert not run.exists()  # nothing was written there


def test_resuming_where_no_run_is_says_that_it_starts(recipe: list[str], tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path / "run"), "--steps", "1", "--resume", "True"]
    said = f"{tmp_path / 'run'} holds no checkpoint to continue from; the run starts at step 0"
    result = train(tmp_path, *recipe, *flags, ranks=2)
    assert result.code == 0 and result.text.splitlines().count(said) == 1, result.text
    result = train(tmp_path, *recipe, *flags)
    assert result.code == 0 and "holds no checkpoint" not in result.text, result.text  # it is there now


def test_what_no_checkpoint_tells_of_is_kept(tmp_path: Path) -> None:
    """A folder's config.json is of something else, or of a run with other settings."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(
        ValueError, match=r"^train: .*config.json is of something else than a run; choose another --out"
    ):
        check_folder_of_run(tmp_path, [], digits(), resume=True)
    (tmp_path / "config.json").write_text(to_json(digits()))
    check_folder_of_run(tmp_path, [], digits(), resume=True)
    with pytest.raises(ValueError, match=r"^resume: .* is of another run \(seed differ\)"):
        check_folder_of_run(tmp_path, [], replace(digits(), seed=1), resume=True)
    other = replace(digits(), data=replace(digits().data, size=64, workers=3))
    with pytest.raises(ValueError, match=r"^resume: .* is of another run \(data.size differ\)"):
        check_folder_of_run(tmp_path, [], other, resume=True)


def _interrupt(step: int) -> None:
    from emf.train.loop import Training

    run = Training.step

    def interrupted(self: Training, number: int, coming: Any) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return run(self, number, coming)

    Training.step = interrupted  # type: ignore[method-assign]


def _interrupt_2() -> None:
    _interrupt(1)


def _interrupt_5() -> None:
    _interrupt(4)


def test_ctrl_c_promises_what_there_is(recipe: list[str], tmp_path: Path) -> None:
    for before, said in (
        (_interrupt_2, "interrupted; no checkpoint was written"),
        (_interrupt_5, "interrupted; --resume continues from the last checkpoint"),
    ):
        result = train(tmp_path, *recipe, "--out", str(tmp_path / before.__name__), before=before)
        assert result.code == 130 and result.text.splitlines()[-1] == said, result.text
