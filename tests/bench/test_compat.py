"""`make compat`: what it runs exists, what it installs, and how its table is renewed. No environment is made here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

from bench.compat import PAIRS, QUICK, constraints, counts, interpreter, renewed

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
