"""The method, in the paper's letters: times, path, losses, samplers. t = 1 is noise, t = 0 is data, r <= t.

z_t = (1 - t) x + t e,  v = e - x;  u(z_t, r, t) = 1/(t - r) int_r^t v dtau.
MeanFlow's identity (arXiv 2505.13447): u = v - (t - r) du/dt.
EMF (arXiv 2604.18168) schedules how far r lies from t with training progress.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emf.flow_config import FlowConfig
from emf_kernels import Dual, meanflow, path, primal

Network = Callable[[Any, Any, Tensor | None], Any]
"""(z [B, C, H, W], t [B], r [B] or None) -> velocity [B, C, H, W]; Duals in, Dual out. It knows each sample's
condition; of fewer samples than there are conditions, those are the first."""
Times = tuple[Tensor, Tensor, int]
"""(t [B], r [B], b): the first b samples have r < t, the others r = t."""


def seed_of(seed: int, number: int) -> int:
    """What seeds the part of that number: an image, or a training step, of everything that `seed` decides. Two seeds
    have no part in common while the numbers stay below 1,000,003."""
    return seed * 1_000_003 + number


def scheduled(pair: tuple[float, float], progress: float, flow: FlowConfig) -> float:
    """A setting at a training progress in [0, 1]."""
    s = min(max(progress, 0.0), 1.0)
    s = s if flow.schedule == "linear" else (1 - math.cos(math.pi * s)) / 2
    return (1 - s) * pair[0] + s * pair[1]


def times(progress: float, n: int, flow: FlowConfig, generator: torch.Generator) -> Times:
    """(t [n], r [n], b), float32: the first b samples have r < t, the others r = t. progress in [0, 1] (the
    schedule is EMF's, arXiv 2604.18168).

    b is n x share rounded at random to a whole number: the paper draws each sample's r = t by itself, which has the
    same mean and more spread.
    """
    mean, spread, share = (scheduled(pair, progress, flow) for pair in (flow.mean, flow.spread, flow.share))
    draws = torch.randn(2, n, generator=generator) * spread + mean
    draws = draws.sigmoid() if flow.sampler == "logit_normal" else torch.rand(2, n, generator=generator)
    t, r = draws.max(0).values, draws.min(0).values
    b = int(n * share + torch.rand((), generator=generator).item())
    if flow.zero_share:
        r = torch.where(torch.rand(n, generator=generator) < flow.zero_share, 0.0, r)
    return t, torch.cat([r[:b], t[b:]]), b


def flow_matching_loss(network: Network, x: Tensor, e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error), both [B]: || v_theta(z_t, t) - v ||^2, averaged over a sample's elements."""
    z, v = path(x, e, t)
    error = (network(z, t, None) - v).square().flatten(1).mean(1)
    return error, error.detach()


def meanflow_loss(
    network: Network,
    null: Network,
    x: Tensor,
    e: Tensor,
    when: Times,
    flow: FlowConfig,
    *,
    progress: float = 1.0,
    dropped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weighted loss, mean squared error), both [B]: u_theta against v - (t - r) stopgrad(du/dt), by one dual pass.
    when is (t, r, b), as `times` draws them.

    The tangent is (v, 0, 1) along (z, r, t), for the first b samples; in the others r = t multiplies it by zero, so
    they carry none. null, the network without its condition, is called for guidance inside the target only. dropped [B]
    bool: samples whose condition was dropped, which have no guidance.
    """
    t, r, b = when
    z, data = path(x, e, t)
    v = target_velocity(network, null, z, data, t, flow, dropped=dropped)
    scale = torch.ones_like(t)
    alpha = alpha_at(progress, flow) if flow.derivative == "alpha" else 0.0
    own = flow.along == "network"
    if flow.derivative != "difference" and not alpha:
        # MeanFlow's tangent runs along the velocity of its target, guidance included
        along = instantaneous(network, z, t, b) if own else v[:b]
        dual = network(Dual(z, along), Dual(t, torch.ones_like(t[:b])), r)
        u, u_dot = dual.primal, dual.tangent
    else:
        u = network(z, t, r)
        if flow.derivative == "difference":
            # TiM's runs along the path
            along = instantaneous(network, z, t, len(t)) if own else data
            u_dot = difference(network, z, t, r, along, flow.difference_step)
        else:
            u_dot = alpha_derivative(network, z, t, r, v, alpha)
            # Towards alpha 0 its error is alpha times MeanFlow's. Its squares L, divided by alpha, then have MeanFlow's
            # gradient, and the weight is MeanFlow's as alpha^2p / (L + c)^p: in all alpha L / (L + c) at p = 1, as in
            # alpha-Flow's released code. At r = t the target is v at any alpha.
            scale = torch.where(r < t, alpha ** (2 * flow.weight_p - 1), scale)
    loss, error = meanflow(u, u_dot, v, t, r, flow.weight_p, flow.weight_c)
    return scale * loss, error


@torch.no_grad()
def instantaneous(network: Network, z: Tensor, t: Tensor, b: int) -> Tensor:
    """v(z, t) = u(z, t, t) of the first b samples [b, ...]. Where b is 0 one is evaluated: under ZeRO 3 every rank must
    call the network as often as the others, whatever its b."""
    n = max(b, 1)
    return network(z[:n], t[:n], t[:n])[:b]


@torch.no_grad()
def target_velocity(
    network: Network, null: Network, z: Tensor, v: Tensor, t: Tensor, flow: FlowConfig, *, dropped: Tensor | None = None
) -> Tensor:
    """v with guidance inside the target (FlowConfig.guidance), where t lies in its interval; the plain v of samples
    whose condition was dropped, dropped [B] bool, as in MeanFlow's released code."""
    omega, kappa, (low, high) = flow.guidance, flow.kappa, flow.guidance_interval
    if omega == 1 and kappa == 0:
        return v
    guided = omega * v + (1 - omega - kappa) * null(z, t, t)
    if kappa:
        guided = guided + kappa * network(z, t, t)
    inside = (low <= t) & (t <= high)
    if dropped is not None:
        inside = inside & ~dropped
    return torch.where(inside.reshape(-1, *[1] * (v.ndim - 1)), guided, v)


@torch.no_grad()
def difference(network: Network, z: Tensor, t: Tensor, r: Tensor, along: Tensor, step: float) -> Tensor:
    """du/dt [B, ...] by a central difference along (along, 0, 1), one network evaluation to either side."""
    shift = step * along
    ends = [network(z + sign * shift, t + sign * step, r) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


def alpha_at(progress: float, flow: FlowConfig) -> float:
    """alpha-Flow's alpha at a training progress in [0, 1]: from the first value of flow.alpha to its second along a
    sigmoid, as in its released code. Less than 0.005 is 0, where MeanFlow's own target takes over; what lacks less than
    0.005 of 1 is 1."""
    s = 1 / (1 + math.exp(-25 * (min(max(progress, 0.0), 1.0) - 0.5)))
    alpha = (1 - s) * flow.alpha[0] + s * flow.alpha[1]
    return 0.0 if alpha < 0.005 else 1.0 if alpha > 0.995 else alpha


@torch.no_grad()
def alpha_derivative(network: Network, z: Tensor, t: Tensor, r: Tensor, v: Tensor, alpha: float) -> Tensor:
    """The du/dt [B, ...] with which MeanFlow's target is alpha-Flow's: alpha v + (1 - alpha) u(z_s, r, s), s = alpha r
    + (1 - alpha) t, z_s = z - (t - s) v (arXiv 2510.20771 and its released code; alpha 1 is trajectory flow matching,
    1/2 a shortcut model, towards 0 MeanFlow)."""
    if alpha == 1:
        return torch.zeros_like(z)
    s = alpha * r + (1 - alpha) * t
    shape = (-1, *[1] * (z.ndim - 1))
    near = network(z - (t - s).reshape(shape).to(z.dtype) * v, s, r)
    gap = (t - r).reshape(shape).to(z.dtype)
    return torch.where(gap > 0, (1 - alpha) * (v - near) / gap.clamp_min(1e-6), 0.0)


def guided(network: Network, null: Network, w: float) -> Network:
    """Classifier-free guidance: u_null + w (u - u_null); w = 1 is the network itself, without a second evaluation."""
    if w == 1.0:
        return network

    def both(z: Tensor, t: Tensor, r: Tensor | None) -> Tensor:
        u, u_null = network(z, t, r), null(z, t, r)
        return u_null + w * (u - u_null)

    return both


def sample(network: Network, z: Tensor, steps: int, average: bool = True) -> Tensor:
    """x [B, ...] from noise z [B, ...] in equal steps: z_r = z_t - (t - r) u(z_t, r, t) from t = 1 to 0.

    average False: Euler's method on the instantaneous velocity (r = None), the flow-matching baseline. Gradients go
    through every step; a caller that wants none says torch.no_grad().
    """
    if steps < 1:
        raise ValueError(f"sample: {steps} steps; expected at least 1")
    grid = torch.linspace(1, 0, steps + 1, device=z.device)
    for t, r in zip(grid[:-1], grid[1:], strict=True):
        ends = t.repeat(z.shape[0]), r.repeat(z.shape[0])
        z = z - (t - r).to(z.dtype) * primal(network(z, ends[0], ends[1] if average else None))
    return z
