"""A whole dual step of a network on a CPU, compiled to machine code: the numbers of the eager one. A minute of one
core, nearly all of it in the C++ compiler."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import tiny_sana
from torch import Tensor

from emf.flow import meanflow_loss
from emf.flow_config import FlowConfig
from emf.model.transformer import Transformer


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_a_compiled_dual_step_has_the_numbers_of_the_eager_one() -> None:
    torch.manual_seed(0)
    net = Transformer(tiny_sana())
    x, e, c = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.randn(3, 5, 12)
    t, r = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.5, 0.1, 0.7])

    flow = FlowConfig(weight_p=0.5)

    def step(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        velocity = lambda z, t, r: net(z, t, r, c)  # noqa: E731
        loss, error = meanflow_loss(velocity, velocity, x, e, (t, r, 2), flow)
        return loss.mean(), error

    torch._dynamo.reset()
    found = []
    for fn in (step, torch.compile(step, fullgraph=True, dynamic=False)):
        net.zero_grad()
        loss, error = fn(x, e)
        loss.backward()
        gradients = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
        found.append((loss.detach(), error, gradients))
    (loss, error, gradients), got = found
    assert torch.allclose(got[0], loss, rtol=1e-6) and torch.allclose(got[1], error, rtol=1e-5)
    assert got[2].keys() == gradients.keys()
    for name, want in gradients.items():
        assert (got[2][name] - want).norm() <= 2e-5 * want.norm(), name
