"""Every way that people take to a training step's tangent: forward + tangent + backward on one model, one batch, one
dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.records import DEVICE, GPU
from emf.flow import FlowConfig, meanflow_loss
from emf.model.transformer import Transformer, TransformerConfig
from emf_kernels import backend, meanflow, path

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
        generator = torch.Generator(DEVICE).manual_seed(0)
        torch.manual_seed(0)
        c, n = size.transformer, size.batch
        self.size, self.dtype, self.flow = size, dtype, FlowConfig()
        with torch.device(DEVICE):  # a billion random numbers take a CPU half a minute
            self.net = Transformer(c)
        with torch.no_grad():  # gates and tables away from zero, so that no branch is silent
            for p in self.net.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator, device=DEVICE))
        self.net.to(dtype)
        self.wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn
        """Around what a provider asks of the network: torch.compile, where that is tried."""
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)  # noqa: E731
        shape = (n, c.in_channels, c.sample_size, c.sample_size)
        self.x, self.e, self.c = draw(*shape), draw(*shape), draw(n, size.condition, c.caption_channels)
        self.t = 0.5 + 0.4 * torch.rand(n, generator=generator, device=DEVICE)
        self.r = self.t * torch.rand(n, generator=generator, device=DEVICE)
        self.z, self.v = path(self.x, self.e, self.t)

    def lean(self) -> Transformer:
        """The same weights, blocks recomputed in backward."""
        with torch.device(DEVICE):
            net = Transformer(replace(self.size.transformer, checkpointing=True))
        net.load_state_dict(self.net.state_dict(), assign=True)
        return net

    def times(self, share: float) -> tuple[Tensor, int]:
        """(r, b): a share of the samples, the first b, with r < t."""
        b = round(share * len(self.t))
        return torch.where(torch.arange(len(self.t), device=self.t.device) < b, self.r, self.t), b

    def loss(self, u: Tensor, u_dot: Tensor) -> Tensor:
        return meanflow(u.contiguous(), u_dot.detach().contiguous(), self.v, self.t, self.r)[0].mean()

    def plain(self, z: Tensor, t: Tensor) -> Tensor:
        """The model as a function of what the tangent runs along, for providers without Duals: eager torch."""
        return self.wrap(self._plain)(z, t)

    def _plain(self, z: Tensor, t: Tensor) -> Tensor:
        with backend("reference"):
            return self.net(z, t, self.r, self.c)

    def jvp(self) -> tuple[Tensor, Tensor]:
        def both(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            u, u_dot = torch.func.jvp(self._plain, (z, t), (self.v, torch.ones_like(t)))[:2]
            return u, u_dot

        return self.wrap(both)(self.z, self.t)


Step = Callable[[Setting], tuple[Tensor, Tensor]]
"""The forward part of a step: (loss, u_dot [b, ...])."""


def fm(net: Callable[[Setting], nn.Module]) -> Step:
    def step(s: Setting) -> tuple[Tensor, Tensor]:
        error = s.wrap(net(s))(s.z, s.t, None, s.c) - s.v
        return error.square().flatten(1).mean(1).mean(), s.v[:0]

    return step


def dual(share: float, net: Callable[[Setting], Any]) -> Step:
    def step(s: Setting) -> tuple[Tensor, Tensor]:
        r, b = s.times(share)
        seen: list[Tensor] = []

        def velocity(z: Any, t: Any, r: Any) -> Any:
            u = s.wrap(net(s))(z, t, r, s.c)
            seen.append(u.tangent)
            return u

        loss = meanflow_loss(velocity, velocity, s.x, s.e, (s.t, r, b), s.flow)[0].mean()
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


@contextmanager
def products_in_tf32(on: bool) -> Iterator[None]:
    """PyTorch's two switches, of matrix products and of convolutions."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = on
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


class Released:
    """The released EMF step (its train.py and trainer): a forward in the training dtype with a graph, then
    torch.func.jvp in float32 over the bare model, weights cast there and back in place, a graph recorded for it too,
    attention by MATH, every sample alike. On diffusers' own SanaTransformer2DModel.

    tf32: of its float32 products on a GPU; its script sets it."""

    def __init__(self, s: Setting, tf32: bool = True) -> None:
        import diffusers

        self.tf32 = tf32

        c = s.size.transformer
        model: Any = diffusers.SanaTransformer2DModel
        self.net = model(
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
        u = s.wrap(self.velocity)(s.z, s.r.to(s.dtype), s.t.to(s.dtype), s.c)
        primals, c = (s.z.float(), s.r, s.t), s.c.float()
        tangents = (s.v.float(), torch.zeros_like(s.r), torch.ones_like(s.t))
        self.cast(torch.float32)
        with products_in_tf32(self.tf32):
            _, u_dot = s.wrap(lambda *at: torch.func.jvp(lambda z, r, t: self.velocity(z, r, t, c), at, tangents))(
                *primals
            )
        self.cast(s.dtype)
        u_dot = u_dot.detach().to(s.dtype)
        return s.loss(u, u_dot), u_dot


def providers(s: Setting, compile: bool) -> tuple[dict[str, tuple[Step, nn.Module]], dict[str, str]]:
    """(by name: the step and the module whose gradients it leaves, what cannot run: why)."""
    own = lambda s: s.net  # noqa: E731
    lean, without = s.lean(), dict[str, str]()
    ways: dict[str, tuple[Step, nn.Module]] = {"fm": (fm(own), s.net)}
    for share in (1, 0.75, 0.5, 0.25, 0):
        ways[f"dual {share:g}"] = (dual(share, own), s.net)
    ways["fm, checkpointing"] = (fm(lambda _: lean), lean)
    ways["dual 1, checkpointing"] = (dual(1, lambda _: lean), lean)
    try:
        released = Released(s)
        ways["paper"] = (released, released.net)
        if GPU:
            exact = copy.copy(released)
            exact.tf32 = False
            ways["paper, tf32 off"] = (exact, exact.net)
    except ImportError as error:
        without["paper"] = f"diffusers is not installed ({error})"
    ways["func.jvp"] = (func_jvp, s.net)
    ways["no_grad jvp + forward"] = (no_grad_and_forward, s.net)
    ways["double backward"] = (double_backward, s.net)
    ways["finite difference"] = (finite_difference, s.net)
    if compile:

        def reference(*args: Any) -> Any:
            with backend("reference"):
                return s.net(*args)

        compiled = torch.compile(reference)
        ways["compile"] = (dual(1, lambda _: compiled), s.net)
    else:
        without["compile"] = "minutes of compilation; asked for with --compile"
    return ways, without
