"""A whole training step, forward + tangent + backward, by every way that people take to the tangent.

One model, one batch, one dtype. Rounds are interleaved (A B C A B C ...), so that ratios to plain flow matching are of
pairs in one run. Beside the time: the bytes held for backward when it begins, and at most before; floating-point
operations; operators called; and the error of du/dt against float64: a fast wrong tangent is no competitor.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.ops import DEVICE, GPU, OUT, device_name, revision
from emf.flow import FlowConfig, meanflow_loss
from emf.model import Transformer, TransformerConfig
from emf_kernels import backend, meanflow, path

RATIOS = ("saved_bytes", "saved_peak_bytes", "flops", "ops")
EPS = 0.005  # of the central difference


@dataclass(frozen=True)
class Size:
    """A model and a batch; tokens of the condition."""

    transformer: TransformerConfig
    batch: int
    condition: int


def _model(heads: int, cross: tuple[int, int], layers: int, caption: int, side: int) -> TransformerConfig:
    return TransformerConfig(
        num_attention_heads=heads,
        num_cross_attention_heads=cross[0],
        cross_attention_head_dim=cross[1],
        num_layers=layers,
        caption_channels=caption,
        sample_size=side,
        dual_time=True,
    )


SIZES = {
    "tiny": Size(_model(2, (1, 64), 2, 32, 4), batch=4, condition=6),
    "cpu": Size(_model(28, (8, 112), 7, 1024, 16), batch=4, condition=128),
    "1.6b-512": Size(_model(70, (20, 112), 20, 2304, 16), batch=4, condition=300),
    "1.6b-1024": Size(_model(70, (20, 112), 20, 2304, 32), batch=4, condition=300),
}


class Setting:
    """What every provider is given: weights, batch, times (r < t in every sample), and how a loss is made of them."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        c, n = size.transformer, size.batch
        self.size, self.dtype, self.flow = size, dtype, FlowConfig()
        self.net = Transformer(c)
        with torch.no_grad():  # gates and tables away from zero, so that no branch is silent
            for p in self.net.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        self.net.to(DEVICE, dtype)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
        shape = (n, c.in_channels, c.sample_size, c.sample_size)
        self.x, self.e, self.c = draw(*shape), draw(*shape), draw(n, size.condition, c.caption_channels)
        self.t = (0.5 + 0.4 * torch.rand(n, generator=generator)).to(DEVICE)
        self.r = self.t * torch.rand(n, generator=generator).to(DEVICE)
        self.z, self.v = path(self.x, self.e, self.t)

    def lean(self) -> Transformer:
        """The same weights, blocks recomputed in backward."""
        net = Transformer(replace(self.size.transformer, checkpointing=True)).to(DEVICE, self.dtype)
        net.load_state_dict(self.net.state_dict())
        return net

    def loss(self, u: Tensor, u_dot: Tensor) -> Tensor:
        return meanflow(u.contiguous(), u_dot.detach().contiguous(), self.v, self.t, self.r)[0].mean()

    def plain(self, z: Tensor, t: Tensor) -> Tensor:
        """The model as a function of what the tangent runs along, for providers without Duals: eager torch."""
        with backend("reference"):
            return self.net(z, t, self.r, self.c)

    def jvp(self) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(self.plain, (self.z, self.t), (self.v, torch.ones_like(self.t)))


Step = Callable[[Setting], tuple[Tensor, Tensor]]
"""The forward part of a step: (loss, u_dot [b, ...])."""


def fm(net: Callable[[Setting], nn.Module]) -> Step:
    def step(s: Setting) -> tuple[Tensor, Tensor]:
        error = net(s)(s.z, s.t, None, s.c) - s.v
        return error.square().flatten(1).mean(1).mean(), s.v[:0]

    return step


def dual(share: float, net: Callable[[Setting], Any]) -> Step:
    def step(s: Setting) -> tuple[Tensor, Tensor]:
        b = round(share * len(s.z))
        r = torch.where(torch.arange(len(s.r), device=s.r.device) < b, s.r, s.t)
        seen: list[Tensor] = []

        def velocity(z: Any, t: Any, r: Any) -> Any:
            u = net(s)(z, t, r, s.c)
            seen.append(u.tangent)
            return u

        loss = meanflow_loss(velocity, velocity, s.x, s.e, s.t, r, b, s.flow)[0].mean()
        return loss, seen[0]

    return step


def func_jvp(s: Setting) -> tuple[Tensor, Tensor]:
    u, u_dot = s.jvp()
    return s.loss(u, u_dot), u_dot.detach()


def no_grad_and_forward(s: Setting) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        u_dot = s.jvp()[1]
    return s.loss(s.plain(s.z, s.t), u_dot), u_dot


def double_backward(s: Setting) -> tuple[Tensor, Tensor]:
    z, t = s.z.detach().requires_grad_(), s.t.detach().requires_grad_()
    u = s.plain(z, t)
    w = torch.zeros_like(u, requires_grad=True)
    dz, dt = torch.autograd.grad(u, (z, t), w, create_graph=True)  # J^T w, linear in w
    (u_dot,) = torch.autograd.grad((dz, dt), w, (s.v, torch.ones_like(t)))
    return s.loss(u, u_dot), u_dot


def finite_difference(s: Setting) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        ends = [s.plain(s.z + sign * EPS * s.v, s.t + sign * EPS) for sign in (1, -1)]
    u_dot = (ends[0] - ends[1]) / (2 * EPS)
    return s.loss(s.plain(s.z, s.t), u_dot), u_dot


class _DualTime(nn.Module):
    """EMF's two embedders in the place of diffusers' one: timestep is [B, 2], t and r."""

    def __init__(self, end: nn.Module, interval: nn.Module) -> None:
        super().__init__()
        self.end, self.interval = end, interval

    def forward(self, timestep: Tensor, **rest: Any) -> Any:
        t, r = timestep.unbind(1)
        return tuple(a + b for a, b in zip(self.end(t, **rest), self.interval(t - r, **rest), strict=True))


class Released:
    """The released EMF step (its train.py and trainer): a forward in the training dtype with a graph, then
    torch.func.jvp in float32 over the bare model, weights cast there and back in place, a graph recorded for it too,
    attention by MATH, every sample alike. On diffusers' own SanaTransformer2DModel."""

    def __init__(self, s: Setting) -> None:
        import diffusers

        c = s.size.transformer
        self.net = diffusers.SanaTransformer2DModel(
            in_channels=c.in_channels, out_channels=c.out_channels, num_attention_heads=c.num_attention_heads,
            attention_head_dim=c.attention_head_dim, num_layers=c.num_layers,
            num_cross_attention_heads=c.num_cross_attention_heads,
            cross_attention_head_dim=c.cross_attention_head_dim, cross_attention_dim=c.channels,
            caption_channels=c.caption_channels, mlp_ratio=c.mlp_ratio, patch_size=c.patch_size,
            sample_size=c.sample_size, interpolation_scale=None, qk_norm="rms_norm_across_heads",
        )  # fmt: skip
        state = {k: v.float() for k, v in s.net.state_dict().items()}
        branch = lambda name: {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}  # noqa: E731
        self.net.load_state_dict({k: v for k, v in state.items() if not k.startswith(("time_embed_t", "time_embed_r"))})
        end, interval = copy.deepcopy(self.net.time_embed), copy.deepcopy(self.net.time_embed)
        end.load_state_dict(branch("time_embed_t."))
        interval.load_state_dict(branch("time_embed_r."))
        self.net.time_embed = _DualTime(end, interval)
        self.net.to(DEVICE, s.dtype)

    def velocity(self, z: Tensor, r: Tensor, t: Tensor, c: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.net(z, encoder_hidden_states=c, timestep=torch.stack([t, r], 1), return_dict=False)[0]

    def cast(self, dtype: torch.dtype) -> None:
        for p in self.net.parameters():
            p.data = p.data.to(dtype)

    def __call__(self, s: Setting) -> tuple[Tensor, Tensor]:
        u = self.velocity(s.z, s.r.to(s.dtype), s.t.to(s.dtype), s.c)
        z, v, c = s.z.float(), s.v.float(), s.c.float()
        self.cast(torch.float32)
        _, u_dot = torch.func.jvp(
            lambda z, r, t: self.velocity(z, r, t, c), (z, s.r, s.t), (v, torch.zeros_like(s.r), torch.ones_like(s.t))
        )
        self.cast(s.dtype)
        u_dot = u_dot.detach().to(s.dtype)
        return s.loss(u, u_dot), u_dot


def providers(s: Setting, compile: bool) -> tuple[dict[str, tuple[Step, nn.Module]], dict[str, str]]:
    """(by name: the step and the module whose gradients it leaves, what cannot run: why)."""
    own = lambda s: s.net  # noqa: E731
    lean, released, without = s.lean(), None, {}
    ways: dict[str, tuple[Step, nn.Module]] = {"fm": (fm(own), s.net)}
    for share in (1, 0.75, 0.5, 0.25, 0):
        ways[f"dual {share:g}"] = (dual(share, own), s.net)
    ways["fm, checkpointing"] = (fm(lambda _: lean), lean)
    ways["dual 1, checkpointing"] = (dual(1, lambda _: lean), lean)
    try:
        released = Released(s)
        ways["paper"] = (released, released.net)
    except ImportError as error:
        without["paper"] = f"diffusers is not installed ({error})"
    ways["func.jvp"] = (func_jvp, s.net)
    ways["no_grad jvp + forward"] = (no_grad_and_forward, s.net)
    ways["double backward"] = (double_backward, s.net)
    ways["finite difference"] = (finite_difference, s.net)
    if compile:
        eager = s.net

        def reference(*args: Any) -> Any:
            with backend("reference"):
                return eager(*args)

        compiled = torch.compile(reference)
        ways["compile"] = (dual(1, lambda _: compiled), s.net)  # type: ignore[arg-type]
    else:
        without["compile"] = "minutes of compilation; asked for with --compile"
    return ways, without


class _Count(TorchDispatchMode):
    """Operators called, views left out, and the floating-point operations of those that PyTorch has a formula for:
    products, convolutions, attention. (FlopCounterMode's own module tracker does not survive torch.func.)"""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(isinstance(a, Tensor) and a._is_zerotensor() for a in args):
            return out  # forward AD's zeros are multiplied by nobody
        self.ops += not func.is_view
        if func is torch.ops.aten.convolution.default:  # PyTorch's own formula takes no account of groups in backward
            self.flops += 2 * out.numel() * args[1][0].numel()
        elif func is torch.ops.aten.convolution_backward.default:
            self.flops += 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
        elif formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class Held:
    """Bytes that autograd holds for backward, each storage once, weights left out: live and peak."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.count, self.live, self.peak = weights, dict[int, int](), 0, 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.x):
            yield

    def _pack(self, x: Tensor) -> Any:
        return _Saved(self, x.detach())

    def add(self, x: Tensor) -> tuple[int, int]:
        inner = x
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        if inner._is_zerotensor():  # forward AD's zeros, which have no storage
            return 0, 0
        storage = inner.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self.weights or not at:
            return 0, 0
        if not self.count.get(at):
            self.live += size
            self.peak = max(self.peak, self.live)
        self.count[at] = self.count.get(at, 0) + 1
        return at, size

    def remove(self, at: int, size: int) -> None:
        if at:
            self.count[at] -= 1
            self.live -= 0 if self.count[at] else size


class _Saved:
    def __init__(self, held: Held, x: Tensor) -> None:
        self.held, self.x, self.at = held, x, (0, 0)
        self.at = held.add(x)

    def __del__(self) -> None:
        self.held.remove(*self.at)


def truth(s: Setting) -> Tensor:
    """du/dt in float64, a sample at a time."""
    net = copy.deepcopy(s.net).double()
    parts = []
    for i in range(len(s.z)):
        z, v, t, r, c = (a[i : i + 1].double() for a in (s.z, s.v, s.t, s.r, s.c))
        with torch.no_grad(), backend("reference"):
            f = lambda z, t, r=r, c=c: net(z, t, r, c)  # noqa: E731
            parts.append(torch.func.jvp(f, (z, t), (v, torch.ones_like(t)))[1])
    return torch.cat(parts)


def facts(s: Setting, step: Step, module: nn.Module, want: Tensor) -> dict[str, Any]:
    """What does not depend on the clock."""
    held = Held({p.untyped_storage().data_ptr() for p in module.parameters()})
    module.zero_grad()
    with held.watch():
        loss, u_dot = step(s)
    saved, peak = held.live, held.peak
    del loss
    gc.collect()
    count = _Count()
    module.zero_grad()
    with backend("reference"), count:
        step(s)[0].backward()
    got = u_dot.detach().double()
    error = ((got - want[: len(got)]).norm() / want[: len(got)].norm()).item() if len(got) else None
    row = dict(saved_bytes=saved, saved_peak_bytes=peak, flops=count.flops, ops=count.ops, u_dot_error=error)
    if GPU:
        module.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(s)[0].backward()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def seconds(s: Setting, step: Step, module: nn.Module) -> float:
    """One whole step."""
    module.zero_grad()
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(s)[0].backward()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, rounds: int, compile: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The record of a size: head, rows by provider, and what could not run."""
    size, dtype = SIZES[name], torch.bfloat16 if GPU else torch.float32
    s = Setting(size, dtype)
    weights = sum(p.numel() for p in s.net.parameters())
    say(f"{name}: {weights / 1e6:.1f}M parameters, batch {size.batch}, {size.transformer.sample_size**2} tokens")
    ways, without = providers(s, compile)
    want = truth(s)
    rows: dict[str, dict[str, Any]] = {}
    for provider, (step, module) in list(ways.items()):
        try:
            rows[provider] = dict(provider=provider) | facts(s, step, module, want)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            without[provider] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
            del ways[provider]
            continue
        error = rows[provider]["u_dot_error"]
        say(f"  {provider}: error of du/dt {'none' if error is None else format(error, '.1e')}")
    times: dict[str, list[float]] = {provider: [] for provider in ways}
    for i in range(rounds + 1):  # the first warms up
        for provider, (step, module) in ways.items():
            took = seconds(s, step, module)
            if i:
                times[provider].append(took)
        say(f"  round {i} of {rounds}")
    for provider, row in rows.items():
        base = "fm, checkpointing" if "checkpointing" in provider else "fm"
        ratios = sorted(a / b for a, b in zip(times[provider], times[base], strict=True))
        row |= dict(time=statistics.median(ratios), time_low=ratios[0], time_high=ratios[-1], base=base)
        row |= {f"{k}_ratio": row[f"{k}"] / rows[base][k] for k in RATIOS}
        if GPU:
            row |= dict(
                ms=1e3 * statistics.median(times[provider]), peak_ratio=row["peak_bytes"] / rows[base]["peak_bytes"]
            )
    head = dict(device=device_name(), size=name, dtype=str(dtype)[6:], parameters=weights, batch=size.batch)
    head |= dict(tokens=size.transformer.sample_size**2, condition=size.condition, rounds=rounds)
    head |= dict(torch=torch.__version__, threads=torch.get_num_threads(), commit=revision())
    return dict(head=head, rows=list(rows.values()), without=without, times=times)


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    heads = ("provider", "time", "held for backward", "held at most", "FLOPs", "operators", "error of du/dt")
    lines = [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    for row in record["rows"]:
        error = "" if row["u_dot_error"] is None else f"{row['u_dot_error']:.0e}"
        spread = f"{row['time']:.2f} ({row['time_low']:.2f} to {row['time_high']:.2f})"
        ratios = (f"{row[f'{k}_ratio']:.2f}" for k in RATIOS)
        lines.append(f"| {row['provider']} | {spread} | {' | '.join(ratios)} | {error} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("size", nargs="?", default="cpu", choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference dual too")
    options = parser.parse_args()
    record = measure(options.size, options.rounds, options.compile, lambda line: print(line, flush=True))
    del record["times"]
    out = OUT / device_name() / f"step-{options.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    for provider, why in record["without"].items():
        print(f"{provider}: {why}")


if __name__ == "__main__":
    main()
