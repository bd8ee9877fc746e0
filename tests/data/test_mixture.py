"""Which samples are in a batch: a function of seed, step and batch size alone, whatever is broken and for any number of
ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from image_files import by_reason, tar_and_folder, write_folder

from emf.data.draws import BLOCK
from emf.data.drops import Drops
from emf.data.images import Images
from emf.data.mixture import Dataset, Mixture
from emf.data.sources import Source


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return tar_and_folder(tmp_path_factory.mktemp("data"))


def test_an_epoch_is_a_permutation_and_the_next_another() -> None:
    order = Mixture([10], [1.0], 0)
    epochs = [[order[p][1] for p in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    other = Mixture([10], [1.0], 1)
    assert [other[p][1] for p in range(10)] != epochs[0]


def test_sources_are_drawn_by_weight_whatever_their_size() -> None:
    weights, n = [3.0, 1.0, 0.5], 20_000
    order = Mixture([50, 4000, 7], weights, 3)
    drawn = [order[p] for p in range(n)]
    count = Counter(source for source, _ in drawn)
    for source, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(count[source] / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    # of each source every index equally often, to one
    for source, size in enumerate(order.counts):
        seen = Counter(index for s, index in drawn if s == source)
        assert max(seen.values()) - min(seen.get(i, 0) for i in range(size)) <= 1
    # and the draws are not in turn: runs of one source occur
    assert any(a[0] == b[0] == c[0] == 2 for a, b, c in zip(drawn, drawn[1:], drawn[2:], strict=False))


def test_any_position_can_be_asked_for_first() -> None:
    order = Mixture([5, 9], [1.0, 2.0], 7)
    across = [order[p] for p in range(BLOCK - 50, BLOCK + 50)]
    count = Counter(order[p] for p in range(BLOCK + 50))
    fresh = Mixture([5, 9], [1.0, 2.0], 7)
    assert [fresh[p] for p in reversed(range(BLOCK - 50, BLOCK + 50))] == across[::-1]
    for source, size in enumerate([5, 9]):  # epochs go on from block to block
        times = [count[source, i] for i in range(size)]
        assert max(times) - min(times) <= 1


def test_the_order_is_the_one_it_was() -> None:
    """A change of these figures would break every resumed run."""
    order = Mixture([5, 9], [1.0, 2.0], 7)
    assert [order[p] for p in (0, 1, 2, 3, 100_000)] == [(1, 8), (1, 2), (1, 6), (0, 1), (1, 3)]


def keys(dataset: Dataset, step: int, batch_size: int, part: int = 0, parts: int = 1) -> list[str]:
    return [s.key for s in dataset.batch(step, batch_size, part, parts)]


def test_a_broken_sample_is_replaced_by_the_next(two_sources: list[Source]) -> None:
    images = Images(two_sources, 8)
    dataset = Dataset(images, seed=1)
    next_one = {(0, 3): (0, 5), (0, 4): (0, 5), (1, 6): (1, 0)}
    for step in range(8):
        wanted = [next_one.get(p, p) for p in (dataset.order[step * 6 + row] for row in range(6))]
        assert keys(dataset, step, 6) == [images.key(*p) for p in wanted]
    assert by_reason(images.drops) == {"corrupt image": 1, "empty image file": 1, "empty caption": 1}
    assert len(dataset) == 16


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_a_batch(ranks: int, two_sources: list[Source]) -> None:
    one = Dataset(Images(two_sources, 8), seed=5)
    several = [Dataset(Images(two_sources, 8), seed=5, workers=2) for _ in range(ranks)]
    for step in range(6):
        whole, parts = keys(one, step, 7), [keys(d, step, 7, r, ranks) for r, d in enumerate(several)]
        assert [whole[r::ranks] for r in range(ranks)] == parts


def test_a_resumed_run_goes_on_with_the_same_batches(two_sources: list[Source]) -> None:
    first, second, third = (Dataset(Images(two_sources, 8), 2) for _ in range(3))
    whole = [keys(first, step, 5) for step in range(9)]
    assert [keys(second, step, 5) for step in range(4, 9)] == whole[4:]
    assert [keys(third, step, 5) for step in (8, 0)] == [whole[8], whole[0]]
    images = [[s.image for s in Dataset(Images(two_sources, 8), 2).batch(4, 5)] for _ in range(2)]
    assert all(map(torch.equal, *images))


def test_a_source_of_nothing_usable_stops_with_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {f"{i}.{e}": b"" for i in range(3) for e in ("png", "txt")})
    with pytest.raises(ValueError, match="none of 3 samples can be used.*3 empty caption"):
        Dataset(Images([Source(str(folder))], 8)).batch(0, 2)


def test_a_long_run_tells_what_it_drops_when_that_has_doubled() -> None:
    drops = Drops()
    assert drops.news() == []
    told = []
    for i in range(9):
        drops.add(f"{i}.png", "a", "corrupt image")
        told += drops.news()
    assert [line.partition(" dropped")[0] for line in told] == [f"a: {n}" for n in (1, 2, 4, 8)]
    drops.add("x", "b", "no image")
    assert drops.news() == ["b: 1 dropped: no image: x"] and drops.news() == []
