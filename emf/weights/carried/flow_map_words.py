"""The text encoder of a small world, such as the digits: a language model of its words, and a connector behind it.

`emf export` puts this file beside the weights, and diffusers runs it where it is told trust_remote_code=True.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model


class SmallEncoder(nn.Module):
    """Ids of words -> states that condition the transformer."""

    def __init__(self, words: int, hidden: int, channels: int, **sizes: Any) -> None:
        super().__init__()
        how = Qwen3Config(vocab_size=words, hidden_size=hidden, use_cache=False, pad_token_id=0, **sizes)
        self.language_model = Qwen3Model(how)
        layers = {"linear_1": nn.Linear(hidden, channels), "linear_2": nn.Linear(channels, channels)}
        self.connector = nn.ModuleDict(layers | {"norm": nn.RMSNorm(channels, eps=1e-5)})

    @classmethod
    def from_pretrained(cls, folder: Any, torch_dtype: torch.dtype | None = None, **_: Any) -> SmallEncoder:
        """The encoder of an export's folder; without a dtype in that of its weights."""
        sizes, state = json.loads(Path(folder, "config.json").read_text()), load_file(Path(folder, "model.safetensors"))
        hidden, channels, _ = (sizes.pop(name) for name in ("hidden_size", "out_channels", "blurred"))
        table = state["language_model.embed_tokens.weight"]
        model = cls(len(table), hidden, channels, **sizes)
        model.load_state_dict(state)
        return model.to(torch_dtype or table.dtype).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask [B, M] -> states [B, M, C], and those of no caption."""
        states = self.language_model(input_ids=ids, attention_mask=mask).last_hidden_state
        c, null = (self._connected(x) for x in (states, torch.zeros_like(states)))
        return c, null

    def _connected(self, states: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.connector["linear_1"](states), approximate="tanh")
        connected: Tensor = self.connector["norm"](self.connector["linear_2"](hidden))
        return connected
