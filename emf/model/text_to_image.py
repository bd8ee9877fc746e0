"""A text encoder and the transformer as one module: what is trained, saved and sampled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emf.model.layers import States, Value
from emf.model.transformer import Transformer


class TextToImage(nn.Module):
    """What is trained, saved and sampled: a text encoder (an Encoder of emf.conditioning) and the transformer."""

    def __init__(self, encoder: Any, transformer: Transformer) -> None:
        super().__init__()
        self.encoder, self.transformer = encoder, transformer
        self.own_encoder: set[str] = set()
        """Names of a pretrained encoder's weights that are no longer those of its folder."""
        self.base_stamp = ""
        """A digest of the frozen base that emf.network.flows has beside it, on the rank that read it."""

    def forward(
        self, z: Value, t: Value, r: Tensor | None, states: States, drop: Tensor | None = None, *, null: bool = False
    ) -> Any:
        """u or v at (z, r, t) for captions as `read` gave them for the same drop [B] bool, which marks samples without
        their condition; null: for as many samples, all without. See Transformer."""
        condition = self.encoder.null(states) if null else self.encoder.condition(states, drop)
        return self.transformer(z, t, r, *condition)

    def read(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None, *, own_loss: bool = False) -> Any:
        """What the text encoder says of token ids [B, M] with mask [B, M]: once a step, which evaluates the transformer
        several times. own_loss: (that, the language model's own loss [B]), from one pass of it."""
        if not own_loss:
            return self.encoder.states(ids, mask, drop)
        hidden = self.encoder.hidden(ids, mask)
        return (self.encoder.select(hidden, ids), None), self.encoder.ar_loss(ids, mask, hidden)
