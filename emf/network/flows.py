"""The network that is trained together with the two flows of emf.matching, as one module: DeepSpeed shards, steps and
checkpoints all of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emf.config import Config
from emf.flow import guided
from emf.matching import matching_loss
from emf.model.layers import States
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer


class Matched(TextToImage):
    """A TextToImage with a frozen flow-matching transformer and the trained copy of it that is the fake flow."""

    def __init__(self, network: TextToImage, base: Transformer) -> None:
        """Raises ValueError where the text encoder is trained: the base knows the one that it was trained with."""
        super().__init__(network.encoder, network.transformer)
        self.own_encoder = network.own_encoder
        if any(p.requires_grad for p in network.encoder.parameters()):
            raise ValueError("config: match.weight needs a text encoder that is not trained; freeze it")
        if base.config.dual_time:
            raise ValueError("config: match.weight needs an --init of flow matching, not of few steps")
        self.fake = deepcopy(base).requires_grad_(True)
        self.base = base.requires_grad_(False)

    def matching(
        self, noise: Tensor, tau: Tensor, again: Tensor, read: States, *, guidance: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """See matching_loss, for k captions as TextToImage.read gave them."""
        with torch.no_grad():
            states = self.encoder.condition(read)
            null = self.encoder.null(read) if guidance != 1 else states

        def of(transformer: Transformer, states: Any) -> Any:
            return lambda z, t, r: transformer(z, t, r, *states)

        real = guided(of(self.base, states), of(self.base, null), guidance)
        return matching_loss(of(self.transformer, states), real, of(self.fake, states), noise, tau, again, steps=steps)


def with_flows(network: TextToImage, config: Config, base: Transformer | None = None) -> TextToImage:
    """The network with the two flows where the config asks for them, around the base that the run started from; none:
    one whose weights are on the meta device."""
    if not config.match.weight:
        return network
    if base is None:
        with torch.device("meta"):
            base = Transformer(replace(config.transformer, dual_time=False))
    return Matched(network, base.to(network.transformer.proj_out.weight.dtype))
