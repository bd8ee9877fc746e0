"""The flows that the distribution-matching term needs, beside the network of a run."""

from __future__ import annotations

from dataclasses import replace

import torch

from emf.config import Config
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.network.matching import Matched
from emf.weights.folders import load_start


def matched(config: Config, network: TextToImage, empty: bool = False) -> TextToImage:
    """The network, with the base that the run started from and its copy where config.match asks for them; empty: their
    weights are on the meta device. A run that goes on takes the fake flow from its checkpoint. Raises ValueError where
    the start is not there, or is none of flow matching."""
    if not config.match.weight:
        return network
    if empty:
        with torch.device("meta"):
            base = Transformer(replace(config.transformer, dual_time=False))
    else:
        base = load_start(config).network.transformer
    return Matched(network, base.to(network.transformer.proj_out.weight.dtype))
