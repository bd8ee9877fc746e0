"""What the interpreter alone would not show: float16's range, products that truncate, devices, grids, memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from libraries import check_backward
from parity import SEED, make, ours
from places import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emf_kernels import REGISTRY, Dual, adaln, attention, backend, launch, linear_attention, rmsnorm, time_embedding
from emf_kernels.function import function

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"),
]


def kernel_file(name: str) -> Any:
    return importlib.import_module(REGISTRY[name].reference.__module__)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def attention_tangent(*, common: float = 0.0, size: float = 1.0, keys: float = 1.0, values: float = 1.0) -> float:
    """The relative error of o_dot in float16, against float64 of the same inputs."""
    generator = torch.Generator().manual_seed(SEED)
    q, k, v, q_dot = (torch.randn(1, n, 1, 64, generator=generator) for n in (40, 150, 150, 40))
    q, k, v, q_dot = (x.half().to(DEVICE) for x in (q, keys * k + common, values * v, size * q_dot))
    with backend("triton"):
        got = attention(Dual(q, q_dot), k, v).tangent
    f = lambda q: attention.reference(q, k.double(), v.double())  # noqa: E731
    return relative_error(got, torch.func.jvp(f, (q.double(),), (q_dot.double(),))[1])


def test_poisoned_memory_leaves_devices_as_they_are() -> None:
    """A network on the meta device takes no memory, in this test and in those after it."""
    with torch.device("meta"):
        assert torch.nn.Linear(1, 1).weight.device.type == "meta"


def test_what_keys_have_in_common_does_not_reach_the_tangent() -> None:
    """p * s_dot is rounded to half precision: what all of a row's s_dot share would leave its rounding in o_dot."""
    assert attention_tangent(common=8.0) < 2 * attention_tangent()


def test_attention_in_float16_where_p_times_s_dot_leaves_its_range() -> None:
    assert attention_tangent(size=1e4, keys=4.0, values=1e-3) < 2 * attention_tangent(keys=4.0)


def test_attention_of_rows_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their places are then computed in 64; here all of them are, to the same values."""
    args, x_dot, _ = make(attention, next(c for c in attention.cases if c.name == "tiles"), torch.float32, DEVICE)
    with backend("triton"):
        want = ours(attention, attention.cases[4], args, x_dot)
        monkeypatch.setattr(kernel_file("attention"), "wide", lambda *_: True)
        got = ours(attention, attention.cases[4], args, x_dot)
    assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))


def test_times_at_a_scale_of_1000() -> None:
    """A phase of hundreds of radians, of which float32 would leave 3e-5."""
    t, r = torch.rand(2, 8, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).float().to(DEVICE)
    with backend("triton"):
        got = time_embedding(Dual(t, torch.ones_like(t)), r, 1000.0, 256)
    f = lambda t: time_embedding.reference(t, r.double(), 1000.0, 256)  # noqa: E731
    want = torch.func.jvp(f, (t.double(),), (torch.ones_like(t).double(),))
    for y, value, tangent in zip(got, *want, strict=True):
        torch.testing.assert_close(y.primal.double(), value, rtol=0, atol=1e-6)
        torch.testing.assert_close(y.tangent.double(), tangent, rtol=0, atol=1e-3)  # of up to 1000


def test_the_norm_of_queries_cancels() -> None:
    """Which the kernel leaves out: value, tangent and gradients are the same, eps and all."""
    args, x_dot, generator = make(linear_attention, linear_attention.cases[0], torch.float64)
    q, k, v, q_weight, k_weight, D, _ = args.values()
    dots = tuple(torch.cat([d, torch.zeros_like(args[n][len(d) :])]) for n, d in x_dot.items())
    with_norm = lambda q, k, v, w: linear_attention.reference(q, k, v, w, k_weight, D)  # noqa: E731
    without = lambda q, k, v, w: linear_attention.reference(  # noqa: E731
        q * w, rmsnorm.reference(k, k_weight), v, None, None, D
    )
    results = []
    for f in (with_norm, without):
        o, o_dot = torch.func.jvp(lambda q, k, v, f=f: f(q, k, v, q_weight), (q, k, v), dots)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, q_weight)]
        results.append([o, o_dot, *torch.autograd.grad(f(*leaves).square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for eps, weight in ((1e-9, q_weight), (0.01, None)):
        with pytest.raises(ValueError, match=f"eps is {eps}; expected at most 1e-12, without a norm of q 1e-9"):
            linear_attention(q, k, v, weight, k_weight, D, eps)


@pytest.mark.skipif(DEVICE == "cuda", reason="emulates a GPU's products")
def test_linear_attention_where_products_truncate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores drop all but ten bits of a float32 operand, which would scale o by 1 - 1e-3."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    exact = builder.create_dot

    def truncated(x: Any) -> Any:
        data = (x.data.view(numpy.int32) & -0x2000).view(numpy.float32) if x.data.dtype == numpy.float32 else x.data
        return interpreter.TensorHandle(data, x.dtype)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: exact(self, truncated(a), truncated(b), *rest))
    generator = torch.Generator().manual_seed(SEED)
    q, k, v, *dots = (torch.randn(1, 256, 64, generator=generator) for _ in range(6))
    q, k, v, *dots = (x.half() for x in (q, k, v + 3, *dots))
    weight = (1 + 0.2 * torch.randn(64, generator=generator)).half()
    with backend("triton"):
        got = linear_attention(*map(Dual, (q, k, v), dots), weight, weight, 32)
    f = lambda q, k, v: linear_attention.reference(q, k, v, weight.double(), weight.double(), 32)  # noqa: E731
    o, o_dot = torch.func.jvp(f, tuple(x.double() for x in (q, k, v)), tuple(d.double() for d in dots))
    assert abs((got.primal * o).sum() / o.square().sum() - 1) < 3e-4
    assert relative_error(got.tangent, o_dot) < 1e-3


@pytest.mark.parametrize(("heads", "causal"), [(3, False), (1, False), (3, "lower right")])
@pytest.mark.parametrize("library", ["cudnn", "flash"])
def test_a_library_takes_what_attention_hands_it(
    monkeypatch: pytest.MonkeyPatch, library: str, heads: int, causal: bool | str
) -> None:
    """Arguments and shapes only, on tensors without data; a GPU's parity tests judge the numbers."""
    monkeypatch.setattr(launch, "_attention_library", lambda index, cudnn: library)
    monkeypatch.setattr(kernel_file("attention"), "_bwd_q", None)  # of which ours is made
    monkeypatch.setattr(launch, "configuration", lambda kernel, x, default, **shape: default)
    monkeypatch.setattr(launch, "shared_memory", lambda x: 227 * 1024)
    with FakeTensorMode():
        q, k = (torch.empty(2, n, h, 112, dtype=torch.bfloat16, device="cuda") for n, h in ((64, 3), (40, heads)))
        lse = torch.empty(2, 3, 64, device="cuda")
        saved = (q, k, k, None, q, lse, causal, 112**-0.5, None, None, None, None, False)
        dq, dk, dv = kernel_file("attention").backward(saved, q)
        mask = torch.empty(2, 40, dtype=torch.bool, device="cuda")
        bias, cu = torch.empty(1, 1, 64, 40, device="cuda"), torch.empty(2, 3, dtype=torch.int32, device="cuda")
        for ours in ({6: True}, {3: mask}, {8: bias}, {10: cu, 11: cu}):  # what it has not got
            with pytest.raises(TypeError, match="NoneType"):
                kernel_file("attention").backward([ours.get(i, a) for i, a in enumerate(saved)], q)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


def test_which_library_attention_asks() -> None:
    check_backward(kernel_file("attention"))


@pytest.mark.skipif(DEVICE == "cuda", reason="with devices of its own making")
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not on the current one, which Triton takes."""
    entered: list[int] = []
    current = [0]

    class On:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: Any) -> None:
            current.pop()

    def forward(values: Any, dots: Any, b: int) -> Any:
        entered.append(current[-1])
        return (values[0],), (values[0],), ()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", On)
    with FakeTensorMode(), torch.no_grad():
        for index in (0, 1):
            function("probe", forward, lambda saved, dy: (dy,), ("x",))(torch.zeros(2, device=f"cuda:{index}"))
    assert entered == [0, 1] and current == [0]


def test_a_batch_beyond_a_grid_is_refused() -> None:
    x = torch.zeros(1, 1, 8, device=DEVICE).expand(65536, 1, 8)
    s = torch.zeros(1, 8, device=DEVICE).expand(65536, 8)
    with backend("triton"), pytest.raises(ValueError, match="adaln: a batch of 65536; expected at most 65535"):
        adaln(x, s, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_attention_takes_smaller_tiles_where_shared_memory_is_small(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, D: int
) -> None:
    file, q = kernel_file("attention"), torch.empty(1, 512, 1, D, dtype=dtype)
    large = file.config(q, 512, (True, True, True), False)
    monkeypatch.setattr(launch, "shared_memory", lambda x: 99 * 1024)
    if (D, dtype) == (256, torch.float32):
        with pytest.raises(ValueError, match="heads of 256 in torch.float32 take 192 KiB of shared memory, cpu has 99"):
            file.config(q, 512, (True, True, True), False)
        return
    small = file.config(q, 512, (True, True, True), False)
    row = D * q.element_size() * (1 if dtype == torch.float16 else 2)
    assert (2 * small["BLOCK_Q"] + 4 * small["num_stages"] * small["BLOCK_K"]) * row <= 99 * 1024
    biased = file.config(q, 512, (True, False, False), 2)
    pairs = biased["num_stages"] * biased["BLOCK_Q"] * biased["BLOCK_K"] * (q.element_size() + 1)
    assert (2 * biased["BLOCK_Q"] + 2 * biased["num_stages"] * biased["BLOCK_K"]) * row + pairs <= 99 * 1024
    assert small["BLOCK_Q"] * small["BLOCK_K"] <= large["BLOCK_Q"] * large["BLOCK_K"]


def test_what_only_the_compiler_does() -> None:
    """glumbconv's dx was zero on a GPU for a loop that lost a variable; attention and linear attention did not compile
    inside torch.compile for a scale in float64. Both were right in the interpreter."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "frontend.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["launches"] > 100 and found["lost"] == [] and found["double"] == []


@pytest.mark.skipif(DEVICE == "cuda", reason="with a device of its own making")
def test_a_configuration_is_a_constant_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an autograd.Function too, where a kernel asks for it; the names of devices are no part of a graph."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            found = launch._found("probe", x.device.index, (("C", x.shape[0]),))
            return x * (found or {"num_warps": 2})["num_warps"] * launch._shared_memory(None)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A Chip")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(launch, "_asked", lambda index: 3)
    x = torch.ones(5, requires_grad=True)
    y = torch.compile(lambda x: Scaled.apply(x), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, torch.full((5,), 6.0))
    launch.chips.cache_clear()
    launch._looked_up.cache_clear()


@pytest.mark.skipif(not launch.INTERPRETED, reason="about the interpreter")
def test_a_comparison_that_is_spread_over_a_block_is_a_truth() -> None:
    """Triton's interpreter gives it the type of what was compared; as integers it is no mask from 3.9 on."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    compared = TensorHandle(numpy.array([True]), language.int64)
    spread = InterpreterBuilder().create_splat(language.block_type(language.int1, [8]), compared)
    assert spread.data.dtype == bool and spread.data.tolist() == [True] * 8 and spread.dtype == language.int1
    number = TensorHandle(numpy.array([3], numpy.int64), language.int64)
    assert InterpreterBuilder().create_splat(language.block_type(language.int64, [8]), number).dtype == language.int64
