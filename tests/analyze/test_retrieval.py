"""Retrieval against brute force, means with their intervals, and the scores by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emf.analyze.bootstrap import bootstrap
from emf.analyze.discriminability import chance, discriminability
from emf.analyze.retrieval import cosine, mean_vector, nearest


def brute_force(x: np.ndarray, image: np.ndarray, q: int, k: int, mean: np.ndarray | None) -> list[int]:
    """Every other image's caption by falling cosine, of equal ones the first."""
    x = x - (0 if mean is None else mean)
    near = [(-round(float(x[q] @ y / np.linalg.norm(x[q]) / np.linalg.norm(y)), 9), j) for j, y in enumerate(x)]
    return [j for _, j in sorted(n for n in near if image[n[1]] != image[q])][:k]


def captions_with_twins(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [60, 5], some twice, and their images, three captions each."""
    x = np.random.default_rng(seed).normal(size=(60, 5)).astype(np.float32) + 1
    x[40:50] = x[5:15]
    return x, np.arange(60) // 3


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_retrieval_is_brute_force_whatever_the_block(k: int, centred: bool) -> None:
    x, image = captions_with_twins()
    mean = mean_vector(x, 7) if centred else None
    if mean is not None:
        np.testing.assert_allclose(mean, x.astype(np.float64).mean(0))
    expected = [brute_force(x.astype(np.float64), image, q, k, mean) for q in range(60)]
    for block in (1, 7, 60, 1000):
        index, near = nearest(x, image, np.arange(60), k, mean=mean, block=block)
        assert index.tolist() == expected
        shift = 0 if mean is None else mean
        np.testing.assert_allclose(near, cosine((x - shift)[:, None], (x - shift)[index]), atol=2e-9)


def test_the_own_image_is_never_retrieved() -> None:
    x, image = captions_with_twins()
    x[image == 3] = x[9]  # its other captions say the same
    index, _ = nearest(x, image, np.arange(60), 57)
    assert (image[index] != image[:, None]).all()
    assert all(len({*row}) == 57 for row in index.tolist())
    with pytest.raises(ValueError, match="57 captions of other images, k is 58"):
        nearest(x, image, [0], 58)
    with pytest.raises(ValueError, match="0 queries"):
        nearest(x, image, [], 1)


def test_bootstrap_holds_the_mean_and_shrinks() -> None:
    x = np.random.default_rng(0).normal(3, 1, 2500)
    few, many = bootstrap(x[:100]), bootstrap(x)
    for made, n in ((few, 100), (many, 2500)):
        assert made.mean == pytest.approx(x[:n].mean()) and made.low < made.mean < made.high
        # the normal theory's interval
        assert made.high - made.low == pytest.approx(2 * 1.96 * x[:n].std() / n**0.5, rel=0.1)
    assert bootstrap(x) == many != bootstrap(x, seed=1)
    same = bootstrap([0.1] * 7)
    assert [same.low, same.mean, same.high] == pytest.approx([0.1] * 3) and same.low <= 0.1 <= same.high
    assert f"{bootstrap([])}" == "–" and f"{same}" == "0.100 [0.100, 0.100]"


def test_bootstrap_by_group_is_the_mean_of_means() -> None:
    made = bootstrap([1, 1, 1, 0, 0.5], ["a", "a", "a", "b", "b"])
    assert made.mean == pytest.approx((1 + 0.25) / 2)
    assert made.high <= (1 + 0.5) / 2 and made.low >= 0.5  # group a is constant


@pytest.mark.parametrize("wrong", [dict(level=1), dict(resamples=0), dict(groups=["a"])])
def test_bootstrap_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bootstrap: .*expected"):
        bootstrap([1.0, 2.0], **wrong)


def test_discriminability_by_hand() -> None:
    """Captions of two kinds; the encoder sees the kind, or a large common part and noise as well."""
    rng, kind = np.random.default_rng(0), np.arange(40) % 2
    text = np.stack([1 - kind, kind], 1) + 0.01 * rng.normal(size=(40, 2))
    features = np.stack([1 - kind, kind], 1).astype(np.float32)
    good = discriminability(text, np.arange(40), features)
    assert good.score.mean == pytest.approx(1) and len(good.each) == 40
    blind = discriminability(rng.normal(size=(40, 2)), np.arange(40), features, k=3)
    assert 0.2 < blind.score.mean < 0.8 and blind.score.low < blind.score.mean < blind.score.high
    assert chance(features, np.arange(40)) == pytest.approx(0.5, abs=0.2)
    # one caption an image queries, though each image has two
    twice = discriminability(np.repeat(text, 2, 0), np.repeat(np.arange(40), 2), features)
    assert len(twice.queries) == 40 and twice.score.mean == pytest.approx(1)


def test_centring_changes_what_it_should() -> None:
    """A common offset hides in the norm what tells captions apart; less the mean it plays no part."""
    x, image = captions_with_twins()
    features = np.random.default_rng(1).normal(size=(20, 4))
    shifted = x.astype(np.float64) + 50
    plain, moved = discriminability(x, image, features), discriminability(shifted, image, features)
    assert moved.text_cosine.min() > 0.99 and (plain.retrieved != moved.retrieved).any()
    centred = [discriminability(e, image, features, centred=True) for e in (x, shifted)]
    assert (centred[0].retrieved == centred[1].retrieved).all() and centred[0].score == centred[1].score
    assert (centred[0].retrieved != plain.retrieved).any()
