"""Every registered op, every case: against float64, by the laws of a tangent, and for what it keeps in memory.

Nothing here lists ops: a new one is tested the moment it is registered. Small cases are tested everywhere, the models'
real sizes where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph import kept
from parity import SEED, compare, eager, finite, gradients, make, ours, outcome, require_grad
from torch import Tensor

from emf_kernels import REGISTRY, Case, Dual, Op, adaln, backend, each, gated_residual, launch, lift, linear

GPU = [pytest.mark.gpu]  # deselected where there is none: conftest.py
INTERPRETER = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
WHOLE, HALF = torch.float32, torch.float16
DOUBLE, BRAIN = torch.float64, torch.bfloat16


def on(*targets: tuple[str, str, torch.dtype], live: bool = False) -> pytest.MarkDecorator:
    """Every op and case on each (backend, device, dtype) that it has. A GPU gets the models' real sizes too.
    live: only cases in which an argument carries a tangent (a loss has none: it is where tangents end)."""
    params = []
    cases = [(op, case) for op in REGISTRY.values() for case in op.cases if case.live or not live]
    every = [(op, case, target) for op, case in cases for target in targets]
    for op, case, (name, device, dtype) in every:
        if (name == "reference" or op.triton) and (device == "cuda" or "test" in case.tags):
            marks = GPU if device == "cuda" else [INTERPRETER] if name == "triton" else []
            label = "-".join((op.name, case.name, name, device, str(dtype).removeprefix("torch.")))
            params.append(pytest.param(op, case, name, device, dtype, id=label, marks=marks))
    return pytest.mark.parametrize(("op", "case", "name", "device", "dtype"), params)


@on(
    *(("reference", "cpu", dtype) for dtype in (DOUBLE, WHOLE, HALF)),
    *(("triton", device, dtype) for device in ("cpu", "cuda") for dtype in (WHOLE, HALF, BRAIN)),
    ("reference", "cuda", BRAIN),
)
@pytest.mark.usefixtures("poisoned", "as_on_a_gpu")
def test_parity(op: Op, case: Case, name: str, device: str, dtype: torch.dtype) -> None:
    """Value, tangent and every gradient."""
    plain = outcome(op, case, dtype, eager, device)
    if name == "reference" and not finite(plain):
        pytest.skip(f"{op.name}: its reference is not finite in {dtype}")
    with backend(name):
        got = outcome(op, case, dtype, ours, device)
    compare(got, plain, outcome(op, case, dtype, eager, device, exact=True), dtype)


@on(
    ("reference", "cpu", DOUBLE),
    ("triton", "cpu", WHOLE),
    ("triton", "cpu", BRAIN),
    ("triton", "cuda", WHOLE),
    live=True,
)
@pytest.mark.usefixtures("poisoned", "as_on_a_gpu")
def test_laws(op: Op, case: Case, name: str, device: str, dtype: torch.dtype) -> None:
    """What holds of any tangent, without a reference to compare with."""
    args, x_dot, generator = make(op, case, dtype, device)
    names = require_grad(op, args)
    # In half precision arguments, results, and what enters a product on tensor cores are rounded, not each of a sum's
    # steps. With 2, attention was at 0.99 of the tolerance for one seed of 192, and beyond it for another.
    tolerance = (64 if torch.finfo(dtype).bits >= 32 else 4) * torch.finfo(dtype).eps

    def same(a: list[Tensor], b: list[Tensor], what: str) -> None:
        for u, v in zip(a, b, strict=True):
            size = v.abs().max().item() if v.numel() else 0
            message = lambda m: f"{what} (seed {SEED}): {m}"  # noqa: E731
            torch.testing.assert_close(u, v, rtol=tolerance, atol=tolerance * size, msg=message)

    with backend(name):
        y, y_dot = ours(op, case, args, x_dot)
        tangent = lambda d: ours(op, case, args, d)[1]  # noqa: E731
        other = {k: torch.randn(d.shape, generator=generator).to(d) for k, d in x_dot.items()}
        combined = tangent({k: d - 2 * other[k] for k, d in x_dot.items()})
        same(combined, [a - 2 * b for a, b in zip(y_dot, tangent(other), strict=True)], "linear in the tangent")
        assert not any(d.any() for d in tangent({k: torch.zeros_like(d) for k, d in x_dot.items()})), "J 0 = 0"
        plain, none = ours(op, case, args, {})
        same(plain, y, "the value without a tangent")
        assert not none and not any(d.requires_grad for d in y_dot)
        for b in {0, min(1, case.b), max(case.b - 1, 0), case.b}:
            value, leading = ours(op, case, args, {k: d[:b] for k, d in x_dot.items()})
            same(leading, [d[:b] for d in y_dot], "the first b of the full tangent")
            same(value, y, "the value with fewer tangents")
        for k in x_dot:
            if len(x_dot) > 1:
                rest = {j: d for j, d in x_dot.items() if j != k}
                same(tangent(rest), tangent(x_dot | {k: torch.zeros_like(x_dot[k])}), f"{k} constant")
        w = [torch.randn(d.shape, generator=generator).to(d) for d in y_dot]
        padded = [torch.cat([v, torch.zeros_like(o[len(v) :])]) for v, o in zip(w, y, strict=True)]
        dx = gradients(args, names, y, padded)
    forward = sum((v.double() * d.double()).sum() for v, d in zip(w, y_dot, strict=True))
    backward = sum((dx[k][: case.b].double() * d.double()).sum() for k, d in x_dot.items())
    size = sum(v.double().norm() * d.double().norm() for v, d in zip(w, y_dot, strict=True))
    assert abs(forward - backward) <= tolerance * size, f"<w, J x_dot> = <J^T w, x_dot> (seed {SEED})"


@on(("reference", "cpu", DOUBLE), live=True)
def test_gradcheck_of_the_reference(op: Op, case: Case, name: str, device: str, dtype: torch.dtype) -> None:
    args, _, _ = make(op, case, dtype)
    for x in args.values():
        if isinstance(x, Tensor) and x.is_floating_point():  # a finite difference must not cross relu's kink
            x[x.abs() < 1e-4] = 1e-4
    names = require_grad(op, args)
    f = lambda *values: op.reference(**(args | dict(zip(names, values, strict=True))))  # noqa: E731
    assert torch.autograd.gradcheck(f, [args[k] for k in names], check_forward_ad=True, fast_mode=True), f"seed {SEED}"


@on(("reference", "cpu", WHOLE), ("triton", "cpu", WHOLE))
def test_a_dual_keeps_for_backward_what_its_primal_keeps(
    op: Op, case: Case, name: str, device: str, dtype: torch.dtype
) -> None:
    def bytes_kept(x_dot: dict[str, Tensor]) -> int:
        args, _, _ = make(op, case, dtype)
        require_grad(op, args)
        with backend(name):
            return kept(*ours(op, case, args, x_dot)[0])

    x_dot = make(op, case, dtype)[1]
    plain = bytes_kept({})
    assert case.b < case.shape["B"] or bytes_kept(x_dot) == plain
    # A split batch may hold in both halves what does not depend on the sample, such as a sinusoid's frequencies; and
    # torch's batched product keeps a packed copy of a transposed slice, where it keeps the whole tensor as it is.
    args = make(op, case, dtype)[0]
    packed = sum(args[k].nbytes for k in "qkv") if (op.name, name) == ("attention", "reference") else 0
    assert bytes_kept({k: d[:1] for k, d in x_dot.items()}) <= plain + 64 + packed


def test_lift_computes_no_value_twice() -> None:
    seen: list[int] = []

    def reference(x: Tensor, scale: Tensor, w: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return torch.tanh(x @ w) * scale

    dual = lift(reference, batched=("x", "scale"))
    x, scale, w = torch.randn(5, 3, requires_grad=True), torch.randn(5, 1), torch.randn(3, 3, requires_grad=True)
    for b in (0, 2, 5):
        seen.clear()
        y = dual(Dual(x, torch.randn(b, 3)), scale, w)
        assert sum(seen) == 5 and y.tangent.shape == (b, 3)
        assert y.primal.requires_grad and not y.tangent.requires_grad and y.tangent.grad_fn is None
        torch.testing.assert_close(y.primal, torch.tanh(x @ w) * scale)


def test_lift_refuses_tangents_that_do_not_fit() -> None:
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"different numbers of leading samples \[1, 2\]"):
        gated_residual.dual(Dual(x, x[:1]), None, Dual(x, x[:2]))
    with pytest.raises(ValueError, match=r"tangent \(6, 3\) does not fit primal \(5, 3\)"):
        gated_residual.dual(x, None, Dual(x, torch.randn(6, 3)))


def test_a_dual_has_no_arithmetic() -> None:
    x = Dual(torch.ones(2), torch.ones(2))
    for act in (lambda: x + x, lambda: x * 2, lambda: 2 * x, lambda: (1,) + x):
        with pytest.raises(TypeError, match="no arithmetic"):
            act()
    assert each(lambda a: a.reshape(2, 1), x).tangent.shape == (2, 1)


def test_a_kernel_that_is_not_there_is_an_error() -> None:
    with backend("triton"), pytest.raises(ValueError, match="silu: no Triton kernel"):
        REGISTRY["silu"](torch.ones(2))
    with pytest.raises(ValueError, match="'cuda' is unknown"), backend("cuda"):
        pass


OLD = pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 ends here in an internal error of its own")


@pytest.mark.parametrize(
    ("b", "dynamic"), [(1, False), pytest.param(3, False, marks=OLD), pytest.param(1, True, marks=OLD)]
)
def test_a_chain_of_duals_compiles_to_one_graph(b: int, dynamic: bool) -> None:
    x, h, w = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.randn(8, 8)
    scale, shift, x_dot = torch.randn(3, 8), torch.randn(3, 8), torch.randn(b, 5, 8)

    def chain(x: Tensor, x_dot: Tensor, w: Tensor) -> Any:
        u = adaln(Dual(x, x_dot), scale, shift)
        return gated_residual(u, None, each(lambda a: a * 2, linear(u, w, None)))

    def run(f: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = f(leaves[0], x_dot, leaves[1])
        return [y.primal.detach(), y.tangent, *torch.autograd.grad((y.primal * h).sum(), leaves)]

    with backend("reference"):
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        got, want = run(compiled), run(chain)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c)


def test_what_was_compiled_for_one_backend_is_not_run_for_another() -> None:
    compiled = torch.compile(lambda x: REGISTRY["silu"](x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.nn.functional.silu(torch.ones(2)))
    with backend("triton"), pytest.raises(Exception, match="no Triton kernel"):
        compiled(torch.ones(2))
    compiled(torch.ones(2))


LIVE = [op for op in REGISTRY.values() if op.cases[0].live]


@pytest.mark.parametrize(
    ("op", "name", "device", "compiler"),
    [
        *(pytest.param(op, "reference", "cpu", "aot_eager", id=f"{op.name}-cpu") for op in LIVE),
        *(pytest.param(op, "triton", "cuda", "inductor", id=f"{op.name}-cuda", marks=GPU) for op in LIVE if op.triton),
    ],
)
def test_every_op_compiles_with_duals(op: Op, name: str, device: str, compiler: str) -> None:
    """To one graph, forward and backward; tensors carry the tangents in and out."""
    torch._dynamo.reset()  # `run` is one code object for all ops, of which eight versions are kept
    args, x_dot, _ = make(op, op.cases[0], WHOLE, device)
    results: list[list[Tensor]] = []
    fixed = {k: v for k, v in args.items() if not isinstance(v, Tensor)}
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor)}

    def run(tensors: dict[str, Tensor], x_dot: dict[str, Tensor]) -> list[Tensor]:
        y = op(**fixed, **{k: Dual(v, x_dot[k]) if k in x_dot else v for k, v in tensors.items()})
        return [half for d in ([y] if isinstance(y, Dual) else y) for half in d]

    names = require_grad(op, args)
    with backend(name):
        for f in (run, torch.compile(run, fullgraph=True, backend=compiler)):
            halves = f(tensors, x_dot)
            grads = gradients(args, names, halves[::2], [torch.ones_like(y) for y in halves[::2]])
            results.append([*halves, *grads.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
