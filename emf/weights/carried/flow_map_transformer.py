"""SANA's transformer as a flow map: the average velocity u(z_t, r, t) of EMF (arXiv 2604.18168) by diffusers' blocks.

`emf export` puts this file beside the weights, and diffusers runs it where it is told trust_remote_code=True. Where the
package emf is installed, its transformer is taken in the place of this one: it computes the same by fused kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn

EMBEDDERS = "time_embed_dual/diffusion_pytorch_model.safetensors"


class IntervalEmbedding(nn.Module):
    """adaLN-single of an interval: the sum of what one embedder says of its end t and another of its length t - r."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.t, self.r, self.scale = AdaLayerNormSingle(channels), AdaLayerNormSingle(channels), scale

    def forward(self, times: Tensor, batch_size: Any = None, hidden_dtype: Any = None) -> tuple[Tensor, Tensor]:
        """times [B, 2] float32, t and r -> the modulation of every block [B, 6 C], and of the output norm [B, C].
        Called by SanaTransformer2DModel in the place of its own time embedding."""
        t, r = times.unbind(1)
        m_t, e_t = self.t(self.scale * t, hidden_dtype=hidden_dtype)
        m_r, e_r = self.r(self.scale * (t - r), hidden_dtype=hidden_dtype)
        return m_t + m_r, e_t + e_r


class EMFTransformer2DModel(SanaTransformer2DModel):
    """SanaTransformer2DModel whose time is an interval. Its own time embedding, which is the flow-matching model's, is
    in the weights still: diffusers' class reads that model from the same folder."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The transformer of an export's folder. kwargs: those of SanaTransformer2DModel.from_pretrained."""
        folder = Path(pretrained_model_name_or_path)
        if importlib.util.find_spec("emf") and not (kwargs.get("quantization_config") or kwargs.get("device_map")):
            dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32
            return importlib.import_module("emf.pipeline").EMFTransformer.from_export(folder, dtype)
        model: Any = super().from_pretrained(folder, **kwargs)
        with safe_open(folder / EMBEDDERS, "pt") as file:
            embedding = IntervalEmbedding(model.scale_shift_table.shape[1], float(file.metadata()["time_scale"]))
            state = {k.removeprefix("time_embed_"): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        embedding.load_state_dict(state)
        model.time_embed = embedding.to(model.scale_shift_table.device, model.dtype)
        return model.eval()

    def forward(self, z: Tensor, t: Tensor, r: Tensor, c: Tensor, mask: Tensor | None = None) -> Any:
        """u(z_t, r, t) [B, C, H, W] for latents z [B, C, H, W], times t and r [B] float32 in [0, 1] with r <= t, where
        1 is noise, and states of the condition c [B, M, caption channels], those that mask [B, M] bool keeps."""
        times = torch.stack([t, r], 1)
        return super().forward(z, c, times, encoder_attention_mask=mask, return_dict=False)[0]
