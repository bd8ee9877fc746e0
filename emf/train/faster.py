"""A transformer's blocks compiled (--compile) or replayed as CUDA graphs (--graphs) in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from emf.config import Config
from emf.model.layers import Block, Value
from emf.model.replay import Graphs
from emf.model.transformer import Transformer
from emf_kernels import Dual, primal

BACKEND = "inductor"


def check_quick(config: Config, engine: dict[str, Any], device: torch.device | None = None) -> None:
    """Raises ValueError where the blocks cannot run as the config asks, at the ZeRO stage and micro-batch of an
    engine's config, on a device, by default this machine's: before anything is built."""
    stage, micro_batch = engine["zero_optimization"]["stage"], engine["train_micro_batch_size_per_gpu"]
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.graphs:
        check_graphs(config, stage, micro_batch, device)
    if config.compile:
        check_compile(stage, device)


def quicken(transformer: Transformer, config: Config) -> None:
    """Let the blocks run as the config asks, where check_quick found that they can."""
    if config.graphs:
        transformer.graphs = Graphs(transformer.through, transformer.transformer_blocks)
    if config.compile:
        for block in transformer.transformer_blocks:
            block.forward = compiled(block)


def check_graphs(config: Config, stage: int, micro_batch: int, device: torch.device) -> None:
    why = ""
    if device.type != "cuda":
        why = "needs a GPU"
    elif stage == 3:
        why = "holds weights at fixed addresses, which ZeRO 3 frees; use zero.stage 0, 1 or 2"
    elif config.compile:
        why = "does not go with compile True; choose one"
    elif config.transformer.checkpointing:
        why = "does not go with transformer.checkpointing True, whose backward adds to the weights' gradients itself"
    elif micro_batch > 2:
        why = f"is for micro-batches of 1 or 2, not {micro_batch}: each number of samples with r < t has its own graph"
    if why:
        raise ValueError(f"config: graphs True {why}")


def check_compile(stage: int, device: torch.device) -> None:
    if stage == 3:
        raise ValueError(
            "config: compile True does not go with ZeRO 3, which fetches weights by hooks inside a block; use "
            "zero.stage 0, 1 or 2"
        )
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError("config: compile True needs a C++ compiler on a CPU; install g++ or clang") from None


def compiled(block: Block | nn.Module) -> Callable[..., Any]:
    """The forward of a block, compiled where it trains. All blocks share what is compiled, once for each b.

    Without gradient and tangent (validation, guidance in the target) it stays as it is: batches have other sizes there.
    """
    eager = block.forward
    fast = torch.compile(eager, fullgraph=True, dynamic=False, backend=BACKEND)

    def forward(x: Value, *args: Any) -> Any:
        if not isinstance(x, Dual) and not torch.is_grad_enabled():
            return eager(x, *args)
        if torch.is_grad_enabled() and not primal(x).requires_grad:
            # the first block's input, where the patches are not trained, would else need a graph of its own
            p = primal(x).detach().requires_grad_()
            x = Dual(p, x.tangent) if isinstance(x, Dual) else p
        return fast(x, *args)

    return forward
