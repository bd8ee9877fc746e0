"""Two commits' steps, interleaved (`make bench BASE=...`): the processes, and what is called slower."""

import subprocess

import pytest

from bench.compare import ROOT, compare, verdict


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.0] * 7, "same"),
        ([1.2] * 7, "slower"),
        ([0.8] * 7, "faster"),
        ([1.049] * 7, "same"),
        ([0.9, 0.9, 1.2, 1.2, 1.2, 1.2, 1.2], "same"),  # noise: the median alone would call it slower
        ([1.3, 1.3, 0.7, 0.7, 0.7, 0.7, 0.7], "same"),
    ],
)
def test_only_a_clear_difference_is_called_one(ratios, said):
    assert verdict(ratios) == said


def test_an_unknown_base_is_one_line():
    with pytest.raises(ValueError, match="no commit 'nowhere'"):
        compare("nowhere", "tiny", 1, ["fm"])


def test_a_commit_beside_itself():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("no git history here")
    before = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    ratios = compare("HEAD", "tiny", 2, ["fm", "dual 1", "nothing of that name"], lambda _: None)
    assert set(ratios) == {"fm", "dual 1"} and all(len(r) == 2 and min(r) > 0 for r in ratios.values())
    assert subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout == before
