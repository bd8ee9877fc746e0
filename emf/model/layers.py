"""The layers of the SANA transformer, each written once: called with Tensors they are the network, with Duals the
network and its JVP.

Parameter names and shapes are those of diffusers' SanaTransformer2DModel, so its state dicts load and save unchanged. A
module computes with its own weights only, or with those of children that it names in `borrows` (ZeRO-3 gathers weights
by owner; emf.train.zero registers the borrowed ones).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn

import emf_kernels as ops
from emf.model.sizes import TransformerConfig
from emf_kernels import Dual, each

Value = Tensor | Dual
States = tuple[Tensor, Tensor | None]
"""Condition states [B, M, C] and their key mask [B, M] bool; None: all M are attended to."""


class Linear(nn.Linear):
    """x [B, ..., K] -> [B, ..., N]."""

    def forward(self, x: Value) -> Any:
        return ops.linear(x, self.weight, self.bias)


class Projection(nn.Module):
    """A convolution whose kernel covers its whole input: weight [N, C, k, k], applied to x [B, ..., C k k] -> [B,
    ..., N]."""

    def __init__(self, channels: int, out: int, kernel: int = 1, bias: bool = True) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, out, kernel, bias=bias)  # its initialisation is the pretrained network's
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Value) -> Any:
        return ops.linear(x, self.weight.flatten(1), self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over all channels, weight [C], eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Value) -> Any:
        return ops.rmsnorm(x, self.weight)


class TimestepEmbedding(nn.Module):
    """Sinusoid [B, dim] -> Linear -> SiLU -> Linear: e [B, C]."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(dim, channels), Linear(channels, channels)

    def forward(self, sinusoid: Value) -> Any:
        return self.linear_2(ops.silu(self.linear_1(sinusoid)))


class TimeEmbed(nn.Module):
    """adaLN-single: sinusoid [B, dim] -> (m [B, 6 C] for every block, e [B, C] for the output norm). EMF has one for
    t and one for t - r."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(dim, channels)})
        self.linear = Linear(channels, 6 * channels)

    def forward(self, sinusoid: Value) -> tuple[Any, Any]:
        e = self.emb["timestep_embedder"](sinusoid)
        return self.linear(ops.silu(e)), e


class CaptionProjection(nn.Module):
    """Condition states [B, M, caption channels] -> [B, M, C]. A condition is constant in z, r and t: plain tensors
    only."""

    def __init__(self, caption_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(caption_channels, channels), Linear(channels, channels)

    def forward(self, c: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(c), approximate="tanh"))


class SelfAttention(nn.Module):
    """ReLU linear attention over tokens, queries and keys normed across heads; no bias in q, k, v."""

    borrows = ("norm_q.weight", "norm_k.weight")

    def __init__(self, channels: int, heads: int, head_size: int, qk_norm: bool) -> None:
        super().__init__()
        inner, self.head_size = heads * head_size, head_size
        self.to_q, self.to_k, self.to_v = (Linear(channels, inner, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(inner) if qk_norm else None for _ in range(2))
        self.to_out = nn.ModuleList([Linear(inner, channels)])

    def forward(self, x: Value) -> Any:
        weights = (None if norm is None else norm.weight for norm in (self.norm_q, self.norm_k))
        return self.to_out[0](ops.linear_attention(self.to_q(x), self.to_k(x), self.to_v(x), *weights, self.head_size))


class CrossAttention(nn.Module):
    """Softmax attention of tokens on the condition, whose keys and values are constants."""

    def __init__(self, channels: int, heads: int, head_size: int, qk_norm: bool) -> None:
        super().__init__()
        inner, self.head_size = heads * head_size, head_size
        self.to_q, self.to_k, self.to_v = (Linear(channels, inner) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(inner) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([Linear(inner, channels)])

    def forward(self, x: Value, c: Tensor, mask: Tensor | None) -> Any:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(c)), self.to_v(c)
        heads = lambda y: y.unflatten(-1, (-1, self.head_size))  # noqa: E731
        o = ops.attention(each(heads, q), heads(k), heads(v), mask)
        return self.to_out[0](each(lambda y: y.flatten(2), o))


class GLUMBConv(nn.Module):
    """SANA's feed-forward: 1x1 -> SiLU -> depthwise 3x3 -> gate -> 1x1, on tokens [B, H W, C] in raster order."""

    borrows = ("conv_depth.weight", "conv_depth.bias")

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(ratio * channels)
        self.conv_inverted = Projection(channels, 2 * hidden)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = Projection(hidden, channels, bias=False)

    def forward(self, x: Value, height: int, width: int) -> Any:
        h = each(lambda y: y.unflatten(1, (height, width)), self.conv_inverted(x))
        h = ops.glumbconv(h, self.conv_depth.weight, self.conv_depth.bias)
        return self.conv_point(each(lambda y: y.flatten(1, 2), h))


class Block(nn.Module):
    """One SANA block: modulated self-attention, ungated cross-attention, modulated GLUMBConv."""

    def __init__(self, s: TransformerConfig) -> None:
        super().__init__()
        self.eps = s.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, s.channels) / s.channels**0.5)
        self.attn1 = SelfAttention(s.channels, s.num_attention_heads, s.attention_head_dim, s.qk_norm)
        self.attn2 = CrossAttention(s.channels, s.num_cross_attention_heads, s.cross_attention_head_dim, s.qk_norm)
        self.ff = GLUMBConv(s.channels, s.mlp_ratio)

    def forward(self, x: Value, m: Value, c: Tensor, mask: Tensor | None, height: int, width: int) -> Any:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = ops.modulation(m, self.scale_shift_table)
        x = ops.gated_residual(x, gate_msa, self.attn1(ops.adaln(x, scale_msa, shift_msa, self.eps)))
        x, h = ops.gated_residual_adaln(x, None, self.attn2(x, c, mask), scale_mlp, shift_mlp, self.eps)
        return ops.gated_residual(x, gate_mlp, self.ff(h, height, width))


class _Recompute(torch.autograd.Function):
    """Forward: run without a graph, keep the primal inputs. Backward: run again on the primals alone, with a graph,
    and go through it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *halves: Tensor | None) -> Any:
        # The arguments come flat, primal and tangent (or None) in turn, so that autograd sees the primals.
        primals, tangents = [p for p in halves[::2] if p is not None], halves[1::2]
        ctx.run = run
        # backward may be run by a thread of autograd's own; what was in force here (a backend) is in force there
        ctx.context = None if torch.compiler.is_compiling() else copy_context()
        ctx.save_for_backward(*primals)
        y = run(*(p if d is None else Dual(p, d) for p, d in zip(primals, tangents, strict=True)))
        if isinstance(y, Dual):
            ctx.mark_non_differentiable(y.tangent)
            return y.primal, y.tangent
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        needs = ctx.needs_input_grad[1::2]
        primals = [p.detach().requires_grad_(n) for p, n in zip(ctx.saved_tensors, needs, strict=True)]
        with torch.enable_grad():
            y = ctx.run(*primals) if ctx.context is None else ctx.context.run(ctx.run, *primals)
        torch.autograd.backward(y, dy)
        return None, *(g for p in primals for g in (p.grad, None))


def checkpoint(run: Callable[..., Any], *args: Value) -> Any:
    """run(*args) whose activations are recomputed in backward: the primal only, since no gradient flows through a
    tangent.

    args: Tensors and Duals, all that carries a gradient or a tangent (weights are run's own); at least one
          floating-point Tensor.
    run:  returns one Tensor or Dual [B, ...]; must give the same result when called again.
    Result and gradients equal those of run(*args); the memory kept is that of the primals of args.
    """
    flat: list[Any] = [half for a in args for half in (a if isinstance(a, Dual) else (a, None))]
    if not any(a.requires_grad for a in flat if a is not None):
        # autograd calls a Function's backward only for the sake of an input; the weights inside `run` are none
        flat[0] = flat[0].detach().requires_grad_()
    y = _Recompute.apply(run, *flat)
    return Dual(*y) if isinstance(y, tuple) else y


def tokens(z: Value, patch: int) -> Any:
    """z [B, C, H, W] -> [B, H W / p^2, C p p]: raster order, channels first inside a patch (a convolution's order)."""

    def unfold(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // patch, patch, w // patch, patch)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h // patch * (w // patch), c * patch * patch)

    return each(unfold, z)


def image(x: Value, patch: int, height: int, width: int) -> Any:
    """x [B, height width, p p C] -> [B, C, height p, width p]: channels last inside a patch, as SANA's proj_out
    writes them."""

    def fold(y: Tensor) -> Tensor:
        b, channels = y.shape[0], y.shape[2] // patch**2
        y = y.reshape(b, height, width, patch, patch, channels)
        # contiguous: at patch 1 all of this is a view whose last dimension has a stride; the loss refuses that
        return y.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, height * patch, width * patch).contiguous()

    return each(fold, x)
