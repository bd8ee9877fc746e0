"""Folders that one process at a time works in."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from emf.files.writing import make_folder


@contextmanager
def alone(out: Path, taken: str | None = None) -> Iterator[None]:
    """No other process that asks for it works in the folder `out` while the block runs, where the file system has
    locks. The folder is made where it is missing; then it goes again if nothing was written there.

    taken: what the error says where another process is at work there; None: wait until it has ended. Raises
    ValueError, and where the folder cannot be made.
    """
    there = out.exists()
    held = lock_folder(out, taken)
    try:
        yield
    finally:
        if not there:
            with suppress(OSError):
                out.rmdir()  # which only an empty folder can be
        if held is not None:
            fcntl.flock(held, fcntl.LOCK_UN)  # processes that were forked have the descriptor too
            os.close(held)


def lock_folder(out: Path, taken: str | None = None) -> int | None:
    """Make the folder `out` where it is missing, and lock it against other processes: the descriptor that holds the
    lock, which the system takes back when the process ends. None on a file system that has no locks. See alone."""
    how, said = fcntl.LOCK_EX | fcntl.LOCK_NB, False
    while True:
        make_folder(out)
        try:
            held = os.open(out, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(held, how)
        except BlockingIOError:
            os.close(held)
            if taken is not None:
                raise ValueError(taken) from None
            if not said:
                print(f"waiting for another process that is at work in {out}", file=sys.stderr, flush=True)
            said = True
            time.sleep(0.2)
            continue
        except OSError:
            os.close(held)
            return None
        with suppress(OSError):
            if os.path.samestat(os.fstat(held), out.stat()):
                return held
        os.close(held)  # it was removed, by a process that ended before it wrote anything
