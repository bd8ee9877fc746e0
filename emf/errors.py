"""What ends a command: errors that are the user's to mend, and a run that diverged."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from emf.files.writing import not_written


class Diverged(RuntimeError):
    """A run's loss, gradient or weights are NaN or inf."""


class Unlaunched(ValueError):
    """The processes of a run were not started together, or do not find each other: each says so for itself."""


class Torn(ValueError):
    """A file that could be read does not hold what it should: it was cut, or is of another kind."""


class NotFinite(ValueError):
    """Images that were sampled hold NaN or inf, or weights to sample from do."""

    def __init__(self, places: Sequence[int], fault: str = "") -> None:
        """places: the images' numbers; none where the weights alone were looked at. fault: what is known of why."""
        self.places, self.fault = list(places), fault
        named = ", ".join(map(str, self.places[:8])) + ", ..." * (len(self.places) > 8)
        images = f"the images of captions {named} (counted from 0) hold NaN or inf"
        super().__init__("sample: " + ": ".join([images] * bool(self.places) + [fault] * bool(fault)))


@contextmanager
def seen_alone() -> Iterator[None]:
    """A block in which ranks part, as the steps of a run: a fault in it may be one rank's alone, which then says it."""
    try:
        yield
    except ValueError as error:
        error.add_note(ALONE)
        raise


ALONE = "seen by one rank"


@contextmanager
def report_errors() -> Iterator[None]:
    """A ValueError is the user's: its line is printed, and the exit code is 2. A diverged run ends with 3, what is
    interrupted with 130 and the KeyboardInterrupt's line, "interrupted" where it has none."""
    rank = os.environ.get("RANK", "0")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where somebody can still say that it fails
    except (ValueError, Diverged) as error:
        alone = isinstance(error, Unlaunched) or ALONE in getattr(error, "__notes__", ())
        if rank == "0" or alone:  # of the rest every rank sees the same
            print(f"error: {f'rank {rank}: ' * (rank != '0')}{error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 3) from None
    except BrokenPipeError:  # whoever read the output has enough, as in `emf generate ... | head -1`
        _silence()
        raise SystemExit(141) from None
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            line = f"{error.filename}: {error.strerror}"
        elif reason := not_written(error):
            line = f"a file cannot be written: {reason}"
            _silence()
        elif needed := no_memory(error):
            line = f"the memory is full ({needed}); compute less at once, or take another --device"
        elif "by peer" in str(error) or "remote process exited" in str(error):  # what gloo and NCCL then raise
            print(f"error: rank {rank}: another rank has ended; what it said is what was wrong", file=sys.stderr)
            raise SystemExit(1) from None
        else:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def as_command() -> Iterator[None]:
    """What a command does in the block: report_errors and cleaned_up."""
    with report_errors(), cleaned_up():
        yield


@contextmanager
def cleaned_up() -> Iterator[None]:
    """SIGTERM ends the block by SystemExit(143), so that half a file and processes that were started do not stay. Not
    for ranks, which may wait for each other where Python hears no signal: see ended_anywhere. Where somebody else
    listens for it, and outside the main thread, nothing changes."""
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    main = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != main:  # a process that was forked from here, and has nothing of its own to clean up
            os._exit(143)
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ended_anywhere(last: Callable[[], None]) -> Iterator[None]:
    """SIGTERM ends the process with exit code 143 after `last`, which a thread calls: also where the main thread waits
    in a library for other ranks, in which Python hears no signal. While somebody else listens for it in the block, and
    outside the main thread, nothing changes."""
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    main, (hears, told) = os.getpid(), socket.socketpair()

    def ours(number: int, frame: object) -> None:
        if os.getpid() != main:  # a process that was forked from here
            os._exit(143)

    def listen() -> None:
        while numbers := hears.recv(64):
            if signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is ours:
                last()
                os._exit(143)

    told.setblocking(False)
    signal.signal(signal.SIGTERM, ours)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    # a signal to a forked process is none to this one
    os.register_at_fork(after_in_child=lambda: told.fileno() < 0 or signal.set_wakeup_fd(-1))
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)
        told.close()
        listener.join()
        hears.close()


def _silence() -> None:
    """What was not written to stdout yet goes nowhere: the end of the process would try again, and say so."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def no_memory(error: BaseException) -> str:
    """What there was no memory for, where that is what an error says; known by its name and text, without torch."""
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in first:
        return first.rpartition("CPUAllocator: ")[2].partition(". Error code")[0] or "MemoryError"
    return ""
