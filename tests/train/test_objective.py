"""What a step asks its network for, and how often."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from digits_run import small_config, small_network
from text_models import CAPTIONS, blip3o, gemma, image_ids
from tiny import tiny_sana
from torch import Tensor

from emf.conditioning.text import TextEncoder
from emf.config import ConditionConfig
from emf.flow_config import FlowConfig
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.recipes import digits
from emf.train.batch import Batch
from emf.train.objective import losses
from emf_kernels import Dual, primal


def small_batch(size: int = 2) -> Batch:
    """Four samples, two of them with a tangent, one of those without its condition."""
    t = torch.tensor([0.9, 0.8, 0.5, 0.4])
    ids, mask = torch.arange(1, 13).reshape(4, 3), torch.ones(4, 3, dtype=torch.bool)
    drop = torch.tensor([False, True, False, False])
    return Batch(*torch.randn(2, 4, 3, size, size), t, torch.cat([t[:2] / 2, t[2:]]), 2, ids, mask, drop)


def test_the_own_velocity_has_the_conditions_of_its_samples() -> None:
    """Of the first b, and none of the others."""
    seen: list[Tensor] = []
    batch = small_batch()

    class Network:
        def read(self, ids: Tensor, mask: Tensor, drop: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            return ids, mask

        def __call__(self, z: Any, t: Any, r: Tensor, states: tuple[Tensor, Tensor], drop: Tensor) -> Any:
            if not torch.is_grad_enabled():
                seen.extend([*states, drop])
            return Dual(primal(z) * 1, z.tangent * 1) if isinstance(z, Dual) else z * 1

    losses(replace(digits(), flow=FlowConfig(along="network")), Network(), batch, 0.5)
    assert [x.tolist() for x in seen] == [x[:2].tolist() for x in (batch.ids, batch.mask, batch.drop)]


class Rereading:
    """A network that reads the captions anew at every evaluation."""

    def __init__(self, network: TextToImage, batch: Batch) -> None:
        self.network, self.rows = network, (batch.ids, batch.mask)

    def read(self, *asked: Tensor, **how: Any) -> Any:
        return self.network.read(*asked, **how)

    def __call__(self, z: Any, t: Any, r: Tensor, states: Any, drop: Any = None, *, null: bool = False) -> Any:
        n = len(primal(t))
        drop = torch.ones(n, dtype=torch.bool) if null else drop
        return self.network.transformer(z, t, r, *self.network.encoder(*(x[:n] for x in self.rows), drop))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("which", ["digits", "blip3o", "gemma"])
def test_a_step_reads_its_captions_once(which: str, frozen: bool) -> None:
    """However often it evaluates the network: the losses, and every gradient, are those of a network that reads them
    each time. An encoder whose null condition is the caption "" reads that beside, where it is asked for; a frozen one
    once in all."""
    flow = FlowConfig(guidance=1.25, kappa=0.1, along="network")
    config, batch = replace(small_config(), flow=flow), small_batch(18)
    torch.manual_seed(0)
    if which == "digits":
        network = small_network(config)
    else:
        if which == "blip3o":
            encoder: Any = blip3o(freeze=frozen)
            config = replace(config, condition=ConditionConfig("blip3o", "none", ar_weight=0.5))
        else:
            encoder = TextEncoder(*gemma(), 40, instruction="Draw: ", freeze=frozen)
        network = TextToImage(encoder, Transformer(tiny_sana(caption_channels=encoder.channels, sample_size=18)))
        ids, mask = encoder.tokenize([*CAPTIONS, "a"], torch.cat([image_ids()[1], image_ids()[1][:1]]))
        batch = batch._replace(ids=ids, mask=mask)
    network, batch = deepcopy(network).double(), batch._replace(x=batch.x.double(), e=batch.e.double())
    encoder = network.encoder.requires_grad_(not frozen)
    model, rows = {"digits": "language_model", "blip3o": "decoder", "gemma": "model"}[which], list[int]()
    getattr(encoder, model).register_forward_hook(
        lambda _, args, kw, out: rows.append(len(kw["input_ids"])), with_kwargs=True
    )
    trained = [p for p in network.parameters() if p.requires_grad]
    found = []
    for asked in (network, Rereading(network, batch)):
        rows.clear()
        result = losses(config, asked, batch, 0.5)
        gradients = torch.autograd.grad(result.loss.sum(), trained, allow_unused=True)
        found.append((result.loss.detach(), result.further.get("lm_loss"), gradients, [*rows]))
    (loss, lm_loss, gradients, once), (want, lm_want, wanted, often) = found
    null = [1] if which == "gemma" else []
    assert once == [4, *null] and sum(often) == 18, "rows that the model read"
    torch.testing.assert_close((loss, lm_loss), (want, lm_want))
    assert [g is None for g in gradients] == [g is None for g in wanted]
    for g, w in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(g, w)
