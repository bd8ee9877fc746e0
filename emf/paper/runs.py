"""The parts of the paper in miniature are trained and scored, one process a core. What was stopped is gone on with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from emf.config import Config
from emf.files import alone, claim, read_object, whole_file, write_json
from emf.network.build import build
from emf.paper.paper_record import study
from emf.paper.parts import Budget, Part
from emf.paper.record import ENCODER, SCORES, Study
from emf.paper.scoring import measure, score
from emf.recipes import BASE
from emf.show.progress import bars
from emf.weights.checkpoints import WEIGHTS, checkpoints
from emf.weights.start import read_init
from emf.weights.tensors import items, write_file

LOG, BUDGET, START = "log.txt", "budget.json", "start.safetensors"


def run_all(out: Path, budget: Budget, jobs: int) -> None:
    """Train and score every part that has no scores yet, `jobs` of them at once. Raises ValueError as `at_work` does,
    and where a part fails, naming its log."""
    with at_work(out, study(budget)) as left:
        run_parts(out, left, partial(run_part, out=out, budget=budget), jobs)


@contextmanager
def at_work(out: Path, study: Study) -> Iterator[list[Part]]:
    """The parts of a study that are to be made in `out`, where no other process trains parts while the block runs. It
    goes on with what is there, with more seeds too: a part that stands in the folder's results.json is done, without a
    folder of its own, but for the base of one that is not. Raises ValueError where `out` holds the runs of another
    budget, and where another process is at work there."""
    who = study.who
    with alone(out, f"{who}: another process is at work in {out}; wait for it, or choose another --out"):
        settings = study.sizes()
        if (out / BUDGET).is_file() and "seeds" in (old := read_object(out / BUDGET, who)):
            settings["seeds"] = old["seeds"]  # earlier versions wrote them, and took no others
        claim(out, settings, None, name=BUDGET, who=f"{who}: ", advice="choose another --out")
        scored = {part.name for part in study.parts if (out / part.name / SCORES).is_file()}
        there = study.recorded(out).keys() - scored
        wanted = {part.base for part in study.parts if part.name not in there | scored}
        yield [part for part in study.parts if part.name not in there or part.name in wanted]


def run_parts(out: Path, parts: Sequence[Part], work: Callable[[Part], None], jobs: int, *, who: str = "paper") -> None:
    """Do the work of every part whose folder out/<name> has no scores yet, `jobs` of them at once, a part's base before
    it. What a part prints goes to log.txt in its folder. Raises ValueError where a part fails, naming that log, when
    the others have saved what they have. who: how that begins."""
    if jobs < 1:
        raise ValueError(f"{who}: {jobs} jobs at once; expected at least 1")
    every = {p.name: p for p in parts}
    done = {name for name in every if (out / name / SCORES).is_file()}
    waiting = [p for name, p in every.items() if name not in done]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the children: a core each
    server = multiprocessing.get_context("forkserver")
    # a fresh process for each part, which need not import everything again
    server.set_forkserver_preload(["emf.train.loop", "emf.paper.runs"])
    running: dict[int, tuple[ForkServerProcess, Connection, str]] = {}
    with bars(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task(who, total=len(every), completed=len(done))
        try:
            while waiting or running:
                ready = [p for p in waiting if p.base is None or p.base in done][: jobs - len(running)]
                for part in ready:
                    waiting.remove(part)
                    heard, said = server.Pipe(duplex=False)
                    process = server.Process(target=_logged, args=(work, part, out / part.name, said))
                    process.start()
                    said.close()  # here; the child has its own
                    running[process.sentinel] = process, heard, part.name
                progress.update(task, description=", ".join(name for *_, name in running.values()))
                ended = wait(running)
                for sentinel in [s for s in running if s in ended]:
                    process, heard, name = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        try:
                            error = heard.recv() if heard.poll() else ""
                        except EOFError:  # it was asked to stop, or killed
                            error = ""
                        log = out / name / LOG
                        raise ValueError(
                            f"{who}: {name} failed ({error or f'exit code {process.exitcode}'})"
                            + f"; see {log}" * log.is_file()
                        )
                    done.add(name)
                    progress.advance(task)
                    if not progress.console.is_terminal:
                        print(f"{len(done)}/{len(every)} {name}", flush=True)
        finally:
            for process, *_ in running.values():
                process.terminate()  # a part saves, and goes on at the next call
            for process, *_ in running.values():
                process.join()


def _logged(work: Callable[[Part], None], part: Part, folder: Path, said: Connection) -> None:
    """The work of one part, in a process of its own, which ends with the one that began it. What it prints goes to a
    log, and the first line of why it failed to `said` too."""
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            work(part)
        except (Exception, KeyboardInterrupt) as error:
            traceback.print_exc()
            said.send("".join(str(error).splitlines()[:1])[:500])  # a pipe holds little until somebody reads it
            sys.exit(1)


def _end_with(parent: BaseProcess) -> None:
    """As run_parts ends its processes, where it could not: it was killed, or ended while this one was started."""
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run_part(part: Part, out: Path, budget: Budget) -> None:
    """Train a part in the folder out/<name>, or go on with it, and score it. Of a base the text encoder is measured
    too."""
    folder, config = out / part.name, part.config
    if part.base is None:
        start = folder / START
        if not start.is_file():
            write_start(start, config)
    else:
        start = checkpoints(out / part.base)[-1] / WEIGHTS
    config = replace(config, init=start)
    train_whole(config, folder)
    result = score(folder, budget.per_tag)
    if part.base is None:
        write_json(folder / ENCODER, measure(folder, budget))
    write_json(folder / SCORES, result)


def train_whole(config: Config, folder: Path) -> None:
    """Train to the last step, or go on with what is there. Where it was asked to stop on the way the process ends."""
    from emf.train.loop import train

    last = f"step_{config.steps:07d}"
    saved = checkpoints(folder)
    if not saved or saved[-1].name != last:
        train(config, folder, resume=True)
        if checkpoints(folder)[-1].name != last:
            sys.exit(1)


def write_start(file: Path, config: Config) -> None:
    """Write the weights that a base starts from: the shipped base's transformer, and a text encoder with random
    weights."""
    torch.manual_seed(config.seed)
    state = build(config).state_dict()
    state |= {name: w.float() for name, w in read_init(BASE).items() if name.startswith("transformer.")}
    with whole_file(file) as part:
        write_file(part, items(state))
