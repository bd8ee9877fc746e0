"""What an op gives in a dtype, what plain torch gives, and what both should give: the same in float64."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emf_kernels import Case, Dual, Op, primal

# Fresh in every run, printed by a failure; EMF_TEST_SEED repeats one.
SEED = int(os.environ.get("EMF_TEST_SEED", random.randrange(2**31)))

Outcome = dict[str, Tensor]
Run = Callable[[Op, Case, dict[str, Any], dict[str, Tensor]], tuple[list[Tensor], list[Tensor]]]


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def draw(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, dtype)


def make(
    op: Op, case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor], torch.Generator]:
    """(arguments by name, tangents [b, ...] of the live ones, the generator, to go on with); the same in every call."""
    generator = torch.Generator().manual_seed(SEED)
    args = op.inputs(case, dtype, device, generator)
    return args, {k: draw(args[k], dtype, generator)[: case.b] for k in case.live}, generator


def spread(tensors: dict[str, Any], first: int = 0) -> dict[str, Any]:
    """The same values, each tensor as the corner of a larger one of NaN (or True): its strides are its own, no two
    tensors' are alike. Only the last dimension stays contiguous."""

    def larger(x: Tensor, i: int) -> Tensor:
        sizes = [n + 1 + (i % 3 if dim < x.ndim - 1 else i) for dim, n in enumerate(x.shape)]
        around = torch.full(sizes, float("nan") if floating(x) else True, dtype=x.dtype, device=x.device)
        return around[tuple(slice(n) for n in x.shape)].copy_(x)

    return {k: larger(x, first + i) if isinstance(x, Tensor) else x for i, (k, x) in enumerate(tensors.items())}


def require_grad(op: Op, args: dict[str, Any]) -> list[str]:
    """The names of the differentiable arguments, which now require grad."""
    names = [k for k, v in args.items() if floating(v) and v.numel()]
    names = [k for k in names if op.differentiable is None or k in op.differentiable]
    for k in names:
        args[k].requires_grad_()
    return names


def ours(op: Op, case: Case, args: dict[str, Any], tangents: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(values, tangents) of the outputs, by the op with Duals."""
    y = op(**{k: Dual(v, tangents[k]) if k in tangents else v for k, v in args.items()})
    outputs = [y] if isinstance(y, (Dual, Tensor)) else list(y)
    return [primal(o) for o in outputs], [o.tangent for o in outputs if isinstance(o, Dual)]


def by_func_jvp(choose: Callable[[Op], Callable[..., Any]]) -> Run:
    """By torch.func.jvp over plain tensors, the whole batch, zero tangents after b."""

    def run(op: Op, case: Case, args: dict[str, Any], tangents: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        live, fn = list(tangents), choose(op)

        def f(*values: Tensor) -> tuple[Tensor, ...]:
            y = fn(**(args | dict(zip(live, values, strict=True))))
            return y if isinstance(y, tuple) else (y,)

        if not live:
            return list(f()), []
        full = tuple(torch.cat([tangents[k], torch.zeros_like(args[k][len(tangents[k]) :])]) for k in live)
        y, y_dot = torch.func.jvp(f, tuple(args[k] for k in live), full)
        return list(y), [d[: case.b].detach() for d in y_dot]

    return run


eager = by_func_jvp(lambda op: op.reference)  # plain torch, not through lift
outside = by_func_jvp(lambda op: op)  # the op as a model that knows no Duals calls it


def gradients(args: dict[str, Any], names: list[str], y: list[Tensor], dy: list[Tensor]) -> Outcome:
    """Zeros where an output does not depend on an argument."""
    used = [(o, w) for o, w in zip(y, dy, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in used], [args[k] for k in names], [w for _, w in used], allow_unused=True, retain_graph=True
    )
    return {k: torch.zeros_like(args[k]) if g is None else g for k, g in zip(names, grads, strict=True)}


def outcome(
    op: Op,
    case: Case,
    dtype: torch.dtype,
    run: Run,
    device: str = "cpu",
    *,
    exact: bool = False,
    strided: bool = False,
) -> Outcome:
    """Everything that a run gives, by name: y0.., y0_dot.., d<argument>, and of several outputs d<argument>_of_y0..,
    with one of them used alone. exact: of the same inputs, in float64. strided: of the same, spread in memory."""
    args, tangents, generator = make(op, case, dtype, device)
    if exact:
        args = {k: v.double() if floating(v) else v for k, v in args.items()}
        tangents = {k: d.double() for k, d in tangents.items()}
    if strided:
        args, tangents = spread(args), spread(tangents, len(args))
    names = require_grad(op, args)
    y, y_dot = run(op, case, args, tangents)
    dy = [draw(o, dtype, generator).to(o.dtype) for o in y]
    if strided:
        dy = list(spread(dict(enumerate(dy)), 2 * len(args)).values())
    result = {f"y{i}": o.detach() for i, o in enumerate(y)} | {f"y{i}_dot": o for i, o in enumerate(y_dot)}
    result |= {f"d{k}": g for k, g in gradients(args, names, y, dy).items()}
    for i, o in enumerate(y):
        if o.requires_grad and sum(o.requires_grad for o in y) > 1:
            result |= {f"d{k}_of_y{i}": g for k, g in gradients(args, names, [o], [dy[i]]).items()}
    return result


def finite(result: Outcome) -> bool:
    return all(bool(x.isfinite().all()) for x in result.values())


def compare(got: Outcome, plain: Outcome, exact: Outcome, dtype: torch.dtype) -> None:
    """At most twice plain torch's error in the same dtype, as root mean squares.

    Below two roundings of the largest element of its kind (values, tangents, gradients) an error is rounding: a
    gradient that is zero by cancellation still carries the roundings of what cancelled.
    """
    assert got.keys() == exact.keys()
    kind = lambda name: "gradient" if name[0] == "d" else name.partition("_")[2]  # noqa: E731
    rms = lambda x: (x.norm() / max(x.numel(), 1) ** 0.5).item()  # noqa: E731
    largest: dict[str, float] = {}
    for name, want in exact.items():
        largest[kind(name)] = max(largest.get(kind(name), 0.0), want.abs().max().item() if want.numel() else 0.0)
    for name, want in exact.items():
        assert got[name].shape == want.shape, f"{name} is {tuple(got[name].shape)}, expected {tuple(want.shape)}"
        assert got[name].isfinite().all(), f"{name} is not finite (seed {SEED})"
        error, twice = rms(got[name].double() - want), 2 * rms(plain[name].double() - want)
        twice = twice if math.isfinite(twice) else 0.0  # plain torch overflows where the kernel must not
        floor = 2 * torch.finfo(dtype).eps * largest[kind(name)]
        bounds = f"twice eager's is {twice:.2e}, two roundings {floor:.2e}"
        assert error <= max(twice, floor), f"{name}: error {error:.2e}; {bounds} (seed {SEED})"
