"""Progress: bars on a terminal, lines in a log, and nothing of it where results are printed."""

from __future__ import annotations

import pytest

from emf.show import progress
from emf.show.progress import bars, count_bytes, minutes, track


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A line for each thing that is done, where stderr is no terminal."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return monkeypatch


def test_a_log_has_lines(every: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "data/[red]", 3)) == ["a", "b", "c"]
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) == 3
    assert lines[0].startswith("data/[red]: 1 of 3 after 0 s") and lines[2] == "data/[red]: 3 of 3 after 0 s"
    with bars() as bar:
        task = bar.add_task("waiting", total=None)
        bar.update(task, completed=2, description="going")
    assert capsys.readouterr().err == "going: 2 after 0 s\n"
    with count_bytes("writing", 3_000_000) as told:
        told(1_500_000)
    assert capsys.readouterr().err.startswith("writing: 1.5 MB of 3.0 MB after 0 s")


def test_a_line_comes_once_in_a_while(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    list(track(range(8), "drawing"))
    # the clock is asked once or twice a step: at 20 s a question a line is due at every second step or so
    assert 2 <= len(capsys.readouterr().err.splitlines()) < 8


def test_what_is_not_to_be_shown_is_not(every: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "x", disable=True)) == [0, 1, 2]
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    list(track(range(3), "data/[red]"))
    said = capsys.readouterr()
    assert said.out == "" and "data/[red]" in said.err and "3/3" in said.err


def test_times_in_words() -> None:
    assert [minutes(s) for s in (0.2, 40, 720, 12_600)] == ["0 s", "40 s", "12 min", "3.5 h"]
