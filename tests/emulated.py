"""What emulated kernels store and load, over every program of a launch: run as a program with architectures as
arguments, which prints its findings as JSON. Kernels are compiled here, not interpreted."""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

from bench.bounds import strays

from bench.static import compiled, configured, launches, source  # isort: skip - first: kernels are compiled

import numpy as np
import torch

from bench import emulate, sass
from bench.registers import Machine
from bench.traffic import SPACE
from emf_kernels import REGISTRY

CASES = [("adaln", "odd"), ("gated_residual", "ragged"), ("rmsnorm", "chunks")]


def stored(arch: str, op: str, case: str) -> list[dict[str, Any]]:
    """Of each kernel and phase, by pointer that is stored to: bytes stored, different ones among them, bytes that there
    are. A kernel may be launched for the first samples and then for the rest."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with configured(arch):
        every = launches(REGISTRY[op], next(c for c in REGISTRY[op].cases if c.name == case), torch.float32)
    for one in every:
        made, _ = compiled(one, arch)
        instructions, stores = sass.parse(made.text), list[np.ndarray]()
        row = found.setdefault((one.kernel.__name__, one.phase), dict(outside=[], stores={}))
        for z, y, x in product(*map(range, made.grid[::-1])):
            trace = emulate.run(instructions, Machine(made.warps, (x, y, z), made.constants))
            row["outside"] += strays(made, trace)
            for event in trace.events:
                ins = instructions[event.place]
                if ins.kind == "STG":
                    stores.append((event.addresses[event.active][:, None] + np.arange(ins.width)).ravel())
        pointers = [n for n, kind in source(one)[0].items() if kind[0] == "*"]
        at = np.concatenate(stores)
        for owner, span in enumerate(made.tensors, 1):
            if (mine := at[at >> SPACE == owner]).size:
                row["stores"].setdefault(pointers[owner - 1], []).append((mine.tolist(), span))
    return [
        dict(kernel=f"{op}.{kernel}", phase=phase, outside=row["outside"][:3])
        | {"stores": {name: summed(parts) for name, parts in row["stores"].items()}}
        for (kernel, phase), row in found.items()
    ]


def summed(parts: list[tuple[list[int], int]]) -> tuple[int, int, int]:
    every = [address for addresses, _ in parts for address in addresses]
    return len(every), len(set(every)), max(span for _, span in parts)


if __name__ == "__main__":
    print(json.dumps({arch: [row for case in CASES for row in stored(arch, *case)] for arch in sys.argv[1:]}))
