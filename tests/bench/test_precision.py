"""The precision bench measures what it says, and its record is whole."""

from __future__ import annotations

import json

import torch
from places import ROOT

from bench.precision import DEPTHS, IMITATED, IN, SMALL, TIMES, measure, random_network, to_tf32


def test_errors_are_of_the_size_of_their_roundings() -> None:
    network, inputs = random_network(2, channels=64, tokens=16)
    rows = {row["precision"]: row for row in measure(network, inputs, 0.5)}
    assert list(rows) == IMITATED
    whole, tf32, mixed, half = rows.values()
    for what in ("u", "u_dot"):
        assert 1e-8 < whole[what] < 2e-6 < 1e-4 < tf32[what] < 2e-3
        assert 1e-3 < half[what] < 3e-2
    assert mixed["u"] == half["u"] and 1e-4 < mixed["u_dot"] < half["u_dot"]


def test_the_kernels_are_as_exact_as_their_imitation() -> None:
    """In bfloat16, in a whole network."""
    network, inputs = random_network(1, channels=64, tokens=16)
    imitated, kernels = measure(network, inputs, 0.5, IN[SMALL])
    for what in ("u", "u_dot"):
        assert 0.5 < kernels[what] / imitated[what] < 1.25


def test_tf32_keeps_ten_bits() -> None:
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-12, -(1 + 2**-10 + 2**-11 + 2**-13)])
    assert to_tf32(x).tolist() == [1, 1 + 2**-10, 1, -(1 + 2**-9)]


def test_the_record_has_every_depth_precision_and_time() -> None:
    rows = json.loads((ROOT / "profiles" / "precision.json").read_text())
    found = {(row["network"], row["layers"], row["precision"], row["t"]) for row in rows}
    assert found >= {(network, n, name, t) for network in IN for n in DEPTHS for name in IN[network] for t in TIMES}
