"""In which dtype an op computes: that of its arguments, sums in float32, whatever autocast says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import floating, make, ours
from torch import Tensor

from emf_kernels import REGISTRY, Dual, Op, attention, backend, launch, linear_attention, meanflow, rmsnorm
from emf_kernels import scaled_dot_product_attention as sdpa
from emf_kernels.op import Backend

pytestmark = [
    pytest.mark.usefixtures("as_on_a_gpu"),
    pytest.mark.skipif(not launch.INTERPRETED, reason="on tensors of the CPU"),
]
BOTH = pytest.mark.parametrize("name", ["reference", "triton"])
N = torch.Generator().manual_seed(0)
T = torch.tensor([0.9])
# sums, or squares, beyond float16's 65504
LARGE: list[tuple[Op, tuple[Any, ...]]] = [
    (rmsnorm, (torch.full((1, 2, 8), 300.0), torch.ones(8))),
    (meanflow, (torch.full((1, 8, 64, 64), 2.0), torch.zeros(1, 8, 64, 64), torch.zeros(1, 8, 64, 64), T, T)),
    (meanflow, (torch.full((1, 8), 400.0), torch.zeros(1, 8), torch.zeros(1, 8), T, T)),
    (linear_attention, (*torch.rand(3, 1, 40, 32, generator=N) * 2000, None, None, 32)),
]


@BOTH
@pytest.mark.parametrize(("op", "args"), LARGE, ids=lambda x: x.name if isinstance(x, Op) else "")
def test_half_precision_sums_in_float32(op: Op, args: tuple[Any, ...], name: Backend) -> None:
    half = [a.half() if floating(a) else a for a in args]
    with backend(name):
        got = op(*half)
    want = op.reference(*(a.double() if floating(a) else a for a in half))
    got, want = (y[0] if isinstance(y, tuple) else y for y in (got, want))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{op.name}-{name}")
        for op in REGISTRY.values()
        for name in ("reference", "triton")
        if op.triton or name == "reference"
    ],
)
def test_autocast_changes_nothing(op: Op, name: Backend) -> None:
    case = next((case for case in op.cases if case.name == "channels"), op.cases[0])
    args, dots, _ = make(op, case, torch.float32)

    def run() -> list[Tensor]:
        values, tangents = ours(op, case, args, dots)
        return values + tangents

    with backend(name):
        want = run()
        with torch.autocast("cpu", torch.bfloat16):
            got = run()
            assert torch.is_autocast_enabled("cpu")
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@BOTH
def test_a_scale_that_would_need_a_gradient_is_refused(name: Backend) -> None:
    q, scale = torch.randn(1, 3, 1, 16), torch.tensor(0.3, requires_grad=True)
    with backend(name):
        for call in (attention, sdpa):
            with pytest.raises(ValueError, match="^attention: scale is a Tensor; expected a constant"):
                call(q, q, q, scale=scale)
        with pytest.raises(ValueError, match="^attention: scale is a Dual; expected a constant"):
            attention(q, q, q, scale=Dual(scale, scale))
        with pytest.raises(ValueError, match="^attention: scale is '0.5'; expected a float"):
            attention(q, q, q, scale="0.5")
        with pytest.raises(ValueError, match="^time_embedding: scale is a Tensor; expected a constant"):
            REGISTRY["time_embedding"](torch.ones(2), None, scale)


@BOTH
def test_constants_that_are_not_finite_are_refused(name: Backend) -> None:
    """Of every op and every number among its arguments: one would make all of its values NaN."""
    for op in REGISTRY.values():
        if name == "triton" and op.triton is None:
            continue
        arguments = op.inputs(op.cases[0], torch.float32, "cpu", torch.Generator().manual_seed(0))
        for constant in (k for k, a in arguments.items() if isinstance(a, float)):
            wrong = [float("nan"), float("inf")] + [-1.0] * (constant in ("eps", "c"))
            for value in wrong:
                with (
                    backend(name),
                    pytest.raises(ValueError, match=f"^{op.name}: {constant} is {value}; expected a fin"),
                ):
                    op(**arguments | {constant: value})
