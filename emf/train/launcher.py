"""DeepSpeed's launcher, seen from a rank: whether it is still there.

The command `deepspeed` starts a process that starts the ranks, and hands no signal on to it: SIGTERM ends the command
alone, and its ranks would train on without it. That second process does hand SIGTERM on, rank by rank, and kills what
has not ended within 30 seconds. torchrun hands it on too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil

EARLY: list[psutil.Process] = []
"""What this process came from when it began; where the command ends while the network is built, only this knows it."""
STARTS_RANKS = "deepspeed.launcher.launch"
COMMANDS = ("deepspeed", "ds", "deepspeed.launcher.runner")


def remember_launchers() -> None:
    """To be called as early in a process as can be."""
    EARLY[:] = launchers()


def launcher_left() -> Callable[[], bool]:
    """A question to be asked later: has the launcher ended that this process comes from? Never where DeepSpeed's did
    not start it."""
    processes = EARLY or launchers()
    return lambda: any(ended(p) for p in processes)


def launchers() -> list[psutil.Process]:
    """The process that started this machine's ranks, and on one machine the command above it; none where this process
    was started otherwise."""
    try:
        above = psutil.Process().parents()
        words = [p.cmdline() for p in above]
    except psutil.Error:
        return []
    at = next((i for i, said in enumerate(words) if STARTS_RANKS in said), None)
    if at is None:
        return []
    command = any(Path(word).name in COMMANDS for said in words[at + 1 : at + 2] for word in said)
    return above[at : at + 1 + command]


def ended(process: psutil.Process) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
