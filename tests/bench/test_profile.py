"""Where a step's time goes: the parts add up, and the roofline's work is what the formulas say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from bench import report
from bench.profile import PHASES, kind, measure
from bench.providers import SIZES, Setting
from bench.roofline import work
from emf.train.ranges import mark_network
from emf_kernels import Dual, gated_residual, linear


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    s = Setting(SIZES["tiny"], torch.float32)
    mark_network(s.net)
    found, profiler = measure(s, 0.5)
    return found | dict(names={e.name for e in profiler.events()})


def test_the_shares_are_of_one_step(record: dict[str, Any]) -> None:
    assert list(record["shares"]) == ["data", "forward", "tangent", "backward", "optimizer"]
    assert sum(sum(kinds.values()) for kinds in record["shares"].values()) == pytest.approx(1)
    assert all(share >= 0 for kinds in record["shares"].values() for share in kinds.values())
    assert set(record["shares"]["optimizer"]) == {"optimizer", "launch gaps"}


def test_the_ranges_of_the_trace(record: dict[str, Any]) -> None:
    assert {*PHASES, "block 0", "block 1"} <= record["names"]


def test_memory_rises_in_forward_and_falls_in_backward(record: dict[str, Any]) -> None:
    at = dict(record["phases"])
    assert 0 <= at["data"] <= at["forward"] < at["backward"] < at["optimizer"] < 1
    line = record["memory"]
    top = max(line, key=lambda point: point[1])
    assert top[1] == record["peak_bytes"] > 0 and at["forward"] < top[0] <= at["optimizer"]


def test_every_op_of_the_forward_has_its_place(record: dict[str, Any]) -> None:
    ops = {row["op"] for row in record["roofline"]}
    assert {"linear", "attention", "linear_attention", "glumbconv", "adaln", "meanflow", "path"} <= ops
    assert sum(row["time_share"] for row in record["roofline"]) == pytest.approx(1)
    assert all(row["intensity"] > 0 and row["product_share"] > 0 for row in record["roofline"])


def test_work_of_a_product_and_of_a_sum() -> None:
    x = Dual(torch.randn(3, 5, 8), torch.randn(2, 5, 8))
    weight = torch.randn(6, 8)
    ((name, flops, moved),) = work(lambda: linear(x, weight))
    assert (name, flops) == ("linear", 2 * (3 + 2) * 5 * 8 * 6)
    assert moved == 4 * (6 * 8 + (3 + 2) * 5 * (8 + 6))
    y = torch.randn(3, 5, 8)
    assert work(lambda: gated_residual(y, None, y + 1)) == [("gated_residual", 120, 3 * 4 * 120)]


@pytest.mark.parametrize(
    ("name", "want"),
    [("aten::addmm", "GEMM"), ("aten::_softmax", "attention"), ("aten::convolution", "conv"), ("aten::detach", "other"),
     ("c10d::allreduce_", "communication"), ("aten::silu", "activation"), ("aten::copy_", "copies")],
)  # fmt: skip
def test_kinds(name: str, want: str) -> None:
    assert kind(name) == want


def test_the_page_and_the_table_are_of_the_records() -> None:
    """`make report` renews both. Pictures are compared by what their alternative text says."""
    bare = lambda page: re.sub(r'src="data:[^"]*"', "", page)  # noqa: E731
    assert bare((report.PROFILES / "report.html").read_text()) == bare(report.render())
    assert report.BENCHMARKS.read_text() == report.benchmarks()
