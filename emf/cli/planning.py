"""`emf plan`: what the command does."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from emf.recipes import BATCH


def plan(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    gpus: int = 8,
    memory: float = 80.0,
    *,
    gpu: str = "H100",
    resolution: int = 1024,
    micro_batch: int = 1,
    batch_size: int = BATCH,
    share: float = 0.5,
    mfu: float = 0.4,
    offload: bool = False,
) -> None:
    """Memory by ZeRO stage, operations and days of a run of a published model, before it is started.

    Args:
        model: sana-1.5-1.6b, sana-1.5-4.8b or blip3o-next-3b
        gpus: how many GPUs the run has
        memory: GiB of memory that each GPU has
        gpu: kind of GPU, A100, H100, H200 or B200, for the expected time
        resolution: pixels along a side of an image
        micro_batch: how many samples a GPU computes at once
        batch_size: how many samples an optimizer step sees
        share: share of the samples with r < t, which carry a tangent
        mfu: share of the data sheet's operations a second that the run is assumed to reach
        offload: keep the optimizer's states in the host's memory
    """
    from emf.train import plan as planning

    sizes: dict[str, Any] = dict(resolution=resolution, micro_batch=micro_batch, batch_size=batch_size, share=share)
    planning.show(planning.plan(model, gpus, memory, mfu=mfu, gpu=gpu, offload=offload, **sizes))
