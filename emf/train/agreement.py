"""That every rank of a run reads the same samples, and that a run which is resumed does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emf.data.feed import Feed
from emf.train.zero import gather
from emf.weights.checkpoints import read_made


def same_feed(make: Callable[[], Feed]) -> Feed:
    """The feed that `make` makes on each rank. Called on every rank, for each looks at the files by itself.

    Raises ValueError, the same on every rank, where one of them cannot make it, and where ranks would train on
    different samples, or at different sizes, at one step.
    """
    made: Feed | None = None
    fault, stamps = "", list[tuple[str, str]]()
    try:
        made = make()
        stamps = made.stamps
    except ValueError as error:
        fault = str(error)
    every = gather((fault, stamps))
    if fault := next((other for other, _ in every if other), ""):
        raise ValueError(fault)
    assert made is not None
    first = every[0][1]
    for rank, (_, others) in enumerate(every):
        if others != first:
            name = next((name for (name, a), (_, b) in zip(first, others, strict=False) if a != b), "its sources")
            raise ValueError(
                f"data: rank {rank} finds other samples, or other sizes of them, in {name} than rank 0; let every rank "
                "read the same files, and start again"
            )
    return made


def changed_samples(feed: Feed, checkpoint: Path) -> str:
    """The line to say where a source has other samples, or other sizes of them, than when a checkpoint was made: the
    order of samples goes on as another one; else empty. Checkpoints of before do not say what they had."""
    before = read_made(checkpoint).samples
    if not before or before == [stamp for _, stamp in feed.stamps]:
        return ""
    name = next((name for (name, a), b in zip(feed.stamps, before, strict=False) if a != b), "one of its sources")
    return (
        f"resume: {name} holds other samples, or other sizes of them, than when {checkpoint} was made; the run goes on "
        "with them, in another order"
    )
