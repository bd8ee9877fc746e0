"""The blocks by CUDA graphs against the same blocks launched one kernel at a time, on a GPU: losses and gradients over
a few steps with every b at micro-batches of 1 and 2, then the time of a step. Needs torch and triton only
(PYTHONPATH=kernels:.); writes profiles/<device>/graphs.json.

Eager and graphed steps run on the same weights, which move between them. Both add up in a fixed order, so equal bits
are expected; more than LIMIT apart is an error. Times are of the 1.6B model, 1024 tokens, forward and backward without
the optimizer, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products in an order that does not change

import torch
from torch import Tensor

from bench.records import GPU, PROFILES, device_name, revision, write_record
from emf.errors import as_command
from emf.flow import meanflow_loss
from emf.flow_config import FlowConfig
from emf.model.replay import Graphs
from emf.model.sizes import TransformerConfig
from emf.model.transformer import Transformer

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
FLOW = FlowConfig()
LR = 1e-2
STEPS = [  # (micro-batch, b of its two halves)
    (2, (2, 1)), (2, (1, 0)), (1, (1, 0)), (2, (0, 2)), (1, (1, 1)), (2, (2, 2)), (2, (1, 1)), (1, (0, 1)),
]  # fmt: skip


def network(heads: int, cross: tuple[int, int], layers: int, side: int, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_attention_heads=heads, num_cross_attention_heads=cross[0], cross_attention_head_dim=cross[1],
        num_layers=layers, caption_channels=2304, sample_size=side, dual_time=True,
    )  # fmt: skip
    with torch.device("cuda"):
        net = Transformer(config).to(dtype)
    return net


class Batches:
    """Losses on random batches of a network."""

    def __init__(self, net: Transformer, tokens: int, masked: bool) -> None:
        self.net, self.tokens, self.masked = net, tokens, masked
        self.dtype = net.scale_shift_table.dtype
        self.generator = torch.Generator("cuda")

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device="cuda").to(self.dtype)

    def loss(self, seed: int, n: int, b: int) -> Tensor:
        s, g = self.net.config, self.generator
        g.manual_seed(seed)
        x, e = (self.draw(n, s.in_channels, s.sample_size, s.sample_size) for _ in range(2))
        c = self.draw(n, self.tokens, s.caption_channels)
        t = 0.5 + 0.4 * torch.rand(n, generator=g, device="cuda")
        r = torch.where(torch.arange(n, device="cuda") < b, t * torch.rand(n, generator=g, device="cuda"), t)
        mask = None
        if self.masked:
            lengths = torch.randint(1, self.tokens + 1, (n, 1), generator=g, device="cuda")
            mask = torch.arange(self.tokens, device="cuda")[None] < lengths
        velocity = lambda z, t, r: self.net(z, t, r, c, mask)  # noqa: E731
        return meanflow_loss(velocity, velocity, x, e, (t, r, b), FLOW)[0].mean()

    def step(self, seed: int, n: int, bs: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """(losses, gradients) of micro-batches whose gradients add up."""
        self.net.zero_grad()
        values = []
        for i, b in enumerate(bs):
            loss = self.loss(100 * seed + i, n, b)
            loss.backward()
            values.append(loss.detach())
        return torch.stack(values), [p.grad for p in self.net.parameters() if p.grad is not None]


def apart(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative difference of a tensor; a number where both are finite, else infinity."""
    most = 0.0
    for a, b in zip(got, want, strict=True):
        d = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-20)).item()
        most = max(most, d if d == d else float("inf"))
    return most


def compare(dtype: torch.dtype, masked: bool) -> dict[str, Any]:
    net = network(8, (2, 128), 3, 16, dtype)
    batches, graphs = Batches(net, 77, masked), Graphs(net.through, net.transformer_blocks)
    losses, gradients = 0.0, 0.0
    for seed, (n, bs) in enumerate(STEPS):
        net.graphs = None
        want = batches.step(seed, n, bs)
        want = want[0].clone(), [g.clone() for g in want[1]]
        net.graphs = graphs
        for _ in range(2):  # where it is recorded, and where it is not
            got = batches.step(seed, n, bs)
            losses, gradients = max(losses, apart([got[0]], [want[0]])), max(gradients, apart(got[1], want[1]))
        with torch.no_grad():
            torch._foreach_add_([p for p in net.parameters() if p.grad is not None], got[1], alpha=-LR)
    recorded = len(graphs.recorded)
    right = max(losses, gradients) <= LIMIT[dtype] and recorded == 5
    return dict(dtype=str(dtype)[6:], masked=masked, losses=losses, gradients=gradients, graphs=recorded, right=right)


def timed(layers: int, rounds: int) -> list[dict[str, Any]]:
    net = network(70, (20, 112), layers, 32, torch.bfloat16)
    batches = Batches(net, 300, masked=True)
    rows = []
    for n, b in ((1, 1), (1, 0), (2, 1)):
        ways: dict[str, Graphs | None] = {"eager": None, "graphs": Graphs(net.through, net.transformer_blocks)}
        took: dict[str, list[float]] = {way: [] for way in ways}
        peak = {}
        for i in range(rounds + 2):
            for way, graphs in ways.items():
                net.graphs = graphs
                net.zero_grad()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                batches.loss(i, n, b).backward()
                torch.cuda.synchronize()
                if i > 1:  # the first two warm up, and record
                    took[way].append(1e3 * (time.perf_counter() - start))
                    peak[way] = torch.cuda.max_memory_allocated()
        ratios = sorted(g / e for g, e in zip(took["graphs"], took["eager"], strict=True))
        row: dict[str, Any] = dict(micro_batch=n, b=b, layers=layers, rounds=rounds)
        row |= {f"{way}_ms": statistics.median(ms) for way, ms in took.items()}
        row |= dict(ratio=statistics.median(ratios), ratio_low=ratios[0], ratio_high=ratios[-1])
        rows.append(row | {f"{way}_peak_bytes": bytes for way, bytes in peak.items()})
        print(json.dumps(rows[-1]), flush=True)
        net.graphs = None
        del ways, graphs
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.graphs", description=__doc__)
    parser.add_argument("--layers", type=int, default=20, help="of the model that is timed")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no timing begins")
    options = parser.parse_args()
    if min(options.layers, options.rounds) < 1:
        parser.error(f"--layers {options.layers} --rounds {options.rounds}; expected at least one of each")
    if not GPU:
        parser.error("no GPU here; tests/model/test_graphs.py imitates a recording without one")
    until = time.monotonic() + options.seconds
    out = PROFILES / device_name() / "graphs.json"
    head = dict(device=device_name(), torch=torch.__version__, commit=revision())
    record: dict[str, Any] = dict(head=head, right=[], times=[])
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype, masked in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        record["right"].append(compare(dtype, masked))
        print(json.dumps(record["right"][-1]), flush=True)
        write_record(out, record)
    torch.use_deterministic_algorithms(False)
    right = all(row["right"] for row in record["right"])
    if right and time.monotonic() < until:
        record["times"] = timed(options.layers, options.rounds)
        write_record(out, record)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    with as_command():
        main()
