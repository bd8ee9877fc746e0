"""Ranks that read other samples than one another, and a run that is resumed on other samples than before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, noise, write_folder

pytest.importorskip("deepspeed")

from emf.data import images
from emf.data.batches import Batches, DataConfig
from emf.data.feed import Feed, feed
from emf.files import image_size
from emf.train import agreement
from emf.train.agreement import changed_samples, same_feed
from emf.weights.checkpoints import Made, write_checkpoint

SHAPES = {"a": (40, 40), "b": (60, 30), "c": (60, 30)}


class Words:
    """An encoder that is not asked."""


def fed(folder: Path, buckets: bool = True) -> Feed:
    data = DataConfig((str(folder),), 32, buckets=buckets, workers=1)
    return feed(Batches(0, 2, (3, 32, 32), data), Words(), torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {f"{name}.png": encoded(noise(0, *shape)) for name, shape in SHAPES.items()}
    return write_folder(tmp_path / "x", files | {f"{name}.txt": b"words" for name in SHAPES})


def test_ranks_that_read_other_sizes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fed(folder)

    def beside(other: Any) -> None:
        monkeypatch.setattr(agreement, "gather", lambda own: [other, own])

    beside(("", whole.stamps))
    assert same_feed(lambda: fed(folder)).stamps == whole.stamps  # the same files, read again

    def failing(data: bytes) -> tuple[int, int]:
        if (size := image_size(data)) == SHAPES["a"]:
            raise ValueError("file cannot be read: a hiccup")
        return size

    with monkeypatch.context() as patched:
        patched.setattr(images, "image_size", failing)
        with pytest.raises(ValueError) as refused:
            same_feed(lambda: fed(folder))
    assert str(refused.value) == (
        f"data: rank 1 finds other samples, or other sizes of them, in {folder} than rank 0; let every rank read the "
        "same files, and start again"
    )
    beside((f"data: no {folder}", []))
    with pytest.raises(ValueError, match=f"^data: no {folder}$"):  # of another rank, and said by this one too
        same_feed(lambda: whole)


@pytest.mark.parametrize("buckets", [True, False])
def test_a_run_on_other_samples_says_so(folder: Path, buckets: bool, tmp_path: Path) -> None:
    before = fed(folder, buckets)
    made = Made(3, 1, 0, samples=[stamp for _, stamp in before.stamps])
    (checkpoint := tmp_path / "step_0000003").mkdir()
    write_checkpoint(checkpoint, {"x": torch.zeros(1)}, "{}", made)
    assert changed_samples(fed(folder, buckets), checkpoint) == ""
    (folder / "b.png").write_bytes(encoded(noise(0, *SHAPES["a"])))
    assert bool(changed_samples(fed(folder, buckets), checkpoint)) == buckets  # squares have the order that they had
    (folder / "b.png").unlink()
    assert changed_samples(fed(folder, buckets), checkpoint) == (
        f"resume: {folder} holds other samples, or other sizes of them, than when {checkpoint} was made; the run goes "
        "on with them, in another order"
    )
    write_checkpoint(checkpoint, {"x": torch.zeros(1)}, "{}", Made(3, 1, 0))  # of before
    assert changed_samples(fed(folder, buckets), checkpoint) == ""


def test_a_stamp_is_of_all_that_an_order_hangs_on() -> None:
    class Held:
        def __init__(self, runs: list[int] | None, buckets: list[int]) -> None:
            self.counts, self.runs, self.buckets = [4], [runs], [np.array(buckets, np.int16)]

    every = [Held(None, [1, 2, 1, 3]), Held([2, 2], [1, 2, 1, 3]), Held(None, [1, 2, 3, 1]), Held(None, [1, 2, 1, -1])]
    assert len({tuple(images.stamps(held)) for held in every}) == 4  # type: ignore[arg-type]
