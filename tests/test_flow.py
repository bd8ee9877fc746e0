"""Times, path, losses and samplers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny_sana
from torch import Tensor

from emf.flow import (
    FlowConfig,
    alpha_at,
    alpha_derivative,
    difference,
    guided,
    meanflow_loss,
    path,
    sample,
    target_velocity,
    times,
)
from emf.model.transformer import Transformer
from emf_kernels import Dual, primal


@pytest.mark.parametrize(
    ("progress", "share", "mean_t", "mean_gap"),
    [(0.0, 0.25, 0.51, 0.23), (0.5, 0.5, 0.66, 0.31), (1.0, 0.75, 0.75, 0.35)],
)
def test_times_follow_the_schedule(progress: float, share: float, mean_t: float, mean_gap: float) -> None:
    """The paper's code: E[t] of all, E[t - r] of the two draws before r = t is set."""
    g = torch.Generator().manual_seed(0)
    draws = [times(progress, 64, FlowConfig(), g) for _ in range(400)]
    b = torch.tensor([float(d[2]) for d in draws])
    assert all((t[:n] > r[:n]).all() and (t[n:] == r[n:]).all() for t, r, n in draws)
    assert abs(b.mean() / 64 - share) < 0.005
    assert abs(torch.cat([d[0] for d in draws]).mean() - mean_t) < 0.01
    assert abs(torch.cat([d[0][: d[2]] - d[1][: d[2]] for d in draws]).mean() - mean_gap) < 0.01


def test_share_is_exact_on_average_for_small_batches() -> None:
    g = torch.Generator().manual_seed(0)
    b = [times(0.0, 2, FlowConfig(), g)[2] for _ in range(4000)]
    assert set(b) == {0, 1} and abs(sum(b) / 8000 - 0.25) < 0.02


def test_uniform_and_cosine() -> None:
    g = torch.Generator().manual_seed(0)
    t, r, _ = times(0.0, 4000, FlowConfig(sampler="uniform", share=(1.0, 1.0)), g)
    assert abs(t.mean() - 2 / 3) < 0.02 and abs(r.mean() - 1 / 3) < 0.02
    quarter = [times(0.25, 1000, FlowConfig(schedule=s), g)[2] / 1000 for s in ("linear", "cosine")]  # type: ignore[arg-type]
    assert abs(quarter[0] - 0.375) < 2e-3 and abs(quarter[1] - (0.25 + 0.5 * (1 - 0.5**0.5) / 2)) < 2e-3


def test_path() -> None:
    x, e = torch.randn(2, 5, 3, 2, 2)
    z, v = path(x, e, torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75]))
    torch.testing.assert_close(z[0], x[0])
    torch.testing.assert_close(z[1], e[1])
    torch.testing.assert_close(z[3] - z[2], -0.25 * 0 + (0.75 * x[3] + 0.25 * e[3]) - (x[2] + e[2]) / 2)
    torch.testing.assert_close(v, e - x)


def test_path_keeps_the_time_in_bfloat16() -> None:
    x, e, t = torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([0.999])
    z, v = path(x.bfloat16(), e.bfloat16(), t)
    assert z.dtype == v.dtype == torch.bfloat16
    x = torch.full((1, 4), 256.0)
    torch.testing.assert_close(
        path(x.bfloat16(), -x.bfloat16(), torch.tensor([0.5005]))[0].float(),
        -0.256 * torch.ones(1, 4),
        rtol=0.01,
        atol=0,
    )


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_meanflow_loss_against_an_independent_computation(guidance: float) -> None:
    """On the real transformer: target by torch.func.jvp over all samples, weight and gradient by hand."""
    torch.manual_seed(0)
    net = Transformer(tiny_sana()).double()
    x, e, c = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 12).double()
    t = torch.tensor([0.9, 0.5, 0.7, 0.3]).double()
    r = torch.tensor([0.1, 0.4, 0.7, 0.3]).double()
    network, null = (lambda z, t, r, c=c: net(z, t, r, c) for c in (c, torch.zeros_like(c)))
    loss, error = meanflow_loss(network, null, x, e, (t, r, 2), FlowConfig(guidance=guidance))
    loss.sum().backward()
    got = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    z, v = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * e, e - x
    v = (guidance * v + (1 - guidance) * null(z, t, t)).detach()
    _, u_dot = torch.func.jvp(lambda z, r, t: net(z, t, r, c), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    u = net(z, t, r, c)
    squares = (u - (v - (t - r)[:, None, None, None] * u_dot).detach()).square()
    weight = 1 / (squares.sum((1, 2, 3)).detach() + 1e-3)
    torch.testing.assert_close(loss, weight * squares.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(error, squares.mean((1, 2, 3)).detach(), rtol=1e-9, atol=1e-9)
    (weight * squares.sum((1, 2, 3))).sum().backward()
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-8, atol=1e-10, msg=name)


def decay(average: bool) -> Any:
    """dz/dt = z: v = z; the exact average velocity over [r, t] is z (1 - exp(r - t)) / (t - r)."""

    def network(z: Tensor, t: Tensor, r: Tensor | None) -> Tensor:
        if r is None:
            return z
        gap = (t - r)[:, None]
        return z * (1 - torch.exp(-gap)) / gap

    return network


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampler_is_exact_where_u_is(steps: int) -> None:
    z = torch.randn(3, 5)
    torch.testing.assert_close(sample(decay(True), z, steps), z * torch.exp(torch.tensor(-1.0)), rtol=1e-5, atol=1e-6)


def test_euler_converges() -> None:
    z = torch.ones(1, 1)
    errors = [
        (sample(decay(False), z, n, average=False) - torch.exp(torch.tensor(-1.0))).abs().item() for n in (4, 40, 400)
    ]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]
    with pytest.raises(ValueError, match="steps"):
        sample(decay(False), z, 0)


def test_guidance() -> None:
    calls: list[str] = []

    def named(name: str, value: float) -> Any:
        return lambda z, t, r: calls.append(name) or torch.full_like(z, value)

    z = torch.zeros(1)
    assert guided(named("c", 3.0), named("null", 1.0), 1.0)(z, z, None) == 3 and calls == ["c"]
    assert guided(named("c", 3.0), named("null", 1.0), 2.0)(z, z, None) == 5


def test_a_dual_network_gets_a_tangent_for_the_first_samples_only() -> None:
    seen: list[Any] = []

    def network(z: Dual, t: Dual, r: Tensor) -> Dual:
        seen.append((z, t))
        return Dual(z.primal, z.tangent)

    x, e = torch.randn(2, 4, 2)
    t = torch.full((4,), 0.5)
    meanflow_loss(network, network, x, e, (t, torch.cat([t[:1] / 2, t[1:]]), 1), FlowConfig())
    z, t = seen[0]
    assert z.tangent.shape == (1, 2) and t.tangent.tolist() == [1.0]


@pytest.fixture(scope="module")
def toy() -> Any:
    """(network, null, x, e, t, r) on the real transformer in float64; every r < t but the last."""
    torch.manual_seed(0)
    net = Transformer(tiny_sana()).double()
    x, e, c = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 12).double()
    t, r = torch.tensor([0.9, 0.5, 0.7, 0.3]).double(), torch.tensor([0.1, 0.2, 0.6, 0.3]).double()
    network, null = (lambda z, t, r, c=c: net(z, t, r, c[: len(primal(z))]) for c in (c, torch.zeros_like(c)))
    return network, null, x, e, t, r


def broadcast(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def test_guidance_with_kappa_in_its_interval(toy: Any) -> None:
    """MeanFlow's equation 21, outside the interval the plain velocity."""
    network, null, x, e, t, r = toy
    z, v = path(x, e, t)
    flow = FlowConfig(guidance=0.6, kappa=0.5, guidance_interval=(0.4, 0.8))
    got = target_velocity(network, null, z, v, t, flow)
    want = 0.6 * v + 0.5 * network(z, t, t) - 0.1 * null(z, t, t)
    torch.testing.assert_close(got[1:3], want[1:3].detach())
    assert torch.equal(got[[0, 3]], v[[0, 3]]) and flow.built_in == pytest.approx(1.2)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("derivative", ["jvp", "difference", "alpha"])
def test_a_dropped_sample_has_no_guidance(toy: Any, derivative: Any, kappa: float) -> None:
    """The second: its loss is the one without guidance, and the others' do not change with it. As in the released codes
    of MeanFlow."""
    network, null, x, e, t, r = toy
    dropped = torch.tensor([False, True, False, False])
    how: dict[str, Any] = dict(derivative=derivative, alpha=(0.3, 0.3), guidance=1.5, kappa=kappa)
    flow, plain = FlowConfig(**how), FlowConfig(derivative=derivative, alpha=(0.3, 0.3))
    got, every, bare = (
        meanflow_loss(network, null, x, e, (t, r, 3), f, dropped=d)[1]
        for f, d in ((flow, dropped), (flow, None), (plain, None))
    )
    assert got[1] == bare[1] != every[1]
    assert torch.equal(got[[0, 2, 3]], every[[0, 2, 3]]) and (every[:3] != bare[:3]).all()


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_tims_difference_runs_along_the_path_with_guidance_too(toy: Any, guidance: float) -> None:
    """Central differences of u at x_t = (1 - t) x + t e, as in TiM's released code; the target's velocity is guided."""
    network, null, x, e, t, r = toy
    flow = FlowConfig(derivative="difference", guidance=guidance, weight_p=0.0)
    loss, _ = meanflow_loss(network, null, x, e, (t, r, 3), flow)

    def u(t: Tensor) -> Tensor:
        return network((1 - broadcast(t)) * x + broadcast(t) * e, t, r)

    z, v = path(x, e, t)
    v = guidance * v + (1 - guidance) * null(z, t, t)
    target = v - broadcast(t - r) * (u(t + 0.005) - u(t - 0.005)) / 0.01
    torch.testing.assert_close(loss, (u(t) - target.detach()).square().sum((1, 2, 3)))


def test_meanflows_tangent_runs_along_the_guided_velocity(toy: Any) -> None:
    network, null, x, e, t, r = toy
    loss, _ = meanflow_loss(network, null, x, e, (t, r, 3), FlowConfig(guidance=1.5, weight_p=0.0))
    z, v = path(x, e, t)
    v = (1.5 * v - 0.5 * null(z, t, t)).detach()
    u, u_dot = torch.func.jvp(lambda z, t: network(z, t, r), (z, t), (v, torch.ones_like(t)))
    want = (u - v + broadcast(t - r) * u_dot.detach()).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, want)


def test_v_loss_is_improved_meanflow(toy: Any) -> None:
    """|| u + (t - r) sg(du/dt) - v ||^2 with du/dt along the network's own velocity, its gradient too."""
    network, null, x, e, t, r = toy
    flow = FlowConfig(along="network", weight_p=0.0)
    loss, _ = meanflow_loss(network, null, x, e, (t, r, 3), flow)
    z, v = path(x, e, t)
    own = network(z, t, t).detach()
    u, u_dot = torch.func.jvp(lambda z, t: network(z, t, r), (z, t), (own, torch.ones_like(t)))
    want = (u + broadcast(t - r) * u_dot.detach() - v).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, want)
    plain, _ = meanflow_loss(network, null, x, e, (t, r, 3), FlowConfig(weight_p=0.0))
    assert (plain[:3] != loss[:3]).all() and plain[3] == loss[3]


@pytest.mark.parametrize(("derivative", "b", "asked"), [("jvp", 3, 3), ("jvp", 0, 1), ("difference", 3, 4)])
def test_the_own_velocity_is_computed_of_samples_that_need_it(toy: Any, derivative: Any, b: int, asked: int) -> None:
    """Of those with a tangent; of one where there is none, so that ranks call a network that is cut up alike."""
    network, null, x, e, t, r = toy
    seen: list[int] = []

    def watched(z: Any, t: Any, r: Any) -> Any:
        if not torch.is_grad_enabled() and torch.equal(t, r):
            seen.append(len(z))
        return network(z, t, r)

    meanflow_loss(watched, null, x, e, (t, r, b), FlowConfig(along="network", derivative=derivative))
    assert seen == [asked]


def test_a_difference_is_the_derivative_to_second_order(toy: Any) -> None:
    network, null, x, e, t, r = toy
    z, v = path(x, e, t)
    want = torch.func.jvp(lambda z, t: network(z, t, r), (z, t), (v, torch.ones_like(t)))[1].detach()
    # not of the first sample, which has a kink (a ReLU's) within the step
    far, near = ((difference(network, z, t, r, v, h) - want)[1:].norm() for h in (1e-3, 5e-4))
    assert near < 1e-3 * want.norm() and far / near == pytest.approx(4, rel=0.05)
    exact, _ = meanflow_loss(network, null, x, e, (t, r, 4), FlowConfig())
    close, _ = meanflow_loss(network, null, x, e, (t, r, 4), FlowConfig(derivative="difference", difference_step=1e-5))
    torch.testing.assert_close(close, exact, rtol=1e-6, atol=1e-6)


def test_alpha_flow_goes_from_flow_matching_to_meanflow(toy: Any) -> None:
    network, null, x, e, t, r = toy
    z, v = path(x, e, t)

    def gradient(flow: FlowConfig, progress: float) -> Tensor:
        w = torch.zeros(3, 4, 4, dtype=torch.float64, requires_grad=True)  # added to the network's output
        moved = lambda z, t, r: _plus(network(z, t, r), w)  # noqa: E731
        return torch.autograd.grad(meanflow_loss(moved, null, x, e, (t, r, 4), flow, progress=progress)[0].sum(), w)[0]

    alpha = FlowConfig(derivative="alpha", weight_p=0.0)
    u = network(z, t, r)
    torch.testing.assert_close(gradient(alpha, 0.0), 2 * (u - v).sum(0).detach())
    assert torch.equal(gradient(alpha, 1.0), gradient(FlowConfig(weight_p=0.0), 1.0))  # exactly MeanFlow in the end
    exact = torch.func.jvp(lambda z, t: network(z, t, r), (z, t), (v, torch.ones_like(t)))[1].detach()
    near = alpha_derivative(
        network, z, t, r, v, 1e-4
    )  # of u at z_s and s: its target is v - (t - r) du/dt as alpha -> 0
    target = lambda u_dot: v - broadcast(t - r) * u_dot  # noqa: E731
    error = lambda u_dot: (u - target(u_dot)).detach()[:3]  # noqa: E731
    torch.testing.assert_close(error(near) / 1e-4, error(exact), rtol=1e-2, atol=1e-2)
    half = alpha_derivative(network, z, t, r, v, 0.5)  # a shortcut: half a step by v, the rest by the network
    s = (t + r) / 2
    want = 0.5 * v + 0.5 * network(z - broadcast(t - s) * v, s, r).detach()
    torch.testing.assert_close((v - broadcast(t - r) * half)[:3], want[:3])


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.05])
def test_alpha_flow_is_weighted_as_written(toy: Any, alpha: float, p: float) -> None:
    """L / alpha without a weight; alpha L / (L + c) with the usual one, p = 1; as in MeanFlow where r = t (last)."""
    network, null, x, e, t, r = toy
    flow = FlowConfig(derivative="alpha", alpha=(alpha, alpha), weight_p=p, weight_c=0.5)
    loss, error = meanflow_loss(network, null, x, e, (t, r, 3), flow)
    z, v = path(x, e, t)
    s = alpha * r + (1 - alpha) * t
    target = (alpha * v + (1 - alpha) * network(z - broadcast(t - s) * v, s, r)).detach()
    target[3] = v[3]
    squares = (network(z, t, r) - target).square().sum((1, 2, 3))
    want = squares / (squares + 0.5) ** p
    want[:3] *= {0.0: 1 / alpha, 0.5: 1.0, 1.0: alpha}[p]
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(error, squares.detach() / 48)


def test_alpha_follows_the_released_schedule() -> None:
    """A sigmoid of slope 25 over the whole of training, from 1 to 0 and cut 0.005 before either."""
    flow = FlowConfig(derivative="alpha")
    at = [alpha_at(k / 100, flow) for k in range(101)]
    assert at[:29] == [1.0] * 29 and at[72:] == [0.0] * 29  # sigmoid(25 (0.5 - 0.29)) = 0.9948
    want = [1 / (1 + math.exp(25 * (k / 100 - 0.5))) for k in range(29, 72)]
    assert at[29:72] == pytest.approx(want, rel=1e-12) and at[50] == 0.5
    assert alpha_at(-1, flow) == 1 and alpha_at(2, flow) == 0
    assert alpha_at(0.5, FlowConfig(alpha=(0.8, 0.2))) == pytest.approx(0.5)
    assert alpha_at(0.9, FlowConfig(alpha=(0.004, 0.004))) == 0 and alpha_at(0.1, FlowConfig(alpha=(0.3, 0.3))) == 0.3


def test_at_alpha_1_nothing_but_the_velocity_is_asked(toy: Any) -> None:
    network, null, x, e, t, r = toy
    calls: list[Any] = []
    counted = lambda z, t, r: calls.append(r) or network(z, t, r)  # noqa: E731
    meanflow_loss(counted, null, x, e, (t, r, 3), FlowConfig(derivative="alpha"), progress=0.0)
    assert len(calls) == 1


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_alpha_flow_has_meanflows_gradient_towards_zero(toy: Any, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any weight, where c is too small to count, and alpha is not cut."""
    from emf import flow as module

    network, null, x, e, t, r = toy
    gradients = []
    monkeypatch.setattr(module, "alpha_at", lambda progress, flow: flow.alpha[0])
    for flow in (
        FlowConfig(derivative="alpha", alpha=(1e-4, 1e-4), weight_p=p, weight_c=1e-12),
        FlowConfig(weight_p=p, weight_c=1e-12),
    ):
        w = torch.zeros(3, 4, 4, dtype=torch.float64, requires_grad=True)
        moved = lambda z, t, r, w=w: _plus(network(z, t, r), w)  # noqa: E731
        loss, _ = meanflow_loss(moved, null, x, e, (t, r, 3), flow)
        gradients += torch.autograd.grad(loss.sum(), w)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


def _plus(u: Any, w: Tensor) -> Any:
    return Dual(u.primal + w, u.tangent) if isinstance(u, Dual) else u + w


def test_a_share_of_pairs_ends_at_zero() -> None:
    g = torch.Generator().manual_seed(0)
    t, r, b = times(1.0, 4000, FlowConfig(zero_share=0.2), g)
    assert (r[:b] == 0).double().mean() == pytest.approx(0.2, abs=0.03) and (r[b:] == t[b:]).all()


@pytest.mark.parametrize(
    "wrong",
    [dict(share=(0.1, 1.1)), dict(spread=(-1.0, 1.0)), dict(guidance=0.0), dict(kappa=1.0), dict(alpha=(1.0, -0.1)),
     dict(guidance_interval=(0.8, 0.2)), dict(difference_step=0.0), dict(weight_c=0.0), dict(zero_share=2.0)],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong: Any) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"flow.{name} .* must"):
        FlowConfig(**wrong)
