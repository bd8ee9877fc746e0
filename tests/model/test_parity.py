"""EMF's step at the 1.6B's width against diffusers' own class, from the same safetensors: velocity, du/dt, loss and
gradients, the reference in eager float64 by torch.func and without a line of ours."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf.flow import FlowConfig, meanflow_loss
from emf.weights.convert import convert
from emf.weights.converted import load_converted

diffusers = pytest.importorskip("diffusers")

SIZES: dict[str, dict[str, int]] = {
    "1.6B": {},  # diffusers' defaults: 2240 channels, 20 cross-attention heads of 112, states of 2304 channels
    "small": dict(num_attention_heads=4, num_cross_attention_heads=2, cross_attention_head_dim=64, caption_channels=24)
    | dict(cross_attention_dim=128),
}
Case = tuple[Any, Path]
"""diffusers' model, and the folder that emf convert has made of it."""


@pytest.fixture(scope="module", params=SIZES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """SANA at depth 1, converted from sharded safetensors as diffusers writes them."""
    torch.manual_seed(0)
    sizes = SIZES[request.param]
    model = diffusers.SanaTransformer2DModel(num_layers=1, qk_norm="rms_norm_across_heads", **sizes).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms' weights and zero biases too
            p.add_(torch.empty_like(p).uniform_(-0.03, 0.03))
    place = tmp_path_factory.mktemp("parity")
    whole = sum(p.numel() for p in model.parameters()) * 4
    model.save_pretrained(place / "sana" / "transformer", max_shard_size=whole // 2)
    assert len(list((place / "sana" / "transformer").glob("*.safetensors"))) > 1
    convert(place / "sana", place / "converted", shard_gb=whole / 3e9)
    return model, place / "converted"


def batch(model: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, e [3, 32, 2, 3]; t, r [3], the last with r = t; c [3, 7, C]."""
    g = torch.Generator().manual_seed(1)
    x, e = torch.randn(2, 3, 32, 2, 3, generator=g)
    t, r = torch.tensor([0.9, 0.6, 0.5]), torch.tensor([0.2, 0.5, 0.5])
    c = torch.randn(3, 7, model.config.caption_channels, generator=g)
    return x.to(dtype), e.to(dtype), t.to(dtype), r.to(dtype), c.to(dtype)


@torch.no_grad()
def test_velocity_of_the_base(case: Case) -> None:
    theirs, folder = case
    x, _, t, _, c = batch(theirs, torch.float32)
    network = load_converted(folder)[0]
    network.time_embed_t = network.time_embed_r = None  # the base's own times
    network.config = replace(network.config, dual_time=False)
    torch.testing.assert_close(network(x, t, None, c), theirs(x, c, t * 1000).sample, rtol=1e-4, atol=1e-4)


class TwoTimes(nn.Module):
    """Time embeddings of t and of t - r, added (arXiv 2604.18168); the timestep is [B, 2]: t, r."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.t, self.r = copy.deepcopy(one), copy.deepcopy(one)

    def forward(self, timestep: Tensor, **further: Any) -> tuple[Tensor, Tensor]:
        t, r = timestep[:, 0], timestep[:, 1]
        (shift, emb), (shift_r, emb_r) = self.t(t, **further), self.r(t - r, **further)
        return shift + shift_r, emb + emb_r


def independent_step(theirs: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(u, du/dt, loss [3], gradients by diffusers' names): the equations as printed, float64, p = 1, c = 1e-3."""
    model = copy.deepcopy(theirs).double()
    model.time_embed = TwoTimes(model.time_embed)
    x, e, t, r, c = batch(theirs, torch.float64)
    wide = (-1, 1, 1, 1)
    z, v = (1 - t.view(wide)) * x + t.view(wide) * e, e - x

    def u_of(z: Tensor, t: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            out: Tensor = model(z, c, torch.stack([t, r], 1)).sample
        return out

    with torch.no_grad():
        _, u_dot = torch.func.jvp(u_of, (z, t), (v, torch.ones_like(t)))
    target = v - (t - r).view(wide) * u_dot
    u = u_of(z, t)
    squared = (u - target).square().sum((1, 2, 3))
    loss = squared / (squared.detach() + 1e-3)
    loss.mean().backward()
    return u.detach(), u_dot, loss.detach(), {k: w.grad for k, w in model.named_parameters() if w.grad is not None}


def off(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def test_step_of_emf(case: Case) -> None:
    theirs, folder = case
    u, u_dot, loss, gradients = independent_step(theirs)
    small = theirs.config.num_attention_heads == 4
    # float32 throughout, or in diffusers' sinusoids alone
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)) if small else ((torch.float32, 1e-4),):
        ours = load_converted(folder, dtype)[0]
        ours.config = replace(ours.config, checkpointing=True)
        ours.time_embed.requires_grad_(False)
        x, e, t, r, c = batch(theirs, dtype)
        seen: list[Tensor] = []

        def network(z: Any, t: Any, r: Any, ours: Any = ours, c: Tensor = c, seen: list[Tensor] = seen) -> Any:
            u = ours(z, t, r, c)
            seen.extend((u.primal.detach(), u.tangent))
            return u

        got = meanflow_loss(network, network, x, e, (t, r, 2), FlowConfig())[0]
        got.mean().backward()
        pairs = dict(u=(seen[0], u), u_dot=(seen[1], u_dot[:2]), loss=(got.detach(), loss))
        errors = {name: off(a, b) for name, (a, b) in pairs.items()}
        assert max(errors.values()) < tolerance, errors
        names = {"time_embed_t.": "time_embed.t.", "time_embed_r.": "time_embed.r."}
        mine: dict[str, Tensor] = {}
        for name, w in ours.named_parameters():
            if w.grad is not None:
                for here, there in names.items():
                    name = name.replace(here, there)
                mine[name] = w.grad
        assert mine.keys() == gradients.keys()
        whole = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        apart = {name: (mine[name].double() - g).norm().item() / whole for name, g in gradients.items()}
        assert max(apart.values()) < tolerance, max(apart, key=lambda name: apart[name])
