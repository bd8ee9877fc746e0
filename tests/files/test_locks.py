"""One process at a time works in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from emf.files import alone
from emf.files.locks import lock_folder


def test_a_second_one_is_told_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with alone(out, "taken"):
        for _ in range(2):  # nor does the one that was refused give the folder back
            with pytest.raises(ValueError, match="^taken$"), alone(out, "taken"):
                raise AssertionError
        assert out.is_dir()
    assert not out.exists()  # nothing was written there
    with alone(out, "taken"):
        (out / "file").touch()
    with alone(out, "taken"):
        assert [*out.iterdir()] == [out / "file"]


def test_a_second_one_waits_where_it_is_asked_to(tmp_path: Path) -> None:
    order = []

    def later() -> None:
        with alone(tmp_path):
            order.append("second")

    with ThreadPoolExecutor() as pool:
        with alone(tmp_path):
            waiting = pool.submit(later)
            with pytest.raises(TimeoutError):
                waiting.result(0.1)
            order.append("first")
        waiting.result(10)
    assert order == ["first", "second"]


def test_a_file_system_without_locks_is_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert lock_folder(tmp_path / "run") is None and (tmp_path / "run").is_dir()


def test_a_lock_on_a_folder_that_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, flock, calls = tmp_path / "run", fcntl.flock, list[int]()

    def removed_before(descriptor: int, how: int) -> None:
        if not calls:
            run.rmdir()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    descriptor = lock_folder(run)
    assert descriptor is not None and len(calls) == 2
    assert os.path.samestat(os.fstat(descriptor), run.stat())
    os.close(descriptor)


def test_who_waits_says_so_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, [held]).start()
    with alone(tmp_path):
        pass
    assert capfd.readouterr().err == f"waiting for another process that is at work in {tmp_path}\n"
