"""What a step asks its network for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emf.flow_config import FlowConfig
from emf.recipes import digits
from emf.train.batch import Batch
from emf.train.objective import losses
from emf_kernels import Dual, primal


def test_the_own_velocity_has_the_conditions_of_its_samples() -> None:
    """Of the first b, and none of the others."""
    seen: list[Tensor] = []
    ids, mask = torch.arange(12).reshape(4, 3), torch.ones(4, 3, dtype=torch.bool)
    drop = torch.tensor([False, True, False, False])

    def network(z: Any, t: Any, r: Tensor, *condition: Tensor) -> Any:
        if not torch.is_grad_enabled():
            seen.extend(condition)
        return Dual(primal(z) * 1, z.tangent * 1) if isinstance(z, Dual) else z * 1

    config = replace(digits(), flow=FlowConfig(along="network"))
    t = torch.tensor([0.9, 0.8, 0.5, 0.4])
    batch = Batch(*torch.randn(2, 4, 3, 2, 2), t, torch.cat([t[:2] / 2, t[2:]]), 2, ids, mask, drop)
    losses(config, network, batch, 0.5)
    assert [x.tolist() for x in seen] == [x[:2].tolist() for x in (ids, mask, drop)]
