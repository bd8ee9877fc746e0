"""The transformer: diffusers' weights and numbers, u_dot against torch.func.jvp, recompute of the primal only, memory
of the dual pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sana
import torch
from graph import kept
from torch import Tensor

from emf.model.transformer import Transformer, TransformerConfig
from emf_kernels import Dual

SMALL = TransformerConfig(**sana.OURS, patch_size=2, dual_time=True)


def batch(dtype: torch.dtype = torch.float64, n: int = 3) -> tuple[Tensor, ...]:
    """z, v, t, r, c, mask."""
    g = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, n, 4, 8, 8, generator=g, dtype=dtype)
    t = torch.rand(n, generator=g, dtype=dtype) * 0.5 + 0.5
    c, mask = torch.randn(n, 5, 20, generator=g, dtype=dtype), torch.arange(5)[None] < torch.tensor([5, 3, 4])[:n, None]
    return z, v, t, t / 2, c, mask


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("interpolation", [None, 1.0])
def test_agrees_with_diffusers(qk_norm: bool, patch: int, masked: bool, interpolation: float | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(SMALL, qk_norm=qk_norm, patch_size=patch, dual_time=False, interpolation_scale=interpolation)
    names = (
        "in_channels out_channels num_attention_heads attention_head_dim num_layers num_cross_attention_heads"
        " cross_attention_head_dim caption_channels mlp_ratio patch_size sample_size interpolation_scale"
    )
    sizes = {name: getattr(config, name) for name in names.split()}
    theirs = diffusers.SanaTransformer2DModel(
        **sizes, cross_attention_dim=config.channels, qk_norm="rms_norm_across_heads" if qk_norm else None
    )
    with torch.no_grad():
        for p in theirs.parameters():  # norms' weights and zero biases too
            p.add_(torch.randn_like(p) * 0.05)
    ours = Transformer(config)
    ours.load_state_dict(theirs.state_dict())  # strict
    theirs.load_state_dict(ours.state_dict())
    z, _, t, _, c, mask = batch(torch.float32)
    for latents in (z, z[:, :, :4], z[..., :2]):  # the square, and wide and tall pictures
        want = theirs(latents, c, t * 1000, encoder_attention_mask=mask.long() if masked else None).sample
        got = ours(latents, t, None, c, mask if masked else None)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("b", [0, 1, 2, 3])
def test_tangent_is_func_jvp(b: int) -> None:
    torch.manual_seed(1)
    net = Transformer(replace(SMALL, time_scale=10.0, interpolation_scale=1.0)).double()
    z, v, t, r, c, mask = batch()
    z, v = z[:, :, :4], v[:, :, :4]  # no square
    u = net(Dual(z, v[:b]), Dual(t, torch.ones_like(t[:b])), r, c, mask)
    want, want_dot = torch.func.jvp(lambda z, t: net(z, t, r, c, mask), (z, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(u.primal, want, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(u.tangent, want_dot[:b].detach(), rtol=1e-9, atol=1e-10)
    assert not u.tangent.requires_grad


def gradients(net: Transformer, b: int | None, args: tuple[Tensor, ...]) -> tuple[Any, dict[str, Tensor]]:
    z, v, t, r, c, mask = args
    net.zero_grad()
    u = net(z, t, r, c, mask) if b is None else net(Dual(z, v[:b]), Dual(t, torch.ones_like(t[:b])), r, c, mask)
    y = u if b is None else u.primal
    y.square().sum().backward()
    return u, {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("b", [None, 0, 2, 3])
def test_checkpointing_changes_nothing_but_memory(b: int | None) -> None:
    torch.manual_seed(2)
    plain = Transformer(SMALL).double()
    lean = Transformer(replace(SMALL, checkpointing=True)).double()
    lean.load_state_dict(plain.state_dict())
    (u, want), (w, got) = gradients(plain, b, batch()), gradients(lean, b, batch())
    for x, y in zip(u, w, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


def test_recompute_carries_no_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    from emf_kernels import adaln

    calls: list[int] = []
    dual = adaln.dual
    monkeypatch.setattr(adaln, "dual", lambda *args: calls.append(1) or dual(*args))
    net = Transformer(replace(SMALL, checkpointing=True))
    z, v, t, r, c, mask = batch(torch.float32)
    u = net(Dual(z, v), Dual(t, torch.ones_like(t)), r, c, mask)
    forward = len(calls)
    u.primal.sum().backward()
    assert forward == SMALL.num_layers + 1 and len(calls) == forward


def test_dual_pass_keeps_what_the_plain_pass_keeps() -> None:
    z, v, t, r, c, mask = batch(torch.float32)
    net, lean = (Transformer(replace(SMALL, num_layers=3, checkpointing=x)) for x in (False, True))
    plain = kept(net(z, t, r, c, mask))
    dual, recomputed = (kept(n(Dual(z, v), Dual(t, torch.ones_like(t)), r, c, mask).primal) for n in (net, lean))
    assert dual <= 1.02 * plain and recomputed < 0.5 * plain, (plain, dual, recomputed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(z=torch.zeros(3, 5, 8, 8)), "z is"),
        (dict(z=torch.zeros(3, 4, 7, 8)), "z is"),
        (dict(t=torch.zeros(2)), "t is"),
        (dict(t=torch.zeros(3, dtype=torch.bfloat16)), "float32"),
        (dict(c=torch.zeros(3, 5, 19)), "c is"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, Tensor], message: str) -> None:
    z, _, t, r, c, mask = batch(torch.float32)
    args = dict(z=z, t=t, r=r, c=c, mask=mask) | change
    with pytest.raises(ValueError, match=message):
        Transformer(SMALL)(**args)
    with pytest.raises(ValueError, match="dual_time"):
        Transformer(replace(SMALL, dual_time=False))(z, t, r, c, mask)
