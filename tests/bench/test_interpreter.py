"""The interpreter that tests compute with: bfloat16 as torch rounds it, products as tensor cores make them, maxima as
a GPU has them; and the users' own again outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.interpreter import as_on_a_gpu
from emf_kernels import Dual, adaln, backend, launch

with launch.decorating():
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
BRAIN = torch.bfloat16
N = 64
# every class of number, and the two ties of which one goes down and one up to the even neighbour
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-40, 9.2e-41, 1.17e-38, 65504.0]
TIES = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, 2**-133 * 1.5, 3.3961e38]


@pytest.fixture(autouse=True)
def inside(request: pytest.FixtureRequest) -> Iterator[None]:
    if "users" in request.node.name:
        yield
        return
    with as_on_a_gpu():
        yield


def numbers(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[N] of all sizes, first the special ones and the ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=generator) * 10.0 ** torch.randint(-6, 6, (N,), generator=generator)
    x[: len(SPECIAL + TIES)] = torch.tensor(SPECIAL + TIES)
    return x.roll(7 * seed).to(dtype)


def same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())  # of zeros too


@InterpretedFunction
def _copy(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


DTYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casts(dtype: torch.dtype) -> None:
    """Forth and back."""
    x = numbers(torch.float32)
    if not dtype.is_floating_point:
        x = x.nan_to_num(0).clamp(-99, 99)
    x, y, back = x.to(dtype), torch.empty(N, dtype=BRAIN), torch.empty(N, dtype=dtype)
    _copy[(1,)](x, y, N)
    same(y, x.to(BRAIN))
    _copy[(1,)](y, back, N)
    same(back, y.to(dtype))


def test_ties_go_to_the_even_neighbour() -> None:
    """In bits, of which torch has no say."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00018000, 0x7F800000, 0xBF818000]
    want = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80, 0x0002, 0x7F80, 0xBF82]
    x, y = torch.tensor(bits).to(torch.uint32).view(torch.float32), torch.empty(len(bits), dtype=BRAIN)
    _copy[(1,)](x, y, len(bits))
    assert y.view(torch.uint16).tolist() == want
    _copy[(1,)](torch.full((2,), float("nan")), y[:2], 2)
    assert y[:2].isnan().all()


@InterpretedFunction
def _arithmetic(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(z_ptr + i, x + y)
    tl.store(z_ptr + N + i, x - y)
    tl.store(z_ptr + 2 * N + i, x * y)
    tl.store(z_ptr + 3 * N + i, x / y)
    tl.store(z_ptr + 4 * N + i, -x)
    tl.store(z_ptr + 5 * N + i, tl.where(x < y, x, y))
    tl.store(z_ptr + 6 * N + i, tl.abs(x))
    tl.store(z_ptr + 7 * N + i, x * 0.3 + 1)
    tl.store(z_ptr + 8 * N + i, tl.fma(x, y, x))


def test_arithmetic() -> None:
    x, y = numbers(BRAIN, 1), numbers(BRAIN, 2)
    z = torch.empty(9, N, dtype=BRAIN)
    _arithmetic[(1,)](x, y, z, N)
    constant = torch.tensor(0.3, dtype=BRAIN)  # as Triton has it: of the tensor's dtype
    want = [x + y, x - y, x * y, x / y, 0 - x, torch.where(x < y, x, y), x.abs(), x * constant + 1]
    want += [(x.float() * y + x).to(BRAIN)]
    for got, wanted in zip(z, want, strict=True):
        same(got, wanted)


@InterpretedFunction
def _dot(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(c_ptr + at, tl.dot(a, tl.trans(b), input_precision=PRECISION))


def test_products() -> None:
    """bfloat16 exactly, with sums in float32; float32 without the bits that a tensor core drops, or with all."""
    a, b = torch.randn(2, N, N)
    c = torch.empty(N, N)
    _dot[(1,)](a.to(BRAIN), b.to(BRAIN), c, "tf32", N)
    torch.testing.assert_close(c, a.to(BRAIN).float() @ b.to(BRAIN).float().T)
    brain = torch.empty(N, N, dtype=BRAIN)
    _dot[(1,)](a.to(BRAIN), b.to(BRAIN), brain, "tf32", N)
    same(brain, c.to(BRAIN))
    _dot[(1,)](a, b, c, "tf32x3", N)
    torch.testing.assert_close(c, a @ b.T)
    _dot[(1,)](a, b, c, "tf32", N)
    ten_bits = lambda x: (x.view(torch.int32) & -0x2000).view(torch.float32)  # noqa: E731
    torch.testing.assert_close(c, ten_bits(a) @ ten_bits(b).T)
    assert (c - a @ b.T).abs().max() > 1e-3


@InterpretedFunction
def _reduce(x_ptr, y_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, 4)
    x = tl.load(x_ptr + i[:, None] * 4 + j[None, :])
    tl.store(y_ptr + j, tl.sum(x, 0))
    tl.store(y_ptr + 4 + j, tl.max(x, 0))
    tl.store(y_ptr + 8 + j, tl.min(x, 0))
    tl.store(y_ptr + 12 + j, tl.argmax(x, 0))
    tl.store(y_ptr + 16 + tl.arange(0, 1), tl.sum(tl.sum(x, 1), 0))


def test_reductions() -> None:
    x, y = torch.randn(N, 4).to(BRAIN), torch.empty(17, dtype=BRAIN)
    _reduce[(1,)](x, y, N)
    same(y[:16].view(4, 4), torch.stack([x.sum(0), x.amax(0), x.amin(0), x.argmax(0).to(BRAIN)]))
    same(y[16], x.sum(1).sum())


@InterpretedFunction
def _add(y_ptr, place_ptr, x_ptr, before_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    before = tl.atomic_add(y_ptr + tl.load(place_ptr + i), tl.load(x_ptr + i), mask=i < N - 1)
    tl.store(before_ptr + i, before, mask=i < N - 1)


def test_atomic_addition() -> None:
    """One after the other, each rounded, what was there before handed back."""
    x, place = torch.randn(8).to(BRAIN), torch.tensor([0, 1, 0, 2, 0, 1, 3, 3])
    y, before = torch.zeros(4, dtype=BRAIN), torch.zeros(8, dtype=BRAIN)
    _add[(1,)](y, place, x, before, 8)
    want, seen = torch.zeros(4, dtype=BRAIN), []
    for i, at in enumerate(place[:7]):
        seen.append(want[at].clone())
        want[at] = want[at] + x[i]
    same(y, want)
    same(before[:7], torch.stack(seen))


@InterpretedFunction
def _extremes(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.maximum(x, 0))
    tl.store(y_ptr + N + i, tl.minimum(x, 0))
    tl.store(y_ptr + 2 * N + i, tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL))


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN], ids=str)
def test_a_maximum_drops_nan_unless_it_is_told(dtype: torch.dtype) -> None:
    x, y = torch.tensor([float("nan"), 2.0, -2.0, -0.5]).to(dtype), torch.empty(3, 4, dtype=dtype)
    _extremes[(1,)](x, y, 4)
    assert y[0].tolist() == [0, 2, 0, 0] and y[1].tolist() == [0, 0, -2, -0.5]
    assert y[2].isnan().tolist() == [True, False, False, False] and y[2, 1:].tolist() == [2, 0, 0]


def test_users_have_it_as_triton_has_it() -> None:
    """Outside bfloat16 is refused, and so is a call that was accepted inside."""
    x, s = torch.ones(1, 2, 4, dtype=BRAIN), torch.ones(1, 4, dtype=BRAIN)
    with backend("triton"), as_on_a_gpu():
        assert adaln(Dual(x, x), s, s).primal.dtype == BRAIN
    with backend("triton"), pytest.raises(ValueError, match="dtype torch.bfloat16 on cpu; Triton's interpreter"):
        adaln(Dual(x, x), s, s)
    y = torch.empty(1)
    _copy[(1,)](x[0, 0, :1], y, 1)
    assert y.item() == 1
    _extremes[(1,)](torch.full((1,), float("nan")), torch.empty(3), 1)
