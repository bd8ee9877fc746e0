"""What every pretrained text encoder offers the trainer, the sampler and the analyses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emf.model.layers import States


class Encoder(nn.Module):
    """Captions -> tokenize -> (ids, mask) -> states -> condition -> condition states [B, M, channels] and key mask.

    Reading, which is `states`, is what costs: what asks for several conditions of a caption reads it once."""

    channels: int
    """Channels of the states that forward returns; the transformer's caption_channels."""

    def tell_cut(self, cut: Mapping[str, int], most: int) -> None:
        """Warn of captions that were cut to `most` tokens, when the number of those seen so far has doubled.

        cut: how many tokens each of them has. They are known by their text: one that is met again is not counted again.
        """
        told: set[int] = self.__dict__.setdefault("cut_so_far", set())
        before = len(told)
        told |= {hash(text) for text in cut}
        if len(told).bit_length() > before.bit_length():
            warnings.warn(
                f"conditioning: a caption of {max(cut.values())} tokens, its prompt included, was cut to {most}; "
                f"{len(told)} captions so far",
                stacklevel=3,
            )

    def tokenize(self, captions: Sequence[str], image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(ids [B, L] int64, mask [B, L] bool, True where a token is no padding), on the CPU.

        image_ids [B, n]: the image's own tokens, for encoders that read them (BLIP3o-NEXT); the others ignore them.
        """
        raise NotImplementedError

    def states(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None) -> States:
        """Last hidden states of the M positions that condition the transformer, before dropout and connector. drop [B]
        bool: samples whose null condition an encoder may read here, in the place of their caption."""
        raise NotImplementedError

    def condition(self, states: States, drop: Tensor | None = None) -> States:
        """Condition states [B, M, channels] and key mask, of what `states` gave for the same drop [B] bool: samples
        that get the null condition."""
        raise NotImplementedError

    def null(self, states: States) -> States:
        """The null condition of as many samples, whatever was dropped."""
        return self.condition(states, torch.ones(len(states[0]), dtype=torch.bool, device=states[0].device))

    def forward(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None, *, null: bool = False) -> Any:
        """The condition of rows of `tokenize`, States; null: (that, the null condition), from one reading."""
        states = self.states(ids, mask, drop)
        condition = self.condition(states, drop)
        return (condition, self.null(states)) if null else condition

    def text_states(self, captions: Sequence[str], template: bool = True) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, L, hidden] of the captions' tokens, and their mask [B, L] bool.

        template: read the caption inside the prompt that the encoder puts around it; else bare.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the weights, with config and tokenizer, into a pipeline's folder, for emf.conditioning.load."""
        raise NotImplementedError

    @property
    def parts(self) -> dict[str, list[str]]:
        """What `save` writes, as model_index.json names it: folder -> [library, class]."""
        return {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # Rotary frequencies stay float32 when the rest is cast: bfloat16 keeps 8 bits of them, by which the angle of
        # position 800 is off by a radian. transformers' from_pretrained leaves them alone; module.bfloat16() does not.
        kept = {name: b for name, b in self.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, leaf, buffer.to(getattr(module, leaf).device))
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def set_frozen(model: nn.Module) -> None:
    """Eval mode, no gradients."""
    model.requires_grad_(False).eval()


def is_frozen(model: nn.Module) -> bool:
    return not any(p.requires_grad for p in model.parameters())


def mean_pool(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that mask [B, L] keeps, of states [B, L, C]: [B, C] float32."""
    if mask is None:
        return states.float().mean(1)
    kept = mask.to(states.device)[..., None]
    # where, not a product: what stands at padding may be anything, NaN included
    return torch.where(kept, states.float(), 0.0).sum(1) / kept.sum(1).clamp(min=1)
