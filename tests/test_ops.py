"""Every registered op, every test case, against float64: value, tangent, gradients; and the laws that need no
reference.

Nothing here lists ops: a new one is tested the moment it is registered. Inputs are fresh in every run; the seed is
printed by a failure.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from graph import kept
from torch import Tensor

from emf_kernels import REGISTRY, Case, Dual, Op, backend, each, lift, primal

SEED = int(os.environ.get("EMF_TEST_SEED", random.randrange(2**31)))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in REGISTRY.values()
    for case in op.cases
    if "test" in case.tags
]
FUSED = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype)[6:]}")
    for op in REGISTRY.values()
    if op.triton is not None
    for case in op.cases
    if "test" in case.tags
    for dtype in (torch.float32, *HALVES)
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freshly allocated memory is full of NaN: an element that a kernel does not write shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def make(
    op: Op, case: Case, dtype: torch.dtype, salt: int = 0
) -> tuple[dict[str, Any], dict[str, Tensor], torch.Generator]:
    """(arguments by name, tangents [b, ...] of the live ones)."""
    generator = torch.Generator().manual_seed(SEED + salt)
    args = op.inputs(case, dtype, DEVICE, generator)
    tangents = {
        k: torch.randn(args[k].shape, generator=generator, dtype=torch.float64)[: case.b].to(DEVICE, dtype)
        for k in case.live
    }
    return args, tangents, generator


def call(op: Op, args: dict[str, Any], tangents: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(primals, tangents) of the outputs."""
    y = op(**{k: Dual(v, tangents[k]) if k in tangents else v for k, v in args.items()})
    outputs = [y] if isinstance(y, (Dual, Tensor)) else list(y)
    return [primal(o) for o in outputs], [o.tangent for o in outputs if isinstance(o, Dual)]


def truth(op: Op, case: Case, args: dict[str, Any], tangents: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same in float64, straight from torch.func.jvp of the reference over the whole batch with zero tangents for
    the rest: not through lift."""
    live = list(case.live)

    def f(*values: Tensor) -> Any:
        y = op.reference(**(args | dict(zip(live, values, strict=True))))
        return y if isinstance(y, tuple) else (y,)

    if not live:
        return list(f()), []
    full = [torch.cat([tangents[k], torch.zeros_like(args[k][case.b :])]) for k in live]
    y, y_dot = torch.func.jvp(f, tuple(args[k] for k in live), tuple(full))
    return list(y), [d[: case.b].detach() for d in y_dot]


def widen(x: Any) -> Any:
    return x.detach().double() if floating(x) else x


def gradients(op: Op, args: dict[str, Any], outputs: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    names = [k for k, v in args.items() if floating(v) and v.requires_grad and v.numel()]
    used = [(o, w) for o, w in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], [args[k] for k in names], [w for _, w in used], allow_unused=True)
    return {k: g for k, g in zip(names, grads, strict=True) if g is not None}


def require_grad(op: Op, args: dict[str, Any]) -> None:
    for k, v in args.items():
        if floating(v) and (op.differentiable is None or k in op.differentiable):
            v.requires_grad_()


def all_of(op: Op, case: Case, dtype: torch.dtype, run: Any, salt: int = 0) -> dict[str, Tensor]:
    """Everything an op gives, by name: y0.., y0_dot.., d<argument>."""
    args, tangents, generator = make(op, case, dtype, salt)
    if run is truth:
        args, tangents = {k: widen(v) for k, v in args.items()}, {k: widen(v) for k, v in tangents.items()}
    require_grad(op, args)
    y, y_dot = run(op, case, args, tangents) if run is truth else run(op, args, tangents)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(DEVICE, o.dtype) for o in y]
    result = {f"y{i}": o for i, o in enumerate(y)} | {f"y{i}_dot": o for i, o in enumerate(y_dot)}
    return result | {f"d{k}": g for k, g in gradients(op, args, y, weights).items()}


def compare(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """At most twice eager's own error in the same dtype, as an L2 norm; below two roundings of the result itself an
    error is rounding."""
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        assert got[name].shape == want.shape, name
        assert got[name].isfinite().all(), f"{name} is not finite (seed {SEED})"
        floor = 2 * torch.finfo(dtype).eps * max(want.norm().item(), 1e-3 * want.numel() ** 0.5)
        error, allowed = ((x.double() - want).norm().item() for x in (got[name], eager[name]))
        assert error <= max(2 * allowed, floor), (
            f"{name}: error {error:.2e}, eager's {allowed:.2e}, floor {floor:.2e} (seed {SEED})"
        )


@pytest.mark.parametrize(("op", "case"), CASES)
def test_dual_is_exact_in_float64(op: Op, case: Case) -> None:
    with backend("reference"):
        got = all_of(op, case, torch.float64, call)
    for name, want in all_of(op, case, torch.float64, truth).items():
        torch.testing.assert_close(
            got[name], want, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n} (seed {SEED}): {m}"
        )


@pytest.mark.parametrize(("op", "case", "dtype"), FUSED)
def test_kernel_parity(op: Op, case: Case, dtype: torch.dtype) -> None:
    with backend("triton"):
        got = all_of(op, case, dtype, call)
    with backend("reference"):
        eager = all_of(op, case, dtype, call)
    compare(got, eager, all_of(op, case, dtype, truth), dtype)


@pytest.mark.parametrize(("op", "case", "dtype"), [p for p in FUSED if p.values[2] == torch.float32])
def test_laws(op: Op, case: Case, dtype: torch.dtype) -> None:
    """Linear in the tangent, J 0 = 0, leading b agrees with the full dual, <w, J x_dot> = <J^T w, x_dot>."""
    args, tangents, generator = make(op, case, dtype)
    require_grad(op, args)
    with backend("triton"):
        y, y_dot = call(op, args, tangents)
        _, zero = call(op, args, {k: torch.zeros_like(d) for k, d in tangents.items()})
        _, double = call(op, args, {k: -2 * d for k, d in tangents.items()})
        one = min(1, case.b)
        _, leading = call(op, args, {k: d[:one] for k, d in tangents.items()})
        plain, none = call(op, args, {})
        w = [torch.randn(d.shape, generator=generator).to(DEVICE, dtype) for d in y_dot]
        padded = [torch.cat([v, torch.zeros_like(o[len(v) :])]) for v, o in zip(w, y, strict=True)]
        cotangents = gradients(op, args, y, padded)
    assert not none and all(not d.requires_grad for d in y_dot)
    for i, d in enumerate(y_dot):
        torch.testing.assert_close(plain[i], y[i])
        assert not zero[i].any()
        torch.testing.assert_close(double[i], -2 * d, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leading[i], d[:one], rtol=1e-5, atol=1e-5)
    forward = sum((v.double() * d.double()).sum() for v, d in zip(w, y_dot, strict=True))
    backward = sum((cotangents[k][: case.b].double() * d.double()).sum() for k, d in tangents.items())
    size = sum((v.double() * d.double()).abs().sum() for v, d in zip(w, y_dot, strict=True))
    assert abs(forward - backward) <= 1e-5 * size, f"seed {SEED}"


@pytest.mark.parametrize(("op", "case"), CASES)
def test_reference_passes_gradcheck(op: Op, case: Case) -> None:
    args, _, _ = make(op, case, torch.float64)
    names = [
        k
        for k, v in args.items()
        if floating(v) and v.numel() and (op.differentiable is None or k in op.differentiable)
    ]
    f = lambda *values: op.reference(**(args | dict(zip(names, values, strict=True))))  # noqa: E731
    if op.differentiable is not None:
        pytest.skip("target and weight are stop-gradients: the derivative is not the function's own")
    if op.name == "linear_attention" or args[names[0]].numel() > 400:
        pytest.skip("finite differences: kinks of relu, or too many elements")
    assert torch.autograd.gradcheck(f, [args[k].requires_grad_() for k in names], check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_dual_keeps_no_more_for_backward_than_the_primal(op: Op, case: Case) -> None:
    if not case.live:
        pytest.skip("nothing live")

    def held(tangents: dict[str, Tensor]) -> int:
        args, _, _ = make(op, case, torch.float32)
        require_grad(op, args)
        with backend("reference"):
            y, _ = call(op, args, tangents)
        return kept(*(o for o in y if o.requires_grad))

    if case.b == case.shape["B"]:  # a split batch keeps the same values in two pieces
        assert held(make(op, case, torch.float32)[1]) <= held({})


def test_no_value_is_computed_twice() -> None:
    seen: list[int] = []

    def reference(x: Tensor, w: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return torch.tanh(x @ w)

    dual = lift(reference, batched=("x",))
    x, w = torch.randn(5, 3), torch.randn(3, 3)
    for b in (0, 2, 5):
        seen.clear()
        y = dual(Dual(x, torch.randn(b, 3)), w)
        assert sum(seen) == 5 and y.tangent.shape == (b, 3)
        torch.testing.assert_close(y.primal, torch.tanh(x @ w))


def test_a_dual_has_no_arithmetic() -> None:
    x = Dual(torch.ones(2), torch.ones(2))
    for act in (lambda: x + x, lambda: x * 2, lambda: 2 * x, lambda: (1,) + x):
        with pytest.raises(TypeError, match="no arithmetic"):
            act()
    assert each(lambda a: a.reshape(2, 1), x).tangent.shape == (2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"scale": a["scale"][:, :-1]}, "scale"),
        (lambda a: a | {"x": a["x"].transpose(1, 2).contiguous().transpose(1, 2)}, "stride"),
        (lambda a: a | {"x": a["x"].bfloat16()}, "bfloat16|scale"),
        (lambda a: a | {"shift": a["shift"].long()}, "shift"),
        (lambda a: a | {"x": Dual(a["x"], torch.zeros(4, 5, 8))}, "tangent"),
        (lambda a: a | {"x": Dual(a["x"], a["x"][:1]), "scale": Dual(a["scale"], a["scale"][:2])}, "different numbers"),
        (lambda a: {k: v[:0] for k, v in a.items()}, "empty"),
    ],
)
def test_adaln_refuses(change: Any, message: str) -> None:
    args, _, _ = make(REGISTRY["adaln"], REGISTRY["adaln"].cases[0], torch.float32)
    with backend("triton"), pytest.raises(ValueError, match=message):
        REGISTRY["adaln"](**change(args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"mask": a["mask"][:, :-1]}, "mask"),
        (lambda a: a | {"mask": a["mask"].float()}, "bool"),
        (lambda a: a | {"v": a["v"][:, :-1]}, "v is"),
        (lambda a: a | {"k": a["k"][:, :0], "v": a["v"][:, :0], "mask": a["mask"][:, :0]}, "empty"),
        (lambda a: {k: torch.zeros(1, 2, 1, 300) for k in "qkv"} | {"mask": None}, "256"),
    ],
)
def test_attention_refuses(change: Any, message: str) -> None:
    args, _, _ = make(REGISTRY["attention"], REGISTRY["attention"].cases[1], torch.float32)
    with backend("triton"), pytest.raises(ValueError, match=message):
        REGISTRY["attention"](**change(args))


@pytest.mark.parametrize("op", [op for op in REGISTRY.values() if op.triton], ids=lambda op: op.name)
def test_func_jvp_of_a_kernel_raises_rather_than_lies(op: Op) -> None:
    args, tangents, _ = make(op, op.cases[0], torch.float32)
    live = list(tangents)
    f = lambda *values: op(**(args | dict(zip(live, values, strict=True))))  # noqa: E731
    with backend("triton"), pytest.raises(RuntimeError):
        torch.func.jvp(f, tuple(args[k] for k in live), tuple(tangents[k] for k in live))


def test_attention_extremes() -> None:
    """Logits of +-1e4, and a sample whose every key is masked: finite, and what float64 says."""
    attention = REGISTRY["attention"]
    q, k, v = torch.randn(2, 5, 1, 16) * 200, torch.randn(2, 7, 1, 16) * 200, torch.randn(2, 7, 1, 16)
    mask = torch.tensor([[True] * 7, [False] * 7])
    with backend("triton"):
        o = attention(Dual(q, torch.randn_like(q)), k, v, mask)
    want = attention.reference(q.double(), k.double(), v.double(), mask)
    assert o.tangent.isfinite().all()
    assert not o.primal[1].any() and not o.tangent[1].any()
    torch.testing.assert_close(o.primal.double(), want, rtol=1e-3, atol=1e-3)


def test_adaln_of_a_constant_row_is_finite() -> None:
    adaln = REGISTRY["adaln"]
    x = torch.full((1, 3, 16), 7.0)
    with backend("triton"):
        y = adaln(Dual(x, torch.zeros_like(x)), torch.ones(1, 16), torch.ones(1, 16))
    assert y.tangent.isfinite().all()
    torch.testing.assert_close(y.primal, torch.ones_like(x))


def test_forcing_a_kernel_that_does_not_exist_is_an_error() -> None:
    with backend("triton"), pytest.raises(ValueError, match="no Triton kernel"):
        REGISTRY["silu"](torch.ones(2))
