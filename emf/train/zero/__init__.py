"""All of distribution: the DeepSpeed engine, its config, collectives, checkpoints, the moving average. The only folder
that imports deepspeed."""

from __future__ import annotations

import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# On a CPU DeepSpeed would compile a C++ all-reduce at start-up (a minute, a compiler, ninja); gloo's serves.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from emf.train.zero.engine import Engine  # noqa: E402
from emf.train.zero.group import gather, own_device, process_group  # noqa: E402
from emf.train.zero.settings import check_monitors, engine_config, exchanged, overruled  # noqa: E402
from emf.train.zero.sharing import shared  # noqa: E402

__all__ = [
    "Engine",
    "check_monitors",
    "engine_config",
    "exchanged",
    "gather",
    "overruled",
    "own_device",
    "process_group",
    "shared",
]
