"""Where measurements are kept, and what a record says of the machine that it was made on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from emf.files import finite, make_folder, read_object, write_json, write_text
from emf_kernels import launch

PROFILES = Path(__file__).parent.parent / "profiles"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def device_name() -> str:
    return launch.chips(torch.cuda.current_device())[0] if GPU else "cpu"


def core() -> str:
    """The kind of a CPU's core, by the vector instructions that PyTorch finds: avx512, avx2, default. MKL and the
    compiler behind torch.compile ask the CPU themselves."""
    return torch.backends.cpu.get_cpu_capability().lower()


def revision() -> str:
    """The commit, "" where git or the history is not there."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def write_record(file: Path, record: Any) -> None:
    """Write a record whole, in a folder that is made where it is missing."""
    make_folder(file.parent)
    write_json(file, record)


def write_record_rows(file: Path, rows: Iterable[Any]) -> None:
    """Write a list whole, a row a line, so that a change of one row is a line of its difference."""
    make_folder(file.parent)
    write_text(file, "[\n" + ",\n".join(json.dumps(finite(row)) for row in rows) + "\n]\n")


def begun(file: Path, settings: dict[str, Any], who: str) -> dict[str, Any]:
    """The record that `file` holds, to go on with; without one `settings` alone. Raises ValueError where it holds a
    record of other settings, which nothing is to replace."""
    if not file.is_file():
        return settings
    record = read_object(file, who)
    for name, value in settings.items():
        if record.get(name) != value:
            raise ValueError(f"{who}: {file} has {name} {record.get(name)}, not {value}; move it away")
    return record
