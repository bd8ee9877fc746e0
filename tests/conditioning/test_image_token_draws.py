"""Image tokens drawn from a language model: their distribution, and one generator a row."""

from __future__ import annotations

import pytest
import torch
from text_models import (
    CAPTIONS,
    QWEN,
    blip3o,
)
from transformers import TopKLogitsWarper, TopPLogitsWarper

from emf.conditioning.sampling import Sampling, distribution, pick


@pytest.mark.parametrize("top_k, top_p, temperature", [(7, 0.8, 1.0), (50, 0.5, 0.7), (3, 1.0, 1.0), (50, 1e-6, 1.0)])
def test_distribution_is_transformers_own(top_k: int, top_p: float, temperature: float) -> None:
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits / temperature))
    p, ids = distribution(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(torch.zeros(5, 50).scatter(1, ids, p), scores.softmax(-1))


def test_draws_have_the_distribution() -> None:
    logits, n = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)), 20000
    sampling = Sampling(top_k=10, top_p=0.9)
    p, ids = distribution(logits, sampling)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1))
    counts = pick(logits.expand(n, -1), uniform, sampling).bincount(minlength=20) / n
    torch.testing.assert_close(counts, torch.zeros(1, 20).scatter(1, ids, p)[0], atol=0.015, rtol=0)
    assert pick(logits, torch.tensor([1 - 2**-24]), sampling) == ids[0, (p > 0).sum() - 1]


def test_greedy_generation_is_transformers_own() -> None:
    encoder = blip3o(image_tokens=20)
    drawn = encoder.generate(CAPTIONS, torch.Generator(), Sampling(top_k=1))
    ids, mask = encoder.tokenize(CAPTIONS)
    plain = QWEN.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=20)
    assert torch.equal(drawn, plain[:, ids.shape[1] :])


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_generation_depends_on_its_own_generator_only() -> None:
    encoder = blip3o(image_tokens=20)
    few = Sampling(top_k=4)  # so few borders between tokens that rounding, which the batch changes, tips no draw
    together = encoder.generate(CAPTIONS, seeds(3, 4, 5), few)
    assert together.shape == (3, 20)
    assert torch.equal(encoder.generate(CAPTIONS[1:2], seeds(4), few)[0], together[1])
    assert not torch.equal(encoder.generate(CAPTIONS[1:2], seeds(6), few)[0], together[1])
    with pytest.raises(ValueError, match="2 generators for 3 captions"):
        encoder.generate(CAPTIONS, seeds(0, 1))
