"""What attention takes besides queries, keys and values: every pair of forms, and each by its own convention."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from parity import compare, eager, make, ours, outcome
from places import ROOT
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

from emf_kernels import Case, Dual, attention, backend, launch
from emf_kernels import scaled_dot_product_attention as sdpa
from emf_kernels.op import Backend

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"),
]
BOTH = pytest.mark.parametrize("name", ["reference", "triton"])
FORMS: dict[str, dict[str, int]] = {
    "key mask": dict(masked=1),
    "mask by query": dict(masked=2, mask_h=2),
    "mask of blocks": dict(masked=16, mask_h=2),
    "bias": dict(biased=1, bias_h=2),
    "causal": dict(causal=1),
    "causal, lower right": dict(causal=2),
    "grouped queries": dict(G=1),
    "packed": dict(packed=1),
}


def table() -> dict[tuple[str, str], str]:
    """The cells of the README's table of pairs of forms: (row, column) -> yes, no or one."""
    text = (ROOT / "kernels" / "README.md").read_text()
    head, _, *rows = re.search(r"(\| with \|.*\n(?:\|.*\n)+)", text)[1].strip().splitlines()  # type: ignore[index]
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]  # noqa: E731
    return {(row, column): cell for row, *rest in map(cells, rows) for column, cell in zip(cells(head)[1:], rest)}  # noqa: B905


def test_the_table_is_whole() -> None:
    cells = table()
    assert cells.keys() == {(a, b) for a in FORMS for b in FORMS}
    assert all(cells[a, b] == cells[b, a] and cells[a, b] in ("yes", "no", "one") for a, b in cells)
    assert all(cells[a, a] == "yes" for a in FORMS)
    shapes = [case.shape for case in attention.cases if "test" in case.tags]
    for form, wanted in FORMS.items():  # each has a case of its own too, for the laws, strides and mutations
        assert any(
            wanted.items() <= shape.items() or form == "mask of blocks" and shape.get("masked", 0) > 2
            for shape in shapes
        )


@pytest.mark.parametrize(("one", "other"), [(a, b) for i, a in enumerate(FORMS) for b in list(FORMS)[i:]])
def test_each_cell_of_the_table(one: str, other: str) -> None:
    """Value, tangents and every gradient, where two forms can be joined; a refusal where they cannot. "one": they are
    values of one argument."""
    case = Case("pair", dict(B=1, Nq=21, Nk=40, H=2, D=16) | FORMS[one] | FORMS[other], ("q", "k", "v"))
    same = any(k in FORMS[other] and FORMS[other][k] != v for k, v in FORMS[one].items() if k in ("masked", "causal"))
    cell = table()[one, other]
    assert (cell == "one") == same
    if cell == "yes":
        plain, exact = (outcome(attention, case, torch.float32, eager, DEVICE, exact=exact) for exact in (False, True))
        with backend("triton"):
            compare(outcome(attention, case, torch.float32, ours, DEVICE), plain, exact, torch.float32)
    elif cell == "no":
        for name in ("reference", "triton"):
            with backend(name), pytest.raises(ValueError, match="^attention: cu_seqlens_q and cu_seqlens_k beside"):
                attention(**make(attention, case, torch.float32, DEVICE)[0])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


Q, K = torch.zeros(2, 5, 4, 16), torch.zeros(2, 7, 2, 16)
CU = torch.tensor([[0, 3, 5], [0, 1, 5]], dtype=torch.int32)


@pytest.mark.skipif(DEVICE == "cuda", reason="the words name the CPU")
@BOTH
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(k=K.repeat(1, 1, 2, 1)[:, :, :3]), "k has 3 heads; expected a number that divides the 4 of q"),
        (dict(causal="lower"), "causal is 'lower'; expected False, True or 'lower right'"),
        (dict(mask=torch.ones(2, 1, 5, 6) > 0), r"mask is \(2, 1, 5, 6\); expected \(2, 1, 5, 7\)"),
        (dict(mask=torch.ones(3, 4, 5, 7) > 0), r"mask is \(3, 4, 5, 7\); expected \(2, 4, 5, 7\)"),
        (dict(mask=torch.ones(2, 5, 7) > 0), r"mask is \(2, 5, 7\); expected \(2, 7\)"),
        (dict(mask=torch.ones(1, 2, 1, 1) > 0, block=16), r"mask is \(1, 2, 1, 1\); expected \(1, 4, 1, 1\)"),
        (dict(mask=torch.ones(1, 1, 1, 1) > 0, block=24), "block is 24; expected a multiple of 16, with a mask"),
        (dict(mask=torch.ones(2, 7) > 0, block=16), "block is 16; expected a multiple of 16, with a mask of four"),
        (dict(mask=torch.ones(1, 1, 1, 1) > 0, block=16.0), "block is 16.0; expected an int"),
        (dict(block=16), "block is 16; expected a multiple of 16, with a mask of four"),
        (dict(bias=torch.ones(1, 1, 5, 7).half()), "bias is torch.float16 on cpu; expected torch.float32 on cpu"),
        (dict(bias=torch.ones(1, 1, 1, 7)), r"bias is \(1, 1, 1, 7\); expected \(1, 1, 5, 7\)"),
        (dict(bias=torch.ones(5, 7)), r"bias is \(5, 7\); expected \(2, 4, 5, 7\)"),
        (dict(bias=Dual(torch.ones(2, 1, 5, 7), torch.ones(2, 1, 5, 7))), "bias takes no tangent"),
        (dict(cu_seqlens_q=CU), "cu_seqlens_q alone; expected cu_seqlens_q and cu_seqlens_k, without a mask or bias"),
        (
            dict(cu_seqlens_q=CU.long(), cu_seqlens_k=CU.long()),
            "cu_seqlens_q is torch.int64 on cpu; expected torch.int32",
        ),
        (
            dict(cu_seqlens_q=CU, cu_seqlens_k=CU[:, :2]),
            r"cu_seqlens are \(2, 2\) and \(2, 3\); expected \[2, n",
        ),
        (
            dict(cu_seqlens_q=CU[0], cu_seqlens_k=CU[0]),
            r"cu_seqlens are \(3,\); expected \[2, n \+ 1\] with n at",
        ),
    ],
)
def test_refusals_say_what_was_wrong(name: Backend, more: dict[str, Any], message: str) -> None:
    with backend(name), pytest.raises(ValueError, match=f"^attention: {message}") as refusal:
        attention(**(dict(q=Q, k=K, v=more.get("k", K)) | more))
    assert "\n" not in str(refusal.value)


@BOTH
def test_causal_corners(name: Backend) -> None:
    """As PyTorch's documentation draws is_causal, and flash-attention's the lower right corner since 2.1."""
    drawn = {
        (2, 5, True): ["10000", "11000"],
        (5, 2, True): ["10", "11", "11", "11", "11"],
        (2, 5, "lower right"): ["11110", "11111"],
        (5, 2, "lower right"): ["00", "00", "00", "10", "11"],
    }
    for (Nq, Nk, causal), rows in drawn.items():
        q, k, v = normal(1, Nq, 1, 16), normal(1, Nk, 1, 16), normal(1, Nk, 1, 16)
        mask = torch.tensor([[c == "1" for c in row] for row in rows], device=DEVICE)
        with backend(name):
            torch.testing.assert_close(attention(q, k, v, None, causal), attention(q, k, v, mask[None, None]))


@BOTH
def test_sequences_are_as_if_alone(name: Backend) -> None:
    """And places beyond a row are taken for its end."""
    q, k, v, q_dot = normal(1, 9, 2, 16), normal(1, 11, 2, 16), normal(1, 11, 2, 16), normal(1, 9, 2, 16)
    places = (0, 4, 9), (0, 5, 11)
    cu = [torch.tensor([p], dtype=torch.int32, device=DEVICE) for p in places]
    with backend(name):
        for causal in (False, True, "lower right"):
            got = attention(Dual(q, q_dot), k, v, None, causal, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])
            for s in (0, 1):
                of_q, of_k = (slice(p[s], p[s + 1]) for p in places)
                want = attention(Dual(q[:, of_q], q_dot[:, of_q]), k[:, of_k], v[:, of_k], None, causal)
                torch.testing.assert_close(got.primal[:, of_q], want.primal)
                torch.testing.assert_close(got.tangent[:, of_q], want.tangent)
        if name == "triton":
            beyond = [torch.tensor([[-3, p[1], 10**6]], dtype=torch.int32, device=DEVICE) for p in places]
            far = attention(q, k, v, None, False, cu_seqlens_q=beyond[0], cu_seqlens_k=beyond[1])
            torch.testing.assert_close(far, attention(q, k, v, None, False, None, None, None, *cu))


def test_dead_blocks_are_not_computed() -> None:
    """What lies in them is not even read: NaN there reaches nothing."""
    q, k, v, dots = normal(1, 40, 1, 16), normal(1, 64, 1, 16), normal(1, 64, 1, 16), normal(1, 64, 1, 16)
    mask = torch.tensor(
        [[False, True, False, True], [False, True, True, False], [False, True, False, False]], device=DEVICE
    )
    k[:, :16] = v[:, :16] = dots[:, :16] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with backend("triton"):
        o = attention(q, Dual(k, dots), Dual(v, dots), mask[None, None], block=16)
        dq, dk, dv = torch.autograd.grad(o.primal.sum(), leaves)
    assert o.primal.isfinite().all() and o.tangent.isfinite().all() and dq.isfinite().all()
    assert not dk[:, :16].any() and not dv[:, :16].any() and dk[:, 16:].any() and dv[:, 16:].any()


def test_a_masked_key_does_not_reach_the_tangent() -> None:
    """Of s_dot the kernel takes away that of the first key, for precision; not where nobody attends to it."""
    q, k, v, q_dot = (normal(1, n, 1, 16) for n in (5, 20, 20, 5))
    k[:, 0] = 1e18
    dense = torch.ones(1, 1, 5, 20, dtype=torch.bool, device=DEVICE)
    dense[..., 0] = False
    bias = torch.zeros(1, 1, 5, 20, device=DEVICE).masked_fill(~dense, float("-inf"))
    k_late, v_late = (torch.cat([x[:, :1], x[:, :15], x[:, 1:]], 1) for x in (k, v))  # a block of 16 before the others
    k_late[:, :16] = 1e18
    want = attention(Dual(q, q_dot), k[:, 1:], v[:, 1:]).tangent
    blocks = torch.tensor([[[[False, True, True]]]], device=DEVICE)
    with backend("triton"):
        for args in (
            (k, v, dense[:, 0, 0]),
            (k, v, dense),
            (k, v, None, False, None, bias),
            (k_late, v_late, blocks, False, None, None, 16),
        ):
            torch.testing.assert_close(attention(Dual(q, q_dot), *args).tangent, want, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator made, in bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and not func.is_view:
                self.size = max(self.size, x.nbytes)
        return out


@pytest.mark.parametrize("form", FORMS)
def test_no_matrix_of_pairs_is_made(form: str) -> None:
    """Nothing larger than what was given (of which the interpreter makes copies), the gradient of a bias among it."""
    case = Case("long", dict(B=1, Nq=96, Nk=96, H=2, D=4) | FORMS[form], ("q", "k", "v"))
    args, dots, _ = make(attention, case, torch.float32, DEVICE)
    leaves = [args[k].requires_grad_() for k in ("q", "k", "v", "bias") if args[k] is not None]
    with backend("triton"), Largest() as made:
        o = attention(**(args | {k: Dual(args[k], d) for k, d in dots.items()}))
        torch.autograd.grad(o.primal, leaves, o.primal)
    assert made.size <= max(x.nbytes for x in args.values() if isinstance(x, Tensor))


def test_a_constant_bias_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module(attention.__module__), "_bwd_bias", None)
    q, k, v = (normal(1, 5, 1, 16).requires_grad_() for _ in "qkv")
    bias = normal(1, 1, 5, 5)
    with backend("triton"):
        torch.autograd.grad(attention(q, k, v, bias=bias).sum(), [q, k, v])
        with pytest.raises(TypeError):
            torch.autograd.grad(attention(q, k, v, bias=bias.requires_grad_()).sum(), [q, k, v])


def test_the_gradient_of_a_bias_by_torch_func() -> None:
    q, k, v = (normal(2, 5, 2, 16) for _ in "qkv")
    bias, f = normal(1, 2, 5, 5), lambda bias: attention(q, k, v, bias=bias).square().sum()
    with backend("triton"):
        got = torch.func.grad(f)(bias)
    torch.testing.assert_close(got, torch.func.grad(f)(bias), rtol=1e-4, atol=1e-5)


THEIRS = torch.nn.functional.scaled_dot_product_attention


@BOTH
def test_in_the_signature_of_sdpa(name: Backend) -> None:
    """As torch's own, which has a forward derivative in its MATH backend only: value, tangents and gradients."""
    q, k, v = (normal(2, 2, n, 16) for n in (5, 7, 7))
    lively = torch.rand(2, 2, 5, 7, device=DEVICE) < 0.6
    lively[..., 0] = True
    added = normal(2, 2, 5, 7)
    corner = torch.ones(5, 7, dtype=torch.bool, device=DEVICE)
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dict(scale=0.3), dict(scale=0.3)),
        (dict(is_causal=True), dict(is_causal=True)),
        (dict(attn_mask=causal_upper_left(5, 7)), dict(attn_mask=corner.tril())),
        (dict(attn_mask=causal_lower_right(5, 7)), dict(attn_mask=corner.tril(2))),
        (dict(attn_mask=lively[:, :1, :1], is_causal=True), dict(attn_mask=lively[:, :1, :1] & corner.tril())),
        *((dict(attn_mask=m), dict(attn_mask=m)) for m in (lively[:1, :1, :1], lively[:, :, :1], lively, lively[0, 0])),
        *((dict(attn_mask=m), dict(attn_mask=m)) for m in (added, added[0, 0], added[:, :, :1])),
    ]

    def run(f: Any, flags: dict[str, Any], *values: Tensor) -> list[Tensor]:
        bias = flags.get("attn_mask")
        own = type(bias) is Tensor and bias.is_floating_point() and bias.shape[-2] == 5
        flags = flags | (dict(attn_mask=bias.clone().requires_grad_()) if own else {})
        leaves = [x.clone().requires_grad_() for x in values]
        o, o_dot = torch.func.jvp(lambda *a: f(*a, **flags), tuple(leaves), tuple(x + 1 for x in values))
        leaves += [flags["attn_mask"]] if own else []
        return [o.detach(), o_dot.detach(), *torch.autograd.grad(o.square().sum(), leaves)]

    with backend(name), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for mine, theirs in ways:
            torch.testing.assert_close(run(sdpa, mine, q, k, v), run(THEIRS, theirs, q, k, v), rtol=1e-4, atol=1e-4)
        flags = dict(enable_gqa=True)
        got, want = (run(f, flags, q, k[:, :1], v[:, :1]) for f in (sdpa, THEIRS))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        q_dot = normal(2, 2, 5, 16)
        want = torch.func.jvp(lambda q: sdpa(q, k, v), (q,), (q_dot,))[1]
        assert torch.equal(sdpa(Dual(q, q_dot), k, v).tangent, want)


def test_what_sdpa_refuses() -> None:
    q, k = normal(2, 4, 5, 16), normal(2, 4, 7, 16)
    floats = normal(2, 4, 1, 7).requires_grad_()
    for wrong, message in (
        (dict(dropout_p=0.1), "dropout_p is 0.1; expected 0"),
        (dict(key=k[:, :2], value=k[:, :2]), r"key is \(2, 2, 7, 16\), enable_gqa is False"),
        (dict(attn_mask=torch.ones(5, 1) > 0), r"attn_mask is \(5, 1\); expected what broadcasts to \(2, 4, 5, 7\)"),
        (dict(attn_mask=torch.ones(3, 1, 5, 7) > 0), r"attn_mask is \(3, 1, 5, 7\); expected what broadcasts"),
        (dict(attn_mask=torch.ones(1, 2, 4, 5, 7) > 0), "attn_mask is .* expected what broadcasts"),
        (dict(attn_mask=causal_lower_right(7, 5)), "attn_mask is of lengths 7 and 5; expected 5 and 7"),
        (dict(attn_mask=floats), r"attn_mask \(2, 4, 1, 7\) requires grad; expected a row for each of 5 queries"),
    ):
        with pytest.raises(ValueError, match=f"^scaled_dot_product_attention: .*{message}"):
            sdpa(**(dict(query=q, key=k, value=k) | wrong))


@pytest.mark.parametrize("causal", [False, True, "lower right"])
def test_a_place_beyond_the_row_is_its_end(causal: Any) -> None:
    args, x_dot, _ = make(
        attention, Case("", dict(B=2, Nq=30, Nk=25, H=1, D=16, packed=1, b=1), tuple("qkv")), torch.float32, DEVICE
    )
    beyond = {
        k: torch.tensor([[0, 5, 99], [3, 10, 20]], dtype=torch.int32, device=DEVICE)
        for k in ("cu_seqlens_q", "cu_seqlens_k")
    }
    ends = {"cu_seqlens_q": 30, "cu_seqlens_k": 25}
    within = {k: torch.tensor([[0, 5, n], [3, 10, 20]], dtype=torch.int32, device=DEVICE) for k, n in ends.items()}
    wanted: Any = None
    for name in ("reference", "triton"):
        for places in (within, beyond):
            with backend(name):
                duals = {k: Dual(args[k], x_dot[k]) for k in "qkv"}
                o = attention(**duals, causal=causal, **places)
            wanted = o if wanted is None else wanted
            torch.testing.assert_close(o.primal, wanted.primal, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(o.tangent, wanted.tangent, rtol=1e-4, atol=1e-4)
