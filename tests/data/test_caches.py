"""Several caches in one run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import pairs, write_folder
from torch import Tensor

from emf.data.batches import Batches, DataConfig
from emf.data.cache import write_cache
from emf.data.caches import Caches
from emf.data.feed import feed
from emf.data.images import Images
from emf.data.mixture import Dataset
from emf.data.sources import Source


class Words:
    """An encoder that keeps captions as they are."""

    def tokenize(self, captions: list[str], ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.captions = captions
        return torch.zeros(len(captions), 1), torch.ones(len(captions), 1, dtype=torch.bool)


def encode(images: Tensor) -> Tensor:
    return images[:, :, ::4, ::4]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a, b, c of pictures; a cache `ab` of the first two with weights 1 and 3, one `c` of the third."""
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate("abc"):
        write_folder(root / name, pairs(4 + number, 100 * number) | ({"0200.png": b"broken"} if name == "c" else {}))
    ab = [Source(str(root / "a"), 1.0), Source(str(root / "b"), 3.0)]
    write_cache(Images(ab, 16), encode, root / "cache-ab", encoder="small", shard=4)
    write_cache(Images([Source(str(root / "c"))], 16), encode, root / "cache-c", encoder="small", shard=4)
    write_cache(Images([Source(str(root / "c"))], 16), encode, root / "cache-other", encoder="another", shard=4)
    return root


def test_several_caches_give_the_batches_of_their_images(root: Path) -> None:
    """A cache's weight is shared out among its sources."""
    weights = {"a": 0.5, "b": 1.5, "c": 1.0}
    live = Dataset(Images([Source(str(root / name), weight) for name, weight in weights.items()], 16), seed=5)
    cached = Dataset(Caches([Source(str(root / "cache-ab"), 2.0), Source(str(root / "cache-c"))]), seed=5)
    assert len(cached) == len(live) == 15
    for step in range(12):
        one, two = live.batch(step, 4), cached.batch(step, 4)
        assert [(s.key, s.source, s.caption) for s in one] == [(s.key, s.source, s.caption) for s in two]
        for image, latent in zip(one, two, strict=True):
            assert image.image is not None and latent.mean is not None
            assert torch.equal(encode(image.image[None])[0], latent.mean)
    assert list(cached.drops.lines()) == list(live.drops.lines()) != []


def test_a_feed_takes_them(root: Path) -> None:
    sources = (f"{root}/cache-ab@2", f"{root}/cache-c")
    words, cpu = Words(), torch.device("cpu")
    made = feed(Batches(5, 4, (3, 4, 4), DataConfig(sources, workers=2)), words, cpu)
    x, *_ = made(3, 1, 2)
    caches = Caches([Source(str(root / "cache-ab"), 2.0), Source(str(root / "cache-c"))])
    want = Dataset(caches, seed=5).batch(3, 4, 1, 2)
    assert x.shape == (2, 3, 4, 4) and words.captions == [s.caption for s in want] and made.samples == 15


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("cache-c", "cache-other"), "caches of one run must agree: encoder is another in .*cache-other, and small in"),
        (("cache-c", "a"), "cache-c is a cache, and .*a is none"),
        (("cache-c@2@text",), "leave out @text"),
    ],
)
def test_what_does_not_go_together_is_one_line(sources: tuple[str, ...], message: str, root: Path) -> None:
    data = DataConfig(tuple(f"{root}/{name}" for name in sources))
    with pytest.raises(ValueError, match=f"^data: .*{message}"):
        feed(Batches(5, 4, (3, 4, 4), data), Words(), torch.device("cpu"))


def test_workers_are_at_least_one() -> None:
    with pytest.raises(ValueError, match=r"config: data.workers 0 must be at least 1"):
        DataConfig(workers=0)
