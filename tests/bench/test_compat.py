"""`make compat`: what it runs exists, what it installs, and how its table is renewed. No environment is made here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from bench import compat
from bench.compat import PAIRS, QUICK, commit, constraints, counts, interpreter, main, renewed, versions

PAGE = "a\n<!-- compat -->\n| h |\n|--|\n<!-- /compat -->\nb\n"
ROW = dict(Python="3.11.7", torch="2.11.0", triton="3.6.0", numpy="2.3.5", passed=5, failed=1, skipped=0)
ROW |= dict(date="2026-11-26", commit="abc")


def test_every_test_of_the_quick_part_exists() -> None:
    for test in QUICK:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).is_file(), test


def test_the_oldest_pair_is_what_setup_asks_for() -> None:
    text = (ROOT / "setup.py").read_text()
    python, torch = PAIRS[0].split(":")
    assert f'python_requires=">={python}"' in text and f'"torch>={torch.rpartition(".")[0]}"' in text


def test_constraints_are_those_of_the_torch() -> None:
    pinned = "numpy==2.4.6\nrich==15.0.0\nsetuptools==84.2.1\ntorch==2.13.0\ntriton==3.7.1\ntorchmetrics==1.9.0\n"
    assert constraints(pinned, "2.11.0") == "rich==15.0.0\ntorchmetrics==1.9.0\nnumpy<2.4\ntorch==2.11.0\n"
    assert constraints(pinned, "2.15.0") == "rich==15.0.0\ntorchmetrics==1.9.0\ntorch==2.15.0\n"


def test_a_row_takes_the_place_of_the_same_pair() -> None:
    once = renewed(PAGE, ROW)
    assert re.search(r"\n\| 3.11.7 \| 2.11.0 \| 3.6.0 \| 2.3.5 \| 5 \| 1 \| 0 \| 2026-11-26, abc \|\n<!-- /", once)
    both = renewed(once, ROW | dict(torch="2.15.0"))
    again = renewed(both, ROW | dict(failed=0, passed=6))
    assert again.count("\n| 3.11.7") == 2 and "| 2.3.5 | 6 | 0 |" in again and again.endswith("<!-- /compat -->\nb\n")
    assert renewed(again, ROW) == both


def test_pytests_counts(tmp_path: Path) -> None:
    file = tmp_path / "tests.xml"
    file.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert counts(file) == dict(passed=5, failed=2, skipped=2)


def test_a_python_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"no python9.9 on the PATH or in .*; install it, or name another pair"):
        interpreter("9.9")


def test_the_page_that_is_written_does_not_change_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=x", "-c", "user.email=x@y.example"]
        return subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "PAGE", tmp_path / "docs" / "compat.md")
    compat.PAGE.parent.mkdir()
    for file in (compat.PAGE, tmp_path / "code.py"):
        file.write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    now = git("rev-parse", "--short", "HEAD").strip()
    compat.PAGE.write_text("b")
    assert commit() == now
    (tmp_path / "code.py").write_text("b")
    assert commit() == now + "+"


def test_a_pair_that_fails_leaves_the_next_to_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "PLACE", tmp_path / "places")
    monkeypatch.setattr(compat, "PAGE", tmp_path / "compat.md")
    for name, text in (("constraints.txt", ""), ("setup.py", ""), ("compat.md", PAGE)):
        (tmp_path / name).write_text(text)
    tried = compat.tried
    monkeypatch.setattr(compat, "tried", lambda pair, now: ROW if pair == "3.11:2.11.0" else tried(pair, now))
    monkeypatch.setattr(compat, "interpreter", lambda version: "false")  # a Python that makes no environment
    monkeypatch.setattr("sys.argv", ["compat", "3.13:2.15.0", "3.11:2.11.0"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "| 3.11.7 | 2.11.0 |" in compat.PAGE.read_text()
    assert "error: compat: python3.13 made no environment in " in capsys.readouterr().err


def test_an_environment_that_lacks_a_package_is_one_line(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    with pytest.raises(ValueError, match=r"does not tell its versions \(.*PackageNotFoundError.*\); remove "):
        versions(tmp_path / "bin" / "python")
