"""The SANA-shaped transformer (arXiv 2410.10629, 2501.18427) with EMF's dual time embedding (arXiv 2604.18168):
architecture only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import emf_kernels as ops
from emf.model.layers import (
    Block,
    CaptionProjection,
    Linear,
    Projection,
    RMSNorm,
    TimeEmbed,
    Value,
    checkpoint,
    image,
    tokens,
)
from emf.model.replay import Graphs
from emf.model.sizes import TransformerConfig
from emf_kernels import each, primal

SINUSOID = 256  # width of the sinusoid in every published SANA
OUT_EPS = 1e-6  # of the last norm, fixed in diffusers' class whatever its norm_eps


class Transformer(nn.Module):
    """Velocity network. State dict: diffusers' SanaTransformer2DModel, plus time_embed_t.* and time_embed_r.* where
    dual_time."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, s, c = config, config, config.channels
        self.patch_embed = nn.ModuleDict({"proj": Projection(s.in_channels, c, s.patch_size)})
        self.time_embed = TimeEmbed(SINUSOID, c)
        if s.dual_time:
            self.time_embed_t, self.time_embed_r = TimeEmbed(SINUSOID, c), TimeEmbed(SINUSOID, c)
        self.caption_projection, self.caption_norm = CaptionProjection(s.caption_channels, c), RMSNorm(c)
        self.transformer_blocks = nn.ModuleList(Block(s) for _ in range(s.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, c) / c**0.5)
        self.proj_out = Linear(c, s.patch_size**2 * s.out_channels)
        self.adapters: tuple[str, ...] = ()
        """What low-rank adapters that are merged in the weights are known by; see emf.weights.adapter_settings."""
        self.graphs: Graphs | None = None
        """Where set, the blocks run by it in training: Graphs(net.through, net.transformer_blocks)."""

    def forward(self, z: Value, t: Value, r: Tensor | None, c: Tensor, mask: Tensor | None = None) -> Any:
        """The average velocity u(z_t, r, t) [B, C, H, W]; with Duals for z and t a Dual whose tangent is du/dt along
        them.

        z [B, C, H, W]; t [B] float32 in [0, 1], 1 is noise; r [B] float32, r <= t, or None: the instantaneous velocity
        v(z_t, t) by the pretrained time embedding; c [B, M, caption channels]; mask [B, M] bool or None. Raises
        ValueError where shapes, times or the embedders do not fit.
        """
        p, x, config = self.config.patch_size, primal(z), self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"transformer: z is {tuple(x.shape)}; expected [B, {config.in_channels}, H, W], H, W multiples of {p}"
            )
        if primal(t).dtype not in (torch.float32, torch.float64) or primal(t).shape != x.shape[:1]:
            raise ValueError(
                f"transformer: t is {primal(t).dtype} {tuple(primal(t).shape)}; expected float32 ({x.shape[0]},)"
            )
        if c.ndim != 3 or c.shape[0] != x.shape[0] or c.shape[2] != config.caption_channels:
            raise ValueError(
                f"transformer: c is {tuple(c.shape)}; expected [{x.shape[0]}, M, {config.caption_channels}]"
            )
        height, width = x.shape[2] // p, x.shape[3] // p
        m, e = self.embed_time(t, r, x.dtype)
        c = self.caption_norm(self.caption_projection(c))
        h = self.patch_embed["proj"](tokens(z, p))
        if config.interpolation_scale is not None:
            where = positions(height, width, config.channels, config.sample_size // p, config.interpolation_scale)
            h = ops.gated_residual(h, None, where.to(x.device, x.dtype).expand(x.shape[0], -1, -1))
        h = (self.graphs or self.through)(h, m, c, mask, height=height, width=width)
        shift, scale = ops.modulation(e, self.scale_shift_table)
        return image(self.proj_out(ops.adaln(h, scale, shift, OUT_EPS)), p, height, width)

    def through(self, h: Value, m: Value, c: Tensor, mask: Tensor | None, height: int, width: int) -> Any:
        """h [B, N, C] after all blocks."""
        for block in self.transformer_blocks:

            def run(h: Value, m: Value, c: Tensor, block: nn.Module = block) -> Any:
                return block(h, m, c, mask, height, width)

            h = checkpoint(run, h, m, c) if self.config.checkpointing and torch.is_grad_enabled() else run(h, m, c)
        return h

    def embed_time(self, t: Value, r: Tensor | None, dtype: torch.dtype) -> tuple[Any, Any]:
        """(m [B, 6 C], e [B, C]). EMF: m = m_t(t) + m_r(t - r) and e likewise, summed after each branch. Sinusoids in
        t's own float32."""

        def cast(s: Tensor) -> Tensor:
            return s.to(dtype)

        if r is None:
            return self.time_embed(each(cast, ops.time_embedding(t, None, self.config.base_time_scale, SINUSOID)))
        if not self.config.dual_time:
            raise ValueError(
                "transformer: r was given, but the model has the single pretrained time embedding; set dual_time"
            )
        end, interval = ops.time_embedding(t, r, self.config.time_scale, SINUSOID)
        (m_t, e_t), (m_r, e_r) = self.time_embed_t(each(cast, end)), self.time_embed_r(each(cast, interval))
        return ops.gated_residual(m_t, None, m_r), ops.gated_residual(e_t, None, e_r)


def positions(height: int, width: int, channels: int, base: int, scale: float) -> Tensor:
    """[height width, channels] float32: half the channels for the column, half for the row, each sines then cosines
    (diffusers' PatchEmbed).

    base: grid size of the configured sample, at which neighbours are 1 / scale apart.
    """
    f = 1e4 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    row, column = (torch.arange(n, dtype=torch.float64) * (base / n) / scale for n in (height, width))
    row, column = (torch.cat([torch.sin(s[:, None] * f), torch.cos(s[:, None] * f)], 1) for s in (row, column))
    grid = torch.cat([column[None].expand(height, -1, -1), row[:, None].expand(-1, width, -1)], 2)
    return grid.reshape(height * width, channels).float()
