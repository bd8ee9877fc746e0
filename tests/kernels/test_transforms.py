"""What the function of a kernel is under torch's transforms, in threads and copies: right, or an error in one line."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import make, require_grad
from places import ROOT
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from emf_kernels import REGISTRY, Dual, Op, adaln, backend, glumbconv, launch, op, rmsnorm

KERNELS = [one for one in REGISTRY.values() if one.triton]
EVERY = pytest.mark.parametrize("kernel", KERNELS, ids=lambda one: one.name)
BOTH = pytest.mark.parametrize("name", ["reference", "triton"])
pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="these are about the interpreter's kernels")
Scalar = Callable[[Tensor], Tensor]


def scalar(kernel: Op) -> tuple[Scalar, Tensor]:
    """A curved function of the first differentiable argument of an op, and that argument."""
    case = next((c for c in kernel.cases if c.name == "channels"), kernel.cases[0])  # glumbconv's is its cheapest
    args, _, _ = make(kernel, case, torch.float32)
    first = (kernel.differentiable or list(args))[0]

    def f(x: Tensor) -> Tensor:
        y = kernel(**(args | {first: x}))
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    return f, args[first]


def with_graph(f: Scalar, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, create_graph=True)[0], x


def grad_of_grad(f: Scalar, x: Tensor) -> Any:
    dx, x = with_graph(f, x)
    return torch.autograd.grad(dx.sum(), x)


def with_the_value(f: Scalar, x: Tensor) -> Any:
    """The value and a penalty of its gradient, differentiated together."""
    x = x.clone().requires_grad_()
    y = f(x)
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    return torch.autograd.grad(y + dx.square().sum(), x)


def backward_to_an_input(f: Scalar, x: Tensor) -> Any:
    dx, x = with_graph(f, x)
    return dx.sum().backward(inputs=[x])


def forward_mode_around_grad(f: Scalar, x: Tensor) -> Any:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        return forward_ad.unpack_dual(torch.autograd.grad(f(x), x)[0])


SECOND = [
    grad_of_grad,
    with_the_value,
    backward_to_an_input,
    forward_mode_around_grad,
    lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
    lambda f, x: torch.autograd.functional.vhp(f, x, torch.ones_like(x)),
    lambda f, x: torch.autograd.functional.jvp(lambda x: with_graph(f, x)[0], x, torch.ones_like(x)),
    lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),)),
    lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
    lambda f, x: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1])(x),
    lambda f, x: torch.func.hessian(f)(x),
    lambda f, x: torch.func.jacrev(lambda x: torch.stack([f(x), f(2 * x)]))(x),
    lambda f, x: torch.func.jacfwd(f)(x),
    lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    lambda f, x: torch.func.linearize(f, x),
]


@pytest.mark.parametrize(
    ("kernel", "second"),
    [
        pytest.param(kernel, second, id=f"{kernel.name}-{i}")
        for kernel in KERNELS
        for i, second in enumerate(SECOND)
        # every way for a kernel whose backward is launched, for one of plain torch, and for one that saves its outputs
        if kernel.name in ("adaln", "attention", "time_embedding")
        or second in (with_the_value, forward_mode_around_grad)
    ],
)
def test_second_derivatives_vmap_and_linearize_raise(kernel: Op, second: Callable[[Scalar, Tensor], Any]) -> None:
    f, x = scalar(kernel)
    with backend("triton"), pytest.raises((RuntimeError, ValueError)) as error:
        second(f, x)
    assert "\n" not in str(error.value) or "vmap" in str(error.value)


@EVERY
def test_a_first_derivative_does_not_raise(kernel: Op) -> None:
    """By torch.func too, within a level of forward mode that nothing takes part in, and with a graph of its own."""
    f, x = scalar(kernel)
    with backend("triton"):
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(f(leaf), leaf)
        assert torch.equal(torch.func.grad(f)(x), want)
        assert torch.equal(torch.func.vjp(f, x)[1](torch.tensor(1.0))[0], want)
        assert torch.equal(with_graph(f, x)[0], want)
        with forward_ad.dual_level():
            f(leaf).backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, want)


@pytest.mark.parametrize("kernel", [one for one in KERNELS if one.live], ids=lambda one: one.name)
def test_a_first_derivative_of_duals(kernel: Op) -> None:
    case = next((c for c in kernel.cases if c.name == "channels"), kernel.cases[0])
    args, dots, _ = make(kernel, case, torch.float32)
    first = case.live[0]

    def f(x: Tensor) -> Tensor:
        values = args | {first: x}
        y = kernel(**{k: Dual(v, dots[k]) if k in dots else v for k, v in values.items()})
        return (y if isinstance(y, Dual) else y[0]).primal.square().sum()

    with backend("triton"):
        leaf = args[first].clone().requires_grad_()
        assert torch.equal(torch.func.grad(f)(args[first]), torch.autograd.grad(f(leaf), leaf)[0])


@EVERY
def test_checkpoints(kernel: Op) -> None:
    f, x = scalar(kernel)
    with backend("triton"):
        for run in (f, lambda x: checkpoint(f, x, use_reentrant=False)):
            leaf = x.clone().requires_grad_()
            run(leaf).backward()
            want = leaf.grad if run is f else want  # noqa: F821
    assert leaf.grad is not None and torch.equal(leaf.grad, want)


@EVERY
def test_a_gradient_is_not_the_tensor_that_was_given(kernel: Op) -> None:
    for case in (case for case in kernel.cases if "test" in case.tags):
        args, _, _ = make(kernel, case, torch.float32)
        names = require_grad(kernel, args)
        with backend("triton"):
            y = kernel(**args)
        y = [o for o in (y if isinstance(y, tuple) else (y,)) if o.requires_grad]
        dy = [torch.randn_like(o) for o in y]
        grads = torch.autograd.grad(y, [args[k] for k in names], dy, allow_unused=True)
        given = {x.data_ptr() for x in dy}
        assert not any(g.data_ptr() in given for g in grads if g is not None), case.name


@BOTH
def test_a_tangent_along_a_weight_is_refused(name: op.Backend) -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    image, taps, bias = torch.randn(1, 3, 3, 4), torch.randn(4, 1, 3, 3), torch.randn(4)
    with backend(name):
        with pytest.raises(ValueError, match="^rmsnorm: weight takes no tangent; expected a Dual for x alone$"):
            torch.func.jvp(lambda w: rmsnorm(x, w), (w,), (w,))
        with pytest.raises(ValueError, match="^rmsnorm: weight takes no tangent"):
            rmsnorm(x, Dual(w, w))
        with pytest.raises(ValueError, match="^glumbconv: weight takes no tangent"):
            torch.func.jvp(lambda a: glumbconv(image, a, bias), (taps,), (taps,))
        with forward_ad.dual_level(), pytest.raises(ValueError, match="^glumbconv: bias takes no tangent"):
            glumbconv(image, taps, forward_ad.make_dual(bias, bias))
        with pytest.raises(ValueError, match="^rmsnorm: eps is a Tensor; expected a constant"):
            rmsnorm(x, w, torch.tensor(1e-5))


@BOTH
def test_a_value_that_is_expanded(name: op.Backend) -> None:
    """One null condition for a whole batch; forward mode alone would refuse it."""
    x, s, x_dot = torch.randn(1, 4, 8), torch.randn(3, 8), torch.randn(3, 4, 8)
    leaf = x.clone().requires_grad_()
    with backend(name):
        for b in (3, 2):
            got = adaln(Dual(leaf.expand(3, -1, -1), x_dot[:b]), s, s)
            want = adaln(Dual(x.repeat(3, 1, 1), x_dot[:b]), s, s)
            torch.testing.assert_close(got, want)
        got.primal.sum().backward()
    assert leaf.grad is not None and leaf.grad.any()


def test_a_backend_is_forced_for_one_thread() -> None:
    x, seen = torch.ones(2, 3, 4), []
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with backend("triton"):
            inside.set()
            leave.wait(10)
            seen.append(adaln.backend_for(x))

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    assert adaln.backend_for(x) == "reference"
    with backend("reference"):
        leave.set()
        thread.join()
    assert seen == ["triton"] and adaln.backend_for(x) == "reference"


@pytest.mark.parametrize("one", REGISTRY.values(), ids=lambda one: one.name)
def test_an_op_is_copied_by_its_name(one: Op) -> None:
    assert pickle.loads(pickle.dumps(one)) is one and copy.deepcopy(one) is one


def test_a_call_that_was_accepted_does_not_let_others_in(monkeypatch: pytest.MonkeyPatch) -> None:
    x, s = torch.randn(3, 5, 8), torch.randn(3, 8)
    checks: list[int] = []
    accepts = adaln.accepts
    monkeypatch.setattr(adaln, "accepts", lambda *args: checks.append(1) or accepts(*args))
    monkeypatch.setattr(adaln, "_accepted", {})
    for name in ("reference", "triton"):
        with backend(name):  # type: ignore[arg-type]
            for _ in range(3):
                adaln(Dual(x, x[:2]), s, s)
    assert len(checks) == 2
    with backend("triton"):
        for wrong in (
            (Dual(x, x[:2].double()), s, s),
            (Dual(x, x.repeat(2, 1, 1)), s, s),
            (Dual(x, x[:2].mT.contiguous().mT), s, s),
            (Dual(x, x[:2].to("meta")), s, s),
            (Dual(x.bfloat16(), x[:2].bfloat16()), s.bfloat16(), s.bfloat16()),
            (Dual(x, [1.0]), s, s),
            (Dual(x, x[:2]), Dual(s, s[:1]), s),
            (Dual(x, x[:2]), s, s[:, :7]),
            (Dual(x, x[:2]), s, s, s),
        ):
            with pytest.raises(ValueError, match="^adaln: "):
                adaln(*wrong)
    monkeypatch.setattr(op, "KNOWN", 4)
    for n in range(1, 20):
        adaln(torch.ones(1, n, 4), torch.ones(1, 4), torch.ones(1, 4))
        assert len(adaln._accepted) <= 4


def printed(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # imports of this process may have set variables of the compilers', which would hide that a child's set them too
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHINDUCTOR_", "TRITON_"))}
    clean = ours | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = """
import torch
from emf_kernels import adaln, backend
with backend("triton"):
    try:
        print(adaln(torch.zeros(1, 2, 4), torch.zeros(1, 4), torch.ones(1, 4)).sum().item())
    except RuntimeError as error:
        print(error)
"""


def test_the_environment_is_left_as_it_was() -> None:
    """Kernels are made for the interpreter where there is no GPU, and a process started afterwards knows nothing of it.
    Where triton came first, or the user decided otherwise, the error says what to do."""
    told = "import os; before = dict(os.environ); import emf_kernels; assert dict(os.environ) == before\n"
    assert printed(told + CALL) == "8.0"
    assert printed("import triton\n" + told + CALL).endswith("or start Python with TRITON_INTERPRET=1")
    assert printed("import triton\n" + told + CALL, TRITON_INTERPRET="1") == "8.0"
    assert "compiled in this process" in printed(told + CALL, TRITON_INTERPRET="0")
