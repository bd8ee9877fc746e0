"""Pretrained weights into the model with two time embedders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emf.model.transformer import Transformer, TransformerConfig
from emf.weights.branches import PREFIX, add_time_branches

SINGLE = TransformerConfig(3, 3, 4, 16, 2, 1, 64, 12, 2.5, 2, 4)


def dual(scale: float) -> TransformerConfig:
    return replace(SINGLE, dual_time=True, time_scale=scale)


@pytest.fixture(scope="module")
def base() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SINGLE)


def weights(base: Transformer) -> dict[str, Tensor]:
    return {f"transformer.{k}": v for k, v in base.state_dict().items()}


def converted(base: Transformer, scale: float, how: str) -> Transformer:
    network = Transformer(dual(scale))
    state = add_time_branches(weights(base), network.config, how)
    network.load_state_dict({k.removeprefix("transformer."): v for k, v in state.items()})
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """z, t, c."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 4, 4, generator=g), torch.linspace(0.02, 1, 6), torch.randn(6, 3, 12, generator=g)


@torch.no_grad()
def off(base: Transformer, scale: float, how: str) -> float:
    """Relative L2 distance from the base's velocity at r = t."""
    z, t, c = inputs()
    want = base(z, t, None, c)
    return ((converted(base, scale, how)(z, t, t, c) - want).norm() / want.norm()).item()


@pytest.mark.parametrize("how", ["duplicate", "preserve"])
def test_only_the_two_branches_are_added(base: Transformer, how: str) -> None:
    before = weights(base)
    copies = {k: v.clone() for k, v in before.items()}
    after = add_time_branches(before, dual(1.0), how)
    assert before.keys() == copies.keys() and all(torch.equal(before[k], copies[k]) for k in copies)
    names = [k.removeprefix(PREFIX) for k in before if k.startswith(f"{PREFIX}.")]
    assert after.keys() - before.keys() == {f"{PREFIX}_{b}{k}" for b in "tr" for k in names}
    assert all(after[k] is before[k] for k in before)
    for name in names:
        end, interval, single = after[f"{PREFIX}_t{name}"], after[f"{PREFIX}_r{name}"], before[f"{PREFIX}{name}"]
        assert len({x.data_ptr() for x in (end, interval, single)}) == 3, f"{name} is shared"
        assert end.shape == interval.shape == single.shape and end.dtype == single.dtype
        if how == "duplicate":
            assert torch.equal(end, single) and torch.equal(interval, single)
    assert add_time_branches(after, dual(1.0), how) is after


def test_duplicate_sums_two_pretrained_embeddings(base: Transformer) -> None:
    """At time scale 1000 and r = t the modulation is m(t) + m(0) of the base."""
    network = converted(base, 1000.0, "duplicate")
    t, r = torch.tensor([0.3, 0.9]), torch.tensor([0.1, 0.9])
    want = [
        a + b for a, b in zip(base.embed_time(t, None, t.dtype), base.embed_time(t - r, None, t.dtype), strict=True)
    ]
    for x, y in zip(network.embed_time(t, r, t.dtype), want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("how", ["duplicate", "preserve"])
def test_the_pretrained_embedder_is_kept(base: Transformer, how: str) -> None:
    z, t, c = inputs()
    with torch.no_grad():
        torch.testing.assert_close(converted(base, 10.0, how)(z, t, None, c), base(z, t, None, c), rtol=0, atol=0)


def test_preserve_at_the_base_scale_is_the_base(base: Transformer) -> None:
    """Float32 rounding: there is nothing to fit."""
    assert off(base, 1000.0, "preserve") < 1e-6 < 0.05 < off(base, 1000.0, "duplicate")


@pytest.mark.parametrize(("scale", "residual"), [(100.0, 0.15), (10.0, 0.5), (1.0, 0.5)])
def test_preserve_at_another_scale_is_as_near_as_the_fit(base: Transformer, scale: float, residual: float) -> None:
    """A slow sinusoid cannot follow a fast one's detail; what is left is far less than what the copy does."""
    assert off(base, scale, "preserve") < min(residual, 0.6 * off(base, scale, "duplicate"))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_preserve_starts_without_the_interval(base: Transformer, scale: float) -> None:
    """r does not matter yet, and the interval's branch can learn: its last layers get gradients."""
    network = converted(base, scale, "preserve")
    z, t, c = inputs()
    torch.testing.assert_close(network(z, t, t / 2, c), network(z, t, t, c), rtol=0, atol=0)
    network(z, t, t / 2, c).square().sum().backward()
    layer = network.time_embed_r.emb["timestep_embedder"].linear_2
    assert layer.weight.grad.norm() > 0 and network.time_embed_r.linear.bias.grad.norm() > 0


def test_half_precision_weights_train_in_single() -> None:
    """What is shipped is float16."""
    half = {k: v.half() for k, v in weights(Transformer(SINGLE)).items()}
    after = add_time_branches(half, dual(1.0), "preserve")
    assert {v.dtype for v in after.values()} == {torch.float16}


def test_weights_without_a_time_embedding_are_refused() -> None:
    with pytest.raises(ValueError, match="time_embed"):
        add_time_branches({"transformer.proj_out.weight": torch.zeros(2)}, dual(1.0), "duplicate")
