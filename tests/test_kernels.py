"""The Triton kernels beyond parity: refusals, the memory around their arguments, extremes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import SEED, floating, make, ours, outcome
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emf_kernels import REGISTRY, Case, Dual, Op, adaln, attention, backend

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"),
]

KERNELS = [op for op in REGISTRY.values() if op.triton]
EVERY = pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
CASES = pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, c, id=f"{op.name}-{c.name}") for op in KERNELS for c in op.cases if "test" in c.tags],
)


def surrounded(x: Tensor) -> Tensor:
    """x as the corner of a larger tensor whose other elements are NaN (or True)."""
    larger = torch.full([n + 1 for n in x.shape], float("nan") if floating(x) else True, dtype=x.dtype, device=x.device)
    view = larger[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


@CASES
def test_strides_are_kept_and_nothing_is_read_outside(op: Op, case: Case) -> None:
    args, x_dot, _ = make(op, case, torch.float32, DEVICE)
    with backend("triton"):
        want = ours(op, case, args, x_dot)
        got = ours(
            op,
            case,
            {k: surrounded(v) if isinstance(v, Tensor) else v for k, v in args.items()},
            {k: surrounded(d) for k, d in x_dot.items()},
        )
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert torch.equal(a, b), f"seed {SEED}"


@CASES
def test_gradients_are_the_same_every_time(op: Op, case: Case) -> None:
    with backend("triton"):
        first, second = (outcome(op, case, torch.float32, ours, DEVICE) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@CASES
def test_arguments_that_do_not_fit_are_refused(op: Op, case: Case) -> None:
    args, x_dot, _ = make(op, case, torch.float32, DEVICE)
    bad: dict[str, Callable[[Tensor], Tensor]] = {
        "too narrow": lambda x: x[..., :-1],
        "one dimension more": lambda x: x[None],
        "another dtype": lambda x: x.double() if floating(x) else x.int(),
        "last dimension strided": lambda x: torch.stack([x, x], -1)[..., 0],
    }

    def still_fits(what: str, x: Tensor, alone: bool) -> bool:
        """One column has no stride; a vector is [B] or [b], and fewer samples are right where nothing else has any."""
        return x.shape[-1] == 1 if what == "last dimension strided" else what == "too narrow" and x.ndim == 1 and alone

    for k, v in args.items():
        alone = sum(isinstance(x, Tensor) for x in args.values()) == 1
        for what, change in bad.items():
            if isinstance(v, Tensor) and not still_fits(what, v, alone):
                with backend("triton"), pytest.raises(ValueError, match=f"^{op.name}: "):
                    op(**(args | {k: change(v)}))
                    pytest.fail(f"{k}, {what}")
    for k, d in x_dot.items():
        for what, change in bad.items():
            if not still_fits(what, d, len(x_dot) == 1):
                with backend("triton"), pytest.raises(ValueError, match=f"^{op.name}: "):
                    ours(op, case, args, x_dot | {k: change(d)})
                    pytest.fail(f"{k}_dot, {what}")


X, S = torch.zeros(3, 5, 8), torch.zeros(3, 8)
Q, K = torch.zeros(3, 5, 2, 16), torch.zeros(3, 7, 2, 16)


@pytest.mark.skipif(DEVICE == "cuda", reason="the words name the CPU")
@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        (adaln, (X, S[:, :7], S), r"adaln: scale is \(3, 7\); expected \(3, 8\)"),
        (adaln, (Dual(X, X), S, S.double()), r"adaln: shift is torch.float64 on cpu; expected torch.float32 on cpu"),
        (adaln, (Dual(X, X[:1]), Dual(S, S[:2]), S), r"adaln: the tangents cover different numbers .* \[1, 2\]"),
        (adaln, (X[:0], S[:0], S[:0]), r"adaln: x is empty \(0, 5, 8\)"),
        (adaln, tuple(a.bfloat16() for a in (X, S, S)), r"adaln: dtype torch.bfloat16 .* interpreter"),
        (attention, (Q, K, K[:, :6]), r"attention: v is \(3, 6, 2, 16\); expected \(3, 7, 2, 16\)"),
        (attention, (Q, K, K, torch.ones(3, 7)), r"attention: mask is torch.float32; expected bool"),
        (attention, (Q, K, K, torch.ones(3, 6).bool()), r"attention: mask is \(3, 6\); expected \(3, 7\)"),
        (attention, (Q, K[:, :0], K[:, :0]), r"attention: k is empty"),
        (attention, (Q.mT.contiguous().mT, K, K), r"attention: q \(3, 5, 2, 16\) has stride 2 in its last dimension"),
        (attention, tuple(torch.zeros(1, 2, 1, 264) for _ in "qkv"), r"attention: .*D at most 256"),
        (attention, tuple(a.bfloat16() for a in (Q, K, K)), r"attention: dtype torch.bfloat16 .* interpreter"),
    ],
)
def test_refusals_say_what_was_wrong(op: Op, args: tuple[Any, ...], message: str) -> None:
    with backend("triton"), pytest.raises(ValueError, match=message) as refusal:
        op(*args)
    assert "\n" not in str(refusal.value)


@EVERY
def test_what_a_kernel_cannot_differentiate_raises(op: Op) -> None:
    """Forward mode from outside, and a second derivative: never a wrong or a zero one."""
    case = op.cases[0]
    args, x_dot, _ = make(op, case, torch.float32, DEVICE)
    x_dot = x_dot or {k: torch.randn_like(args[k]) for k in op.differentiable or ()}
    live = list(x_dot)

    def f(*values: Tensor) -> Tensor:
        y = op(**(args | dict(zip(live, values, strict=True))))
        return y[0] if isinstance(y, tuple) else y

    values = tuple(args[k] for k in live)
    with backend("triton"):
        with pytest.raises(RuntimeError):
            torch.func.jvp(f, values, tuple(x_dot[k] for k in live))
        with pytest.raises(RuntimeError), torch.autograd.forward_ad.dual_level():
            f(*(torch.autograd.forward_ad.make_dual(v, x_dot[k]) for k, v in zip(live, values, strict=True)))
        leaf = values[0].requires_grad_()
        (dx,) = torch.autograd.grad(f(*values).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_attention_with_large_scores_and_without_a_live_key() -> None:
    q, k, v = (200 * torch.randn(2, n, 1, 16, device=DEVICE) for n in (5, 7, 7))
    mask = torch.tensor([[True] * 7, [False] * 7], device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with backend("triton"):
        o = attention(Dual(q, torch.randn_like(q)), k, v, mask)
    gradients = torch.autograd.grad(o.primal.sum(), leaves)
    want = attention.reference(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(o.primal.double(), want, rtol=1e-3, atol=1e-3)
    assert o.tangent.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert not any(x[1].any() for x in (o.primal, o.tangent, *gradients))


def test_adaln_of_a_constant_row() -> None:
    x, one = torch.full((1, 3, 12), 7.0, device=DEVICE), torch.ones(1, 12, device=DEVICE)
    with backend("triton"):
        y = adaln(Dual(x, torch.zeros_like(x)), one, one)
    assert torch.equal(y.primal, torch.ones_like(x)) and not y.tangent.any()


def test_flash_backward_takes_what_attention_hands_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments and shapes only, on tensors without data; a GPU's parity tests judge the numbers."""
    from emf_kernels.attention import _bwd

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "einsum", None)  # of which the plain backward is made
    with FakeTensorMode():
        q, k = (torch.empty(2, n, 3, 112, dtype=torch.bfloat16, device="cuda") for n in (64, 40))
        dq, dk, dv = _bwd(q, q, k, k, None, q, torch.empty(2, 3, 64, device="cuda"))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


def test_the_readme_is_right() -> None:
    """Its example runs, and its table has every op and says which have a kernel."""
    text = (Path(__file__).parent.parent / "kernels" / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert names["u"].tangent.shape == (2, 16, 32) and names["w_qkv"].grad.any()
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| (yes|) ?\|$", text, flags=re.MULTILINE))
    assert table == {op.name: "yes" if op.triton else "" for op in REGISTRY.values()}
