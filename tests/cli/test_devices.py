"""One rule for --device in every command, and one line for a device that is none or is not there; how processes that a
launcher started are told apart. Costs seconds: two processes, of which one imports DeepSpeed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from places import ROOT

from emf.cli.main import COMMANDS, GROUPS, main
from emf.device import AUTO, device, launched
from emf.errors import Unlaunched

WORDS = {
    "generate": "generate a --run {run} --out {out}",
    "app": "app {run}",
    "cache": "cache a.tar --vae vae --out {out}",
    "evaluate geneval": "evaluate geneval images --out {out}",
    "evaluate dpg": "evaluate dpg images --questions q.csv --out {out}",
    "evaluate hps": "evaluate hps images --weights w.pt --out {out}",
    "evaluate pick": "evaluate pick images --out {out}",
    "evaluate fid": "evaluate fid images --real others --weights w.pt --out {out}",
    "analyze encoders": "analyze encoders A=clip:{run} --out {out}",
    "analyze discriminability": "analyze discriminability A=clip:{run} --data d --out {out}",
    "analyze disentanglement": "analyze disentanglement A=clip:{run} --prompts p.txt --out {out}",
    "analyze steps": "analyze steps A={run} B={run} --out {out}",
}
"""A line for every command that has --device, which could otherwise begin."""


def test_every_command_that_computes_by_a_device_takes_the_same_one() -> None:
    every = {**COMMANDS, **{f"{group} {name}": f for group, some in GROUPS.items() for name, f in some.items()}}
    found = set()
    for name, command in every.items():
        defaults = {} if command.__kwdefaults__ is None else dict(command.__kwdefaults__)
        for key, hint in get_type_hints(command).items():
            if key == "device" or (is_dataclass(hint) and hasattr(hint, "device")):
                value = defaults[key]
                assert (value if key == "device" else value.device) == AUTO, name
                found.add(name)
    assert found == set(WORDS)


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("name", ["gpu", "cuda:99", "tpu:0", "🙂"])
def test_a_wrong_one_is_one_line(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_index.json").write_text("{}")
    words = WORDS[command].format(run=tmp_path / "run", out=tmp_path / "out").split()
    monkeypatch.setattr("sys.argv", ["emf", *words, "--device", name])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: device: ") and said.count("\n") == 1, said
    assert "expected auto or one of cpu" in said and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"^device: cuda is not there; expected auto or one of cpu"):
        device("cuda")
    assert {str(device(name)) for name in (None, "", "auto")} == {"cpu"}


def test_each_process_of_a_launcher_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(device(name)) for name in (None, "auto", "cuda", "cuda:1", "cpu")] == [*["cuda"] * 3, "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(device(name)) for name in (None, "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="^device: cuda:4 is not there; expected auto or one of cpu, cuda, cuda:0, "):
        device()


@pytest.mark.parametrize(
    ("rank", "world", "told"),
    [(None, None, (0, 1)), ("", "", (0, 1)), (None, "1", (0, 1)), ("0", "1", (0, 1)), ("2", "3", (2, 3))],
)
def test_ranks(rank: str | None, world: str | None, told: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    said_ranks(monkeypatch, rank, world)
    assert launched() == told


@pytest.mark.parametrize(
    ("rank", "world"), [("0", None), ("2", ""), (None, "2"), ("3", "3"), ("-1", "2"), ("one", "2"), ("0", "many")]
)
def test_half_a_launch_is_one_line(rank: str | None, world: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said_ranks(monkeypatch, rank, world)
    with pytest.raises(Unlaunched, match="^launch: RANK .* and WORLD_SIZE .* in the environment; start with"):
        launched()


def said_ranks(monkeypatch: pytest.MonkeyPatch, rank: str | None, world: str | None) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("environment", [dict(RANK="1"), dict(RANK="0", WORLD_SIZE="2")], ids=str)
def test_training_that_was_half_launched(environment: dict[str, str], tmp_path: Path) -> None:
    code, said = trained(environment, tmp_path)
    assert code == 2 and re.match(r"error: (rank 1: )?launch: RANK ", said), said
    assert said.count("\n") == 1


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        code, said = trained(environment, tmp_path)
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert code == 2 and "Traceback" not in said, said
    assert f"launch: rank 0 cannot meet the others at 127.0.0.1:{port}: " in line and "address" in line.lower(), line


def trained(environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """(exit code, stderr) of a run in another process that a launcher seems to have started."""
    pytest.importorskip("deepspeed")
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    call = [sys.executable, "-m", "emf.train", "digits", "--out", str(folder / "run")]
    done = subprocess.run(call, env=own | environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert not (folder / "run").exists()
    return done.returncode, done.stderr
