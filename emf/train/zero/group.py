"""The process group, however the processes were started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups

from emf.device import launched
from emf.errors import Unlaunched
from emf.files import why


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """(rank, world size) under the deepspeed launcher, torchrun, or alone. Destroys the group at exit. Raises
    Unlaunched where the ranks cannot meet."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    launched()
    before = dict(os.environ)
    if not os.environ.get("RANK"):
        # DeepSpeed looks for an address even where nothing listens: one process keeps its store to itself, since a port
        # that was free a moment ago may be another's by now.
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif lost := [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise Unlaunched(f"launch: RANK is set, {lost[0]} is not; start with deepspeed or torchrun, or unset RANK")
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # collectives of objects go through the current device
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except (dist.DistError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise Unlaunched(f"launch: rank {os.environ['RANK']} cannot meet the others at {place}: {why(error)}") from None
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
        # a further run of this process begins as this one did: by itself, with a group of its own
        deepspeed.comm.comm.cdb = None
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in before:
                os.environ.pop(name, None)


def own_device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks. Called on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
