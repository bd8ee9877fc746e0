"""The Triton kernels beyond parity: refusals, the memory around their arguments, extremes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import SEED, compare, eager, floating, make, ours, outcome, outside
from places import ROOT
from torch import Tensor

from emf_kernels import REGISTRY, Case, Dual, Op, adaln, attention, backend, launch, linear_attention, rmsnorm
from emf_kernels.op import Backend

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
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
LIVE = pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, c, id=f"{op.name}-{c.name}") for op in KERNELS for c in op.cases if "test" in c.tags and c.live],
)


@CASES
@pytest.mark.usefixtures("as_on_a_gpu")
def test_memory_makes_no_difference(op: Op, case: Case) -> None:
    """Strides are kept, each tensor's own; nothing is read outside; and everything is the same a second time."""
    with backend("triton"):
        got, want = (outcome(op, case, torch.float32, ours, DEVICE, strided=strided) for strided in (True, False))
        if not launch.INTERPRETED:  # other strides are compiled anew, and round in another order
            plain, exact = (outcome(op, case, torch.float32, eager, DEVICE, exact=exact) for exact in (False, True))
            compare(got, plain, exact, torch.float32)
            got = outcome(op, case, torch.float32, ours, DEVICE)
    assert got.keys() == want.keys()
    assert [k for k in got if not torch.equal(got[k], want[k])] == [], f"seed {SEED}"


@pytest.mark.parametrize(
    ("op", "case", "name"),
    [
        pytest.param(op, c, name, id=f"{op.name}-{c.name}-{name}")
        for op in REGISTRY.values()
        for c in op.cases
        for name in ("reference", "triton")
        if "test" in c.tags and (op.triton or name == "reference")
    ],
)
def test_arguments_that_do_not_fit_are_refused(op: Op, case: Case, name: Backend) -> None:
    """The same by every backend."""
    args, x_dot, _ = make(op, case, torch.float32, DEVICE)
    bad: dict[str, Callable[[Tensor], Tensor]] = {
        "too narrow": lambda x: x[..., :-1],
        "one dimension more": lambda x: x[None],
        "another dtype": lambda x: x.double() if floating(x) else x.int() if x.dtype == torch.bool else x.short(),
        "integers": lambda x: x.long() if floating(x) else x.float(),
        "a list": lambda x: x.tolist(),
        "no elements": lambda x: x[:0],
        "last dimension strided": lambda x: torch.stack([x, x], -1)[..., 0],
    }
    if not op.triton:
        del bad["last dimension strided"]
    alone = sum(isinstance(v, Tensor) for v in args.values()) == 1  # with nothing else to fit to

    def still_fits(k: str, what: str, x: Tensor) -> bool:
        """One column has no stride; an op may take any number of dimensions; a tangent has any number of samples."""
        if what == "last dimension strided":
            return x.shape[-1] == 1
        if what == "one dimension more":
            return k in op.any_rank
        return (what == "no elements" and k.endswith("_dot")) or (alone and what in ("too narrow", "another dtype"))

    for k in op.any_rank:
        with backend(name):
            assert torch.is_tensor(op(**(args | {k: bad["one dimension more"](args[k])})))
    for k, v in args.items():
        for what, change in bad.items():
            if isinstance(v, Tensor) and not still_fits(k, what, v):
                with backend(name), pytest.raises(ValueError, match=f"^{op.name}: "):
                    op(**(args | {k: change(v)}))
                    pytest.fail(f"{k}, {what}")
    for k, d in x_dot.items():
        for what, change in bad.items():
            fewer = what == "no elements" or (what == "too narrow" and d.ndim == 1)
            if not (what == "last dimension strided" and d.shape[-1] == 1) and not (fewer and len(x_dot) == 1):
                with backend(name), pytest.raises(ValueError, match=f"^{op.name}: "):
                    ours(op, case, args, x_dot | {k: change(d)})
                    pytest.fail(f"{k}_dot, {what}")
            more = torch.cat([d, args[k][: len(args[k]) + 1 - len(d)]])
            with backend(name), pytest.raises(ValueError, match=f"^{op.name}: "):
                ours(op, case, args, x_dot | {k: more})
                pytest.fail(f"{k}_dot, more samples than {k}")


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


@LIVE
@pytest.mark.usefixtures("as_on_a_gpu")
def test_torch_func_jvp_of_a_kernel(op: Op, case: Case) -> None:
    """Value, tangent, and the gradients of the value around it, in a model that knows no Duals."""
    plain = outcome(op, case, torch.float32, eager, DEVICE)
    with backend("triton"):
        got = outcome(op, case, torch.float32, outside, DEVICE)
    compare(got, plain, outcome(op, case, torch.float32, eager, DEVICE, exact=True), torch.float32)


@EVERY
def test_forward_mode_and_what_has_no_derivative(op: Op) -> None:
    """torch.autograd.forward_ad; and where there is no derivative: never a wrong or a zero one."""
    case = next(c for c in op.cases if c.b == c.shape["B"])
    args, x_dot, _ = make(op, case, torch.float32, DEVICE)
    x_dot = x_dot or {k: torch.randn_like(args[k]) for k in op.differentiable or ()}
    live = list(x_dot)

    def f(*values: Tensor) -> Tensor:
        y = op(**(args | dict(zip(live, values, strict=True))))
        return y[0] if isinstance(y, tuple) else y

    def dual(*values: Tensor) -> Tensor:
        y = op(**(args | {k: Dual(v, x_dot[k]) for k, v in zip(live, values, strict=True)}))
        return (y[0] if isinstance(y, tuple) else y).primal

    values, dots = tuple(args[k] for k in live), tuple(x_dot[k] for k in live)
    with backend("triton"):
        leaf = values[0].clone().requires_grad_()
        (dx,) = torch.autograd.grad(f(leaf, *values[1:]).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dx.sum().backward()
        if op.name == "meanflow":
            with pytest.raises(ValueError, match="u takes no tangent"):
                torch.func.jvp(f, values, dots)
            return
        want = torch.func.jvp(f, values, dots)[1]
        with torch.autograd.forward_ad.dual_level():
            y = f(*(torch.autograd.forward_ad.make_dual(v, d) for v, d in zip(values, dots, strict=True)))
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(y).tangent, want)
        y_dot = torch.func.jvp(f, (leaf, *values[1:]), dots)[1]
        with pytest.raises(RuntimeError, match="no gradient: detach it"):
            y_dot.sum().backward()
        with pytest.raises(RuntimeError, match="around a Dual"):
            torch.func.jvp(dual, values, dots)


def test_forward_mode_inside_torch_compile_raises() -> None:
    """Which would leave the kernel's tangent out, in silence; plain torch it differentiates."""
    x, s = torch.randn(2, 3, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    run = lambda x: torch.func.jvp(lambda x: adaln(x, s, s), (x,), (x,))  # noqa: E731
    with backend("reference"):
        got = torch.compile(run, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(got, run(x))
    with backend("triton"), pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(run, backend="eager", fullgraph=True)(x)


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


@pytest.mark.parametrize("dead", ["k", "q"])
def test_linear_attention_where_no_feature_is_positive(dead: str) -> None:
    """The normaliser is eps = 1e-15 there, and every sum 0: zeros come out, not NaN."""
    args = {k: torch.randn(2, 5, 8, device=DEVICE).abs() for k in "qkv"}
    args[dead] = -args[dead] - 0.1
    leaves = {k: x.requires_grad_() for k, x in args.items()}
    with backend("triton"):
        duals = {k: Dual(x, torch.randn_like(x)) for k, x in leaves.items()}
        o = linear_attention(**duals, q_weight=None, k_weight=None, head_size=4)
    gradients = torch.autograd.grad(o.primal.sum(), list(leaves.values()))
    assert not o.primal.any() and not o.tangent.any() and not any(g.any() for g in gradients)


def test_rmsnorm_of_zeros() -> None:
    x, weight = torch.zeros(1, 3, 12, device=DEVICE), torch.ones(12, device=DEVICE)
    with backend("triton"):
        y = rmsnorm(Dual(x, torch.ones_like(x)), weight)
    want = torch.func.jvp(lambda x: rmsnorm.reference(x, weight), (x,), (torch.ones_like(x),))
    assert torch.equal(y.primal, x)
    torch.testing.assert_close(y.tangent, want[1])


def test_adaln_of_a_constant_row() -> None:
    x, one = torch.full((1, 3, 12), 7.0, device=DEVICE), torch.ones(1, 12, device=DEVICE)
    with backend("triton"):
        y = adaln(Dual(x, torch.zeros_like(x)), one, one)
    assert torch.equal(y.primal, torch.ones_like(x)) and not y.tangent.any()


def test_an_op_takes_no_helpers_from_another() -> None:
    """Only what it is made of: another op's reference and backward, and its own further files. And one factory makes
    every autograd.Function."""
    folder = Path(launch.__file__).parent / "ops"
    for file in folder.glob("*.py"):
        text = file.read_text()
        assert "autograd.Function" not in text and "setup_context" not in text, file.name
        op = next(name for name in (file.stem, file.stem.rpartition("_")[0]) if name in (*REGISTRY, "__init__", ""))
        for other, names in re.findall(r"^from (?:\.|emf_kernels\.ops\.)(\w+) import (.*)$", text, flags=re.MULTILINE):
            if other in REGISTRY or not other.startswith(f"{op}_"):
                assert {name.split()[0] for name in names.split(",")} <= {"reference", "backward"}, file.name


def test_the_readme_is_right() -> None:
    """Its examples run (the hub's: test_hub_kernel.py), and its table has every op and says which have a kernel."""
    text = (ROOT / "kernels" / "README.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        if "from kernels import" not in block:
            exec(block, names)
    assert names["u"].tangent.shape == (2, 16, 32) and names["w_qkv"].grad.any()
    assert names["o_dot"].shape == (2, 4, 16, 32) and names["o_dot"].any()
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| (yes|) ?\|$", text, flags=re.MULTILINE))
    assert table == {op.name: "yes" if op.triton else "" for op in REGISTRY.values()}
