"""A network from the disk to every rank: rank 0 reads it, and the others get it from there. So the host of eight ranks
holds it once, in the format that is trained in, and under ZeRO 3 a rank holds little more than its part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from emf.model.text_to_image import TextToImage
from emf.train.zero.group import gather, own_device
from emf.train.zero.settings import refusals


def shared(
    load: Callable[[torch.dtype], TextToImage],
    empty: Callable[[torch.dtype], TextToImage],
    settings: dict[str, Any],
) -> TextToImage:
    """The network on every rank, on its device, in the dtype that it is trained in; under ZeRO 3 cut up already.

    load: the network with its weights, on the CPU; called on rank 0. empty: the same network without, its tensors on
    the meta device; called on the others. settings: the DeepSpeed dict (engine_config). deepspeed.initialize must
    follow: below ZeRO 3 it is what sends the weights of rank 0 to the others.
    Raises ValueError, the same on every rank, where one of them cannot make its network.
    """
    dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
    network, fault = None, ""
    try:
        network = (empty if dist.get_rank() else load)(dtype)
    except ValueError as error:
        fault = str(error)
    if faults := [other for other in gather(fault) if other]:
        raise ValueError(faults[0])
    assert network is not None
    for p in network.parameters():
        p.data = p.data.to(dtype)  # adapters are made in float32
    weights = [(name, tuple(p.shape), p.requires_grad) for name, p in network.named_parameters()]
    told = gather((weights, network.own_encoder))
    if any(others != weights for others, _ in told):
        raise RuntimeError("the ranks made different networks of one config")
    network.own_encoder = told[0][1]
    _share_buffers(network)
    if settings["zero_optimization"]["stage"] == 3:
        with refusals():
            _cut_up(network, settings, dtype)
    else:
        _fill(network)
        network.to(own_device())
    return network


def _share_buffers(network: nn.Module) -> None:
    """The buffers that some rank lacks, from rank 0: DeepSpeed sends weights alone."""
    lacking = [name for name, x in network.named_buffers() if x.is_meta]
    device = own_device()
    for name in sorted({name for names in gather(lacking) for name in names}):
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        x: Tensor = getattr(module, leaf)
        full = torch.empty_like(x, device=device) if x.is_meta else x.to(device)
        full = full.contiguous()
        dist.broadcast(full, 0)
        if x.is_meta:
            setattr(module, leaf, full)


def _fill(network: nn.Module) -> None:
    """Memory for the weights on the meta device, where this rank computes; a weight that two modules have stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if p.is_meta:
                if id(p) not in made:
                    made[id(p)] = _filled(p)
                setattr(module, name, made[id(p)])


def _filled(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(p, device=own_device()), requires_grad=p.requires_grad)


def _cut_up(network: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Every weight from rank 0 to all, each of which keeps its part; one weight after another, so that no rank but the
    first ever holds more than one of them whole."""
    first: Any = None
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(p) in made:
                setattr(module, name, made[id(p)])
                continue
            made[id(p)] = whole = _filled(p) if p.is_meta else p
            setattr(module, name, whole)
            if first is None:
                deepspeed.zero.Init(nn.ParameterList([whole]), config_dict_or_path=settings, dtype=dtype)
                first = whole
            else:
                first.convert_to_zero_parameters(param_list=[whole])
