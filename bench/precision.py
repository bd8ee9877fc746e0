"""How exact u and u_dot = du/dt are, by depth, precision and time: `python -m bench.precision` writes
profiles/precision.json and precision.png. No GPU: what a fused kernel does to numbers is imitated, and in a small
network the kernels themselves run beside that, in the interpreter of bench/interpreter.py.

A kernel computes in float32 and rounds what it writes. So every op runs in float32 here, and its outputs are rounded:
values to one dtype, tangents to another. tf32 rounds what goes into products. The reference is the same network with
the same weights and inputs (rounded alike) in float64: arithmetic is measured, not the rounding of the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.interpreter import as_on_a_gpu
from bench.records import PROFILES, write_record_rows
from emf.errors import as_command
from emf.model.transformer import Transformer, TransformerConfig
from emf_kernels import Dual, Op, backend

TIMES = (0.02, 0.5, 0.98)
DEPTHS = (2, 5, 10, 20)


class Precision(NamedTuple):
    value: torch.dtype
    tangent: torch.dtype
    tf32: bool = False
    kernels: bool = False


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    "tf32 products": Precision(torch.float32, torch.float32, True),
    "bfloat16, float32 tangents": Precision(torch.bfloat16, torch.float32),
    "bfloat16, bfloat16 tangents": Precision(torch.bfloat16, torch.bfloat16),
    "bfloat16 kernels": Precision(torch.bfloat16, torch.bfloat16, kernels=True),
}
*IMITATED, _ = PRECISIONS
LARGE, SMALL = "random weights", "random weights, 64 channels, 16 tokens"
IN = {LARGE: IMITATED, SMALL: ["bfloat16, bfloat16 tangents", "bfloat16 kernels"]}
"""What is measured in which network: in the interpreter the large one would take an hour."""


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@contextmanager
def rounding(precision: Precision) -> Iterator[None]:
    """Every op rounds as a kernel of this precision would."""
    call = Op.__call__

    def before(op: Op, x: Any) -> Any:
        if not precision.tf32 or op.name not in ("linear", "attention", "linear_attention"):
            return x
        if isinstance(x, Dual):
            return Dual(to_tf32(x.primal), to_tf32(x.tangent))
        return to_tf32(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    def after(y: Any) -> Any:
        if isinstance(y, Dual):
            return Dual(y.primal.to(precision.value).float(), y.tangent.to(precision.tangent).float())
        return tuple(map(after, y)) if isinstance(y, tuple) else y.to(precision.value).float()

    def rounded(op: Op, *args: Any, **kwargs: Any) -> Any:
        y = call(op, *(before(op, a) for a in args), **kwargs)
        return y if op.name == "time_embedding" else after(y)  # sinusoids are float32 always

    with mock.patch.object(Op, "__call__", rounded), backend("reference"):
        yield


@contextmanager
def kernels() -> Iterator[None]:
    """Every op that has a kernel runs it, as on a GPU."""
    chosen = mock.patch.object(Op, "backend_for", lambda op, x: "triton" if op.triton else "reference")
    with as_on_a_gpu(), chosen:
        yield


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@torch.no_grad()
def measure(
    network: Transformer, inputs: dict[str, Tensor], t: float, names: Sequence[str] = IMITATED
) -> Iterator[dict[str, Any]]:
    """Relative L2 errors of u and u_dot at (t, r = t / 2), along (v, 0, 1), in each of the precisions named."""
    network = network.float()
    weights = {k: w.clone() for k, w in network.state_dict().items()}
    for name in names:
        precision = PRECISIONS[name]
        rounded = lambda x, p=precision: x.to(p.value).float()  # noqa: E731
        network.float().load_state_dict({k: rounded(w) for k, w in weights.items()})
        x, e, c = (rounded(inputs[k]) for k in ("x", "e", "c"))
        times = torch.full((len(x),), t)
        z, v = rounded((1 - t) * x + t * e), rounded(e - x)
        dtype = precision.value if precision.kernels else torch.float32
        with kernels() if precision.kernels else rounding(precision):
            z_dual, t_dual = Dual(z.to(dtype), v.to(dtype)), Dual(times, torch.ones_like(times))
            u = network.to(dtype)(z_dual, t_dual, times / 2, c.to(dtype))
        z, v, c, times = (a.double() for a in (z, v, c, times))
        with backend("reference"):
            exact = network.double()(Dual(z, v), Dual(times, torch.ones_like(times)), times / 2, c)
        yield dict(
            precision=name,
            t=t,
            u=error(u.primal, exact.primal),
            u_dot=error(u.tangent, exact.tangent),
            u_dot_over_u=(exact.tangent.norm() / exact.primal.norm()).item(),
        )
    network.float().load_state_dict(weights)


def random_network(layers: int, channels: int = 256, tokens: int = 256) -> tuple[Transformer, dict[str, Tensor]]:
    """A SANA-shaped transformer with random weights, and inputs for it."""
    torch.manual_seed(0)
    side = int(tokens**0.5)
    config = TransformerConfig(
        32, 32, channels // 32, 32, layers, channels // 64, 64, 128, sample_size=side, dual_time=True
    )
    x, e = torch.randn(2, 2, 32, side, side)
    return Transformer(config), dict(x=x, e=e, c=torch.randn(2, 64, 128))


def trained_network(run: Path) -> tuple[Transformer, dict[str, Tensor]]:
    """The transformer of a run of the digits, and scenes for it."""
    from emf.data import digits
    from emf.weights.folders import load_run

    config, network = load_run(run)
    x, captions = digits.make_batch(7, 16, world=config.world)
    with torch.no_grad():
        c, _ = network.encoder(*digits.WORDS.encode(captions))
    return network.transformer, dict(x=x, e=torch.randn(x.shape, generator=torch.Generator().manual_seed(7)), c=c)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    from emf.show.plot import COLORS, write_plot

    depths = [r for r in rows if r["network"] == LARGE]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(TIMES), sharey=True)
        for axis, t in zip(axes, TIMES, strict=True):
            for color, name in zip(COLORS, IMITATED, strict=False):
                mine = [r for r in depths if r["t"] == t and r["precision"] == name]
                for what, style in (("u", "--"), ("u_dot", "-")):
                    axis.plot([r["layers"] for r in mine], [r[what] for r in mine], style, color=color, marker=".",
                              label=f"{what}: {name}")  # fmt: skip
            axis.set(title=f"t = {t}", xlabel="blocks", yscale="log", xticks=DEPTHS)
        axes[0].set_ylabel("relative error against float64")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)

    write_plot(path, draw, (3.6 * len(TIMES), 3.4), 110)


def main(run: Path | None) -> None:
    """run: a trained run of the digits, measured too."""
    from emf.show.progress import track
    from emf.show.table import console, terminal

    jobs: list[tuple[str, int | None, float]] = [(name, n, t) for name in IN for n in DEPTHS for t in TIMES]
    jobs += [(f"trained: {run.name}", None, t) for t in TIMES] if run else []
    rows: list[dict[str, Any]] = []
    for title, layers, t in track(jobs, description="precision"):
        if layers:
            network, inputs = random_network(layers) if title == LARGE else random_network(layers, 64, 16)
        else:
            assert run
            network, inputs = trained_network(run)
        measured = measure(network, inputs, t, IN.get(title, IMITATED))
        rows += [dict(network=title, layers=layers) | row for row in measured]
    write_record_rows(PROFILES / "precision.json", rows)
    plot(rows, PROFILES / "precision.png")
    printed = []
    for r in rows:
        errors = (f"{r[k]:.1e}" for k in ("u", "u_dot"))
        where = [r["network"], str(r["layers"] or ""), str(r["t"]), r["precision"]]
        printed.append([*where, *errors, f"{r['u_dot_over_u']:.2f}"])
    heads = ("network", "blocks", "t", "precision", "u", "u_dot", "|u_dot| / |u|")
    console().print(terminal(heads, printed, words=(0, 3)))


if __name__ == "__main__":
    with as_command():
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
