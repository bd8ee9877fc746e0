"""Distribution matching beside MeanFlow's loss: pictures made in few steps are moved to where a frozen flow-matching
base would have more of them (DMD2, arXiv 2405.14867; beside a flow map's own loss as in rCM, arXiv 2510.08431).

MeanFlow's loss asks of u what its own derivative says; this asks whether the pictures that it draws look right. Two
flows tell: the frozen base, and a copy of it, the fake flow, that learns the flow of the pictures that are drawn now.
Their difference at a noised picture is the difference of the two scores there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emf.flow import Network, sample
from emf_kernels import path


def matching_loss(
    network: Network, real: Network, fake: Network, noise: Tensor, tau: Tensor, again: Tensor, *, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """(the term [k], whose gradient reaches the network alone; the fake flow's error [k], whose gradient reaches it
    alone), both float32.

    x, made of noise [k, C, H, W] in equal steps (emf.flow.sample), is noised again, by the noise `again`, to the times
    tau [k] in (0, 1). The two estimates of the clean picture there are z - tau v; x is moved by the difference of the
    real one's to the fake one's, divided by the root mean square of x's distance to the real one's, and the term is the
    mean square of that move. real may be guided.
    """
    x = sample(lambda z, t, r: network(z.to(noise.dtype), t, r).float(), noise.float(), steps)
    made = x.detach()
    z, v = path(made.to(noise.dtype), again, tau)
    flowed = fake(z, tau, None)
    error = (flowed - v).float().square().flatten(1).mean(1)
    with torch.no_grad():
        s = tau.reshape(-1, *[1] * (x.ndim - 1))
        theirs = real(z, tau, None).float()
        away = (made - (z.float() - s * theirs)).flatten(1).square().mean(1).sqrt()
        move = s * (flowed.float() - theirs) / (away + 1e-2).reshape(s.shape)
    return (x - (made + move)).flatten(1).square().mean(1), error
