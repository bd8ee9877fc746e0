"""Two commits' steps, interleaved: `make bench BASE=<revision>`. One process each, a round in turn, the ratio of every
pair.

The process of either commit imports that commit's emf, emf_kernels and bench, from a worktree of its own; it answers
each line that it is sent with the seconds of a step by provider.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
THRESHOLD = 0.05
OURS = ["fm", "dual 1", "dual 0.5", "dual 1, checkpointing"]


def serve(size: str, names: list[str]) -> None:
    """Seconds of a step of each provider, as a line of JSON for each line read; the first line says what there is."""
    import torch

    from bench import step

    # there are commits in which they stood in bench.step
    ways = import_module("bench.providers" if find_spec("bench.providers") else "bench.step")
    s = ways.Setting(ways.SIZES[size], torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    found = ways.providers(s, compile=False)[0]
    chosen = {name: found[name] for name in names if name in found}
    print(json.dumps(list(chosen)), flush=True)
    for _ in sys.stdin:
        took = {name: step.seconds(s, way, module) for name, (way, module) in chosen.items()}
        print(json.dumps(took), flush=True)


@contextmanager
def tree(revision: str) -> Iterator[Path]:
    """A worktree of a revision, for the time being. Raises ValueError on an unknown one."""
    known = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if known.returncode:
        raise ValueError(f"compare: no commit {revision!r} here; give BASE a revision that `git log` knows")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        command = ["git", "worktree", "add", "--detach", "--quiet", str(path), known.stdout.strip()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"compare: git worktree: {done.stderr.strip()}")
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=ROOT, capture_output=True)


class Server:
    """A process that times the tree at path."""

    def __init__(self, path: Path, size: str, names: list[str], stack: ExitStack) -> None:
        if not (path / "bench" / "step.py").is_file():
            raise ValueError("compare: the base has no bench/step.py to time; choose a later commit")
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(path / "kernels")])}
        # -P: else this file's own folder would stand in front of the other commit's
        command = [sys.executable, "-P", __file__, "--serve", size, *names]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process: Any = subprocess.Popen(command, cwd=path, env=env, **pipes)
        self.process = stack.enter_context(process)
        stack.callback(self.process.stdin.close)
        self.names: list[str] = self.answer()

    def answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith(("[", "{")):
                return json.loads(line)
        raise ValueError("compare: a process that times a commit ended before its time; its message is above")

    def seconds(self) -> dict[str, float]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return dict(self.answer())


def verdict(ratios: list[float]) -> str:
    """By the median; only where nine tenths of the pairs say the same is a difference called one."""
    middle, n = statistics.median(ratios), len(ratios)
    if middle > 1 + THRESHOLD and sum(r > 1 for r in ratios) >= 0.9 * n:
        return "slower"
    if middle < 1 - THRESHOLD and sum(r < 1 for r in ratios) >= 0.9 * n:
        return "faster"
    return "same"


def compare(base: str, size: str, rounds: int, names: list[str], say: Any = print) -> dict[str, list[float]]:
    """This tree's time over the base's, pair by pair, of each provider that both have."""
    with tree(base) as path, ExitStack() as stack:
        servers = [Server(where, size, names, stack) for where in (path, ROOT)]
        both = [name for name in names if all(name in server.names for server in servers)]
        if not both:
            raise ValueError(f"compare: none of {', '.join(names)} is in both commits")
        ratios: dict[str, list[float]] = {name: [] for name in both}
        for i in range(rounds + 1):  # the first warms up
            order = servers if i % 2 else servers[::-1]  # neither is always second
            took = {id(server): server.seconds() for server in order}
            old, new = (took[id(server)] for server in servers)
            if i:
                for name in both:
                    ratios[name].append(new[name] / old[name])
            say(f"  round {i} of {rounds}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", help="a git revision")
    parser.add_argument("--size", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--providers", nargs="+", default=OURS)
    options = parser.parse_args()
    ratios = compare(options.base, options.size, options.rounds, options.providers, lambda x: print(x, flush=True))
    print(f"| provider | time, this tree / {options.base} | range | |\n|--|--|--|--|")
    verdicts = {name: verdict(values) for name, values in ratios.items()}
    for name, r in ratios.items():
        print(f"| {name} | {statistics.median(r):.3f} | {min(r):.3f} to {max(r):.3f} | {verdicts[name]} |")
    sys.exit(1 if "slower" in verdicts.values() else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:  # beside another commit's emf, which may lack what this one's has
        serve(sys.argv[2], sys.argv[3:])
    else:
        from emf.errors import as_command

        with as_command():
            main()
