"""Ranks, ZeRO stages, ways to save memory: the same run. Checkpoints of one taken up by another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from places import ROOT
from safetensors.torch import load_file
from training import TINY, assert_same_training, averaged, free_port, kill_in_second_save, metrics, train

pytest.importorskip("deepspeed")

from emf.train.launcher import launcher_left, launchers

CHECKPOINTING = "--transformer.checkpointing True"
OFFLOAD = "--zero.offload True --optim.ema-cpu True"
ACCUMULATION = "--zero.accumulation 2"


@pytest.fixture(scope="module")
def long(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, no ZeRO, twenty steps."""
    folder = tmp_path_factory.mktemp("long")
    result = train(folder, *recipe, "--out", str(folder / "run"), "--steps", "20", "--run.save-every", "20")
    assert result.code == 0, result.text
    return folder / "run"


@pytest.mark.parametrize(
    ("stage", "ranks", "flags"),
    [
        (0, 1, ACCUMULATION),
        (3, 1, ""),
        *((0, 2, flags) for flags in ("", CHECKPOINTING, ACCUMULATION)),
        *((stage, 2, flags) for stage in (1, 2, 3) for flags in ("", CHECKPOINTING, OFFLOAD, ACCUMULATION)),
        (3, 2, f"{CHECKPOINTING} {OFFLOAD} {ACCUMULATION}"),
    ],
    ids=str,
)
def test_ranks_stages_and_ways_to_save_memory_agree(
    stage: int, ranks: int, flags: str, recipe: list[str], long: Path, base: Path, tmp_path: Path
) -> None:
    """Over twenty steps."""
    arguments = ["--steps", "20", "--run.save-every", "20", "--zero.stage", str(stage), *flags.split()]
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), *arguments, ranks=ranks)
    assert result.code == 0, result.text
    assert_same_training(tmp_path / "run", long, base, 20)


def test_share_is_of_the_whole_batch(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    """Not of one rank's last micro-batch."""
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), "--zero.accumulation", "2", ranks=2)
    assert result.code == 0, result.text
    assert [row["share"] for row in metrics(tmp_path / "run")] == [row["share"] for row in metrics(straight)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_keeps_float32_weights(
    stage: int, recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--zero.stage", str(stage), "--zero.dtype", "bfloat16"]
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), *flags, ranks=2 if stage else 1)
    assert result.code == 0, result.text
    got, want = ([row["error"] for row in metrics(run)] for run in (tmp_path / "run", straight))
    assert got == pytest.approx(want, rel=0.03) and got != want
    start, a, b = load_file(base), averaged(tmp_path / "run"), averaged(straight)
    frozen = {k for k in start if k.startswith(("encoder.", "transformer.time_embed."))}
    moved = {k: w for k, w in a.items() if k not in frozen}
    assert all(w.dtype == torch.float32 for w in a.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in moved.values())
    apart = torch.cat([(w - b[k]).flatten() for k, w in moved.items()]).norm()
    assert apart < 0.5 * torch.cat([(b[k] - start[k]).flatten() for k in moved if k in start]).norm()


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_sharded_run_continues(
    stage: int, recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    run, flags = tmp_path / "run", ["--zero.stage", str(stage)]
    assert train(tmp_path, *recipe, "--out", str(run), *flags, ranks=2, before=kill_in_second_save).code
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_0000003", "step_0000006.part"]
    result = train(tmp_path, *recipe, "--out", str(run), *flags, "--resume", "True", ranks=2)
    assert result.code == 0 and "step 3/6" not in result.text, result.text
    assert_same_training(run, straight, base)


def test_another_number_format_goes_on_too(recipe: list[str], straight: Path, base: Path, tmp_path: Path) -> None:
    """At the same stage, where DeepSpeed's own state has another form."""
    arguments = [*recipe, "--out", str(tmp_path / "run")]
    assert train(tmp_path, *arguments, before=kill_in_second_save).code
    result = train(tmp_path, *arguments, "--zero.dtype", "bfloat16", "--resume", "True")
    assert result.code == 0 and "step 4/6" in result.text, result.text
    got, want = ([row["error"] for row in metrics(run)] for run in (tmp_path / "run", straight))
    assert got == pytest.approx(want, rel=0.03) and got[:3] == want[:3] and got != want


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        ((2, 2), (2, 1), "float32"),
        ((3, 2), (1, 2), "float32"),
        ((3, 2), (3, 1), "float32"),
        ((1, 1), (3, 2), "float32"),
        ((0, 2), (0, 1), "float32"),
        ((0, 1), (3, 2), "float32"),
        ((2, 2), (0, 1), "float32"),
        ((3, 2), (1, 2), "bfloat16"),
        ((1, 2), (0, 1), "bfloat16"),
    ],
    ids=str,
)
def test_resumes_on_other_ranks_and_another_stage(
    before: tuple[int, int],
    after: tuple[int, int],
    dtype: str,
    recipe: list[str],
    straight: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    """What training comes to is what it comes to without the change."""
    run, flags = tmp_path / "run", ["--zero.dtype", dtype]
    arguments = [*recipe, "--out", str(run), *flags]
    killed = train(
        tmp_path, *arguments, "--zero.stage", str(before[0]), ranks=before[1], before=kill_in_second_save, name="first"
    )
    assert killed.code
    result = train(tmp_path, *arguments, "--zero.stage", str(after[0]), "--resume", "True", ranks=after[1])
    assert result.code == 0 and "step 3/6" not in result.text and "step 4/6" in result.text, result.text
    assert sorted(p.name for p in (run / "checkpoints/step_0000003").iterdir()) == [
        "checkpoint.json",
        "config.json",
        "engine",
        "model.safetensors",
    ]
    if dtype == "float32":
        assert_same_training(run, straight, base)
    else:
        whole = train(tmp_path, *recipe, "--out", str(tmp_path / "whole"), *flags, "--zero.stage", "1", ranks=2)
        assert whole.code == 0, whole.text
        got, want = ([row["error"] for row in metrics(r)] for r in (run, tmp_path / "whole"))
        assert got == pytest.approx(want, rel=0.02)


def launch() -> tuple[list[str], dict[str, str]]:
    """(what starts two ranks by DeepSpeed's launcher, the environment to do it in)."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", free_port(), "--module", "emf.train"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return command, os.environ | dict(PYTHONPATH=path, DS_ACCELERATOR="cpu")


def wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end, f"{file} does not come"
        time.sleep(0.1)


def torch_in(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "emf.train" in process.cmdline() and any("libtorch" in file.path for file in process.memory_maps())
    return False


@pytest.mark.parametrize("begun", [True, False], ids=["trains", "starts"])
def test_sigterm_to_the_launcher_alone_ends_its_ranks_with_a_save(
    recipe: list[str], begun: bool, tmp_path: Path
) -> None:
    """As `kill` sends it. The command `deepspeed` ends at once and tells nobody, be it that its ranks still start."""
    command, environment = launch()
    run, output = tmp_path / "run", tmp_path / "out.txt"
    arguments = [*recipe, "--out", str(run), "--steps", "100000", "--run.save-every", "100000"]
    with output.open("wb") as told:
        runner = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=told, stderr=told)
    below: list[psutil.Process] = []
    try:
        if begun:
            wait_for(run / "metrics.jsonl", runner)
        while sum(map(torch_in, psutil.Process(runner.pid).children(recursive=True))) < 2:
            assert runner.poll() is None, output.read_text()
            time.sleep(0.1)
        below = psutil.Process(runner.pid).children(recursive=True)
        runner.terminate()
        assert len(below) >= 3 and runner.wait(60) == -signal.SIGTERM
        _, left = psutil.wait_procs(below, 120)
        assert not left, output.read_text()
    finally:
        for process in (*below, runner):
            with contextlib.suppress(psutil.Error):
                process.kill()
    assert len(list((run / "checkpoints").iterdir())) == 1, output.read_text()
    assert output.read_text().count("asked to stop: saved") == 1 and "Traceback" not in output.read_text()


def stop_while_they_wait() -> None:
    """SIGTERM to both ranks before the first step, while rank 0 waits in a library, and to a process forked from it."""
    from emf.train import loop as module

    def waits(*_: Any) -> None:
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        print("trains on", flush=True)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        torch.distributed.barrier() if os.environ["RANK"] == "0" else time.sleep(60)

    module.shared = waits


def test_sigterm_before_the_first_step_ends_several_ranks_in_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(tmp_path, "digits-base", *TINY, "--out", str(run), ranks=2, before=stop_while_they_wait)
    said = f"asked to stop: no step was under way, and {run} holds what it held"
    assert result.code == 143 and not run.exists(), result.text
    assert sorted(result.text.splitlines()) == [said, "trains on", "trains on"], result.text


def test_who_started_a_rank_is_known_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a further machine it is a shell that starts what starts the ranks; torchrun and a shell are nobody's."""

    class Process:
        def __init__(self, *said: str) -> None:
            self.said = [*said]

        def cmdline(self) -> list[str]:
            return self.said

    starter = Process("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "--module", "emf.train")
    command, module = (
        Process("python", "/venv/bin/deepspeed", "x"),
        Process("python", "-m", "deepspeed.launcher.runner"),
    )
    shell, torchrun = Process("bash", "-c", "cd x; python -m deepspeed.launcher.launch"), Process("python", "torchrun")
    for above, found in (
        ([starter, command, shell], [starter, command]),
        ([starter, module], [starter, module]),
        ([shell, starter, command], [starter, command]),
        ([starter, shell], [starter]),
        ([starter], [starter]),
        ([torchrun, shell], []),
        ([shell], []),
        ([], []),
    ):
        monkeypatch.setattr(psutil.Process, "parents", lambda self, above=above: above)
        assert launchers() == found
    assert not launcher_left()()
    gone = psutil.Process()
    monkeypatch.setattr(gone, "is_running", lambda: False)
    monkeypatch.setattr("emf.train.launcher.EARLY", [gone])  # seen when this process began, and above it no more
    assert launcher_left()()


def test_the_launcher(recipe: list[str], straight: Path, base: Path, tmp_path: Path) -> None:
    command, environment = launch()
    arguments = [*recipe, "--out", str(tmp_path / "run"), "--zero.stage", "3"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_training(tmp_path / "run", straight, base)
    again = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 2 and again.stderr.count("error: train:") == 1 and "Traceback" not in again.stderr, (
        again.stderr
    )
