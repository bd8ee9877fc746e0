"""Text encoders of other systems: Gemma-2 as SANA uses it (arXiv 2410.10629), CLIP, T5, and others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emf.conditioning.encoder import Encoder, is_frozen, set_frozen
from emf.model.layers import States


def sana_instruction() -> str:
    """SANA's complex human instruction, which stands before every caption: the default of diffusers' SanaPipeline.
    Raises ValueError where diffusers is not installed."""
    try:
        from diffusers import SanaPipeline
    except ImportError:
        raise ValueError(
            "conditioning: SANA's instruction comes from diffusers, which is not installed; install it, or give an "
            "instruction"
        ) from None
    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


class TextEncoder(Encoder):
    """Last hidden states of a transformers text model, padded on the right to `length` tokens. State dict: model.*.

    model:       Gemma2Model, CLIPTextModel, T5EncoderModel, BertModel or alike.
    length:      M. Longer captions are cut, with a warning.
    instruction: text before every caption ("" is none). The model reads both; the first state and the last
                 length - 1 are kept, so that of the instruction about the first token remains (SANA, section 3.1).
    lower:       lower the caption's case and strip it, as SANA does.
    null:        what a dropped caption becomes: "empty", the caption "" without instruction (SANA's negative prompt),
                 or "zeros", zero states that are all attended to.
    freeze:      no gradient to the model.
    """

    empty_ids: Tensor
    empty_mask: Tensor

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        length: int,
        *,
        instruction: str = "",
        lower: bool = False,
        null: Literal["empty", "zeros"] = "empty",
        freeze: bool = True,
    ) -> None:
        super().__init__()
        if length < 2 or null not in ("empty", "zeros"):
            raise ValueError(f"conditioning: length {length}, null {null!r}; expected at least 2, and empty or zeros")
        self.model, self.tokenizer, self.length, self.null_kind = model, tokenizer, length, null
        self.instruction, self.lower = instruction, lower
        sizes = model.config.get_text_config()
        self.channels: int = sizes.hidden_size
        # 2: the token that begins every text, counted in both, and one that is left for the caption's own end
        self.row = length + (len(tokenizer.encode(instruction)) - 2 if instruction else 0)
        limit = getattr(sizes, "max_position_embeddings", None)
        if limit is not None and self.row > limit:
            raise ValueError(f"conditioning: {self.row} tokens with the instruction; the model has {limit} positions")
        ids, mask = self._tokens([""], self.row)
        self.register_buffer("empty_ids", ids[0], persistent=False)
        self.register_buffer("empty_mask", mask[0], persistent=False)
        self._empty: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(TextEncoder._forget)
        if freeze:
            set_frozen(model)

    def train(self, mode: bool = True) -> TextEncoder:
        super().train(mode)
        if is_frozen(self.model):
            self.model.eval()
        return self

    def _tokens(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            padding_side="right",
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
        if full := [text for text, row in zip(texts, mask, strict=True) if row.all()]:
            whole = self.tokenizer(full, truncation=False, verbose=False)["input_ids"]
            self.tell_cut({t: len(row) for t, row in zip(full, whole, strict=True) if len(row) > length}, length)
        return ids, mask

    def _clean(self, captions: Sequence[str]) -> list[str]:
        return [c.lower().strip() if self.lower else c for c in captions]

    def tokenize(self, captions: Sequence[str], image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._tokens([self.instruction + c for c in self._clean(captions)], self.row)

    def states(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None) -> States:
        """drop [B] bool: samples for which a model that is trained reads "" in the place of their caption, where that
        is the null condition."""
        frozen = is_frozen(self.model)
        if not frozen:
            self._forget()
            if drop is not None and self.null_kind == "empty":
                dropped = drop[:, None]
                ids, mask = torch.where(dropped, self.empty_ids, ids), torch.where(dropped, self.empty_mask, mask)
        return self._states(ids, mask, ids.shape[1], frozen)

    def _states(self, ids: Tensor, mask: Tensor, row: int, frozen: bool) -> tuple[Tensor, Tensor]:
        """States of rows of `row` tokens, of which padding that no caption reaches may be cut off."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if row <= self.length:
            return states, mask
        last = row - self.length + 1
        return torch.cat([states[:, :1], states[:, last:]], 1), torch.cat([mask[:, :1], mask[:, last:]], 1)

    def condition(self, states: States, drop: Tensor | None = None) -> States:
        """states [B, M, C] and key mask [B, M]."""
        read, mask = states
        assert mask is not None
        if drop is None:
            return states
        if self.null_kind == "zeros":
            return torch.where(drop[:, None, None], 0.0, read), mask | drop[:, None]
        # is_frozen looks at every weight, a millisecond of a step; a null that is kept says that the model is frozen
        if self._empty is None and not is_frozen(self.model):
            return states  # which were read so
        empty, attended = self.empty()
        return torch.where(drop[:, None, None], empty, read), torch.where(drop[:, None], attended, mask)

    def null(self, states: States) -> States:
        if self.null_kind == "zeros":
            return super().null(states)
        n, (empty, attended) = len(states[0]), self.empty()
        return empty.expand(n, -1, -1), attended.expand(n, -1)

    def empty(self) -> tuple[Tensor, Tensor]:
        """States [1, M, C] and key mask [1, M] of the caption "". A frozen model reads it once, and again where this
        module was moved, cast, loaded or trained since."""
        found = self._empty
        if found is None:
            frozen = is_frozen(self.model)
            # what is kept must serve a later training step too
            with torch.inference_mode(False) if frozen else nullcontext():
                found = self._states(self.empty_ids[None], self.empty_mask[None], len(self.empty_ids), frozen)
            self._empty = found if frozen else None
        return found

    def _forget(self, *_: Any) -> None:
        """The weights are others now, or lie elsewhere."""
        self._empty = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)

    def text_states(self, captions: Sequence[str], template: bool = True) -> tuple[Tensor, Tensor]:
        """See Encoder; the template is the instruction. L is that of the longest caption: padding is not computed."""
        ids, mask = self.tokenize(captions) if template else self._tokens(self._clean(captions), self.length)
        longest = int(mask.sum(1).max())
        ids, mask, row = ids[:, :longest].to(self.device), mask[:, :longest].to(self.device), ids.shape[1]
        return self._states(ids, mask, row, is_frozen(self.model))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @property
    def parts(self) -> dict[str, list[str]]:
        named = {"text_encoder": self.model, "tokenizer": self.tokenizer}
        return {name: ["transformers", type(part).__name__] for name, part in named.items()}
