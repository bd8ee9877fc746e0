"""The method, in the paper's letters: times, path, losses, samplers. t = 1 is noise, t = 0 is data, r <= t.

z_t = (1 - t) x + t e,  v = e - x;  u(z_t, r, t) = 1/(t - r) int_r^t v dtau.
MeanFlow's identity (arXiv 2505.13447): u = v - (t - r) du/dt.
EMF (arXiv 2604.18168) schedules how far r lies from t with training progress.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from emf_kernels import Dual, meanflow, path, primal

Network = Callable[[Any, Any, Tensor | None], Any]
"""(z [B, C, H, W], t [B], r [B] or None) -> velocity [B, C, H, W]; Duals in, Dual out."""


@dataclass(frozen=True)
class FlowConfig:
    sampler: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the two draws whose larger is t and whose smaller is r."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How mean, spread and share move from their first to their second value with training progress."""
    mean: tuple[float, float] = (-0.5, 0.5)
    """Logit-normal location at progress 0 and 1."""
    spread: tuple[float, float] = (1.0, 2.0)
    """Logit-normal scale at progress 0 and 1."""
    share: tuple[float, float] = (0.25, 0.75)
    """Probability of r < t at progress 0 and 1."""
    weight_p: float = 1.0
    """Adaptive weight 1 / (L + c)^p of a sample with summed squared error L; 0 switches it off."""
    weight_c: float = 1e-3
    guidance: float = 1.0
    """Guidance w inside the target, so that a step of the sampler needs one evaluation and no extrapolation: v becomes
    w v + (1 - w) u(z, t, t | no condition), at one more forward without gradient a step (MeanFlow, arXiv 2505.13447,
    eq. 13 and 19). 1: none, as in EMF."""


def times(progress: float, n: int, flow: FlowConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """(t [n], r [n], b), float32: the first b samples have r < t, the others r = t. progress in [0, 1] (emf.md 1.3).

    b is n x share rounded at random to a whole number: the paper draws each sample's r = t by itself, which has the
    same mean and more spread.
    """
    s = min(max(progress, 0.0), 1.0)
    s = s if flow.schedule == "linear" else (1 - math.cos(math.pi * s)) / 2
    mean, spread, share = ((1 - s) * a + s * b for a, b in (flow.mean, flow.spread, flow.share))
    draws = torch.randn(2, n, generator=generator) * spread + mean
    draws = draws.sigmoid() if flow.sampler == "logit_normal" else torch.rand(2, n, generator=generator)
    t, r = draws.max(0).values, draws.min(0).values
    b = int(n * share + torch.rand((), generator=generator).item())
    return t, torch.cat([r[:b], t[b:]]), b


def flow_matching_loss(network: Network, x: Tensor, e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error), both [B]: || v_theta(z_t, t) - v ||^2, averaged over a sample's elements."""
    z, v = path(x, e, t)
    error = (network(z, t, None) - v).square().flatten(1).mean(1)
    return error, error.detach()


def meanflow_loss(
    network: Network, null: Network, x: Tensor, e: Tensor, t: Tensor, r: Tensor, b: int, flow: FlowConfig
) -> tuple[Tensor, Tensor]:
    """(weighted loss, mean squared error), both [B]: u_theta against v - (t - r) stopgrad(du/dt), by one dual pass.

    The tangent is (v, 0, 1) along (z, r, t), for the first b samples; in the others r = t multiplies it by zero, so
    they carry none. null, the network without its condition, is called for guidance inside the target only; samples
    whose condition was dropped have the same optimum with it as without.
    """
    z, v = path(x, e, t)
    if flow.guidance != 1:
        with torch.no_grad():
            v = flow.guidance * v + (1 - flow.guidance) * null(z, t, t)
    u = network(Dual(z, v[:b]), Dual(t, torch.ones_like(t[:b])), r)
    return meanflow(u.primal, u.tangent, v, t, r, flow.weight_p, flow.weight_c)


def guided(network: Network, null: Network, w: float) -> Network:
    """Classifier-free guidance: u_null + w (u - u_null); w = 1 is the network itself, without a second evaluation."""
    if w == 1.0:
        return network

    def both(z: Tensor, t: Tensor, r: Tensor | None) -> Tensor:
        u, u_null = network(z, t, r), null(z, t, r)
        return u_null + w * (u - u_null)

    return both


@torch.no_grad()
def sample(network: Network, z: Tensor, steps: int, average: bool = True) -> Tensor:
    """x [B, ...] from noise z [B, ...] in equal steps: z_r = z_t - (t - r) u(z_t, r, t) from t = 1 to 0.

    average False: Euler's method on the instantaneous velocity (r = None), the flow-matching baseline.
    """
    if steps < 1:
        raise ValueError(f"sample: {steps} steps; expected at least 1")
    grid = torch.linspace(1, 0, steps + 1, device=z.device)
    for t, r in zip(grid[:-1], grid[1:], strict=True):
        ends = t.repeat(z.shape[0]), r.repeat(z.shape[0])
        z = z - (t - r).to(z.dtype) * primal(network(z, ends[0], ends[1] if average else None))
    return z
