"""Prompts from files, and prompts without some of their parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from analyzed import LONG
from image_files import write_folder

from emf.analyze.choices import Shortening, Unit
from emf.analyze.disentanglement import similarities
from emf.analyze.prompts import read_prompts, shorten, shortened, split_units
from emf.analyze.retrieval import mean_vector


@pytest.mark.parametrize("unit, count", [("word", 21), ("phrase", 6), ("sentence", 3)])
def test_units(unit: Unit, count: int) -> None:
    units = split_units(LONG, unit)
    assert len(units) == count and " ".join(units) == LONG


@pytest.mark.parametrize("unit", ["word", "phrase", "sentence"])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.99])
def test_deletion_keeps_order_and_fraction(unit: Unit, fraction: float) -> None:
    units = split_units(LONG, unit)
    numbered = " ".join(f"{i}{'. ' if unit == 'sentence' else ', '}" for i in range(len(units))).strip()
    seen = set()
    for seed in range(20):
        text = shorten(numbered, Shortening(unit, fraction), np.random.default_rng(seed))
        kept = [int(part.strip(",.")) for part in text.split()]
        removed = min(max(1, int(fraction * len(units) + 0.5)), len(units) - 1)
        assert kept == sorted({*kept}) and len(kept) == len(units) - removed
        assert not text.endswith(",")
        seen.add(text)
    assert len(seen) > 1


def test_shortening_is_a_function_of_the_seed() -> None:
    how = Shortening(repeats=3, seed=5)
    first = shortened([LONG, "word", LONG], how)
    assert first == shortened([LONG, "word", LONG], how) != shortened([LONG, "word", LONG], Shortening(repeats=3))
    assert [len(v) for v in first] == [3, 0, 3] and first[0] != first[2]
    for wrong in (dict(fraction=0), dict(fraction=1), dict(unit="letter"), dict(repeats=0)):
        with pytest.raises(ValueError, match=rf"analyze: (--)?{next(iter(wrong))} "):
            Shortening(**wrong)


def test_prompts_of_every_kind(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "prompts", {"b.txt": b"second\none \n", "a.txt": b"first"})
    assert read_prompts(folder) == (["first", "second one"], ["a", "b"])
    (folder / "c.txt").write_text(" ")
    with pytest.raises(ValueError, match=f"{folder}: 1 of 3 prompts are empty, c the first$"):
        read_prompts(folder)
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\n two words \n")
    assert read_prompts(lines) == (["one", "two words"], ["1", "3"])
    rows.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    assert read_prompts(rows)[0] == ["one", "two"]
    rows.write_text('{"prompt": "one"}\n{"id": 3}\n')
    for path, said in (
        (rows, "p.jsonl:2 is no JSON object"),
        (tmp_path / "none", "none does not exist; expected"),
    ):
        with pytest.raises(ValueError, match=said):
            read_prompts(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "empty")


def test_similarity_of_shortened_prompts_by_hand() -> None:
    full, short = np.array([[2.0, 0], [0, 1]]), np.array([[[1.0, 0], [1, 1]], [[1.0, 0], [0, 3]]])
    np.testing.assert_allclose(similarities(full, short), [[1, 0.5**0.5], [0, 1]])
    mean = mean_vector(full)
    # less (1, 1/2): (1, -1/2) with (0, -1/2)
    assert similarities(full, short, mean)[0, 0] == pytest.approx(0.25 / (1.25**0.5 * 0.5))
