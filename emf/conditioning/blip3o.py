"""BLIP3o-NEXT's conditioning (arXiv 2510.15857): the transformer attends to what a Qwen3 language model says of an
image's discrete tokens.

One row of ids, left-padded:

    chat prompt, <im_start>, <S0>, image token x n, <im_end>, <|im_end|>, newline

n = 729 tokens of TA-Tok: the image's own in training (teacher forcing), sampled by `generate` otherwise. The states are
the language model's last hidden states, after its final norm; those of <S0> and the image tokens go through the
connector and are attended to. Text states are not: the caption acts through the image tokens' attention to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emf.conditioning.encoder import Encoder, is_frozen, set_frozen
from emf.conditioning.sampling import Sampling, uniforms
from emf.conditioning.small import Connector
from emf.conditioning.token_drawing import draw, positions
from emf.files import read_json, write_json
from emf.model.layers import States

SYSTEM = "You are a helpful assistant."
REQUEST = "Please generate image based on the following caption: {}"
Window = Literal["inference", "released"]
LONGEST = 2048
"""Tokens of a prompt, at most: what the released training code cuts at."""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids under the names of BLIP3o-NEXT's config.json."""

    image_start_tag_id: int
    """<im_start>: not Qwen's <|im_start|>."""
    image_end_tag_id: int
    scale_start_token_id: int
    """<S0>; <S1> and <S2> follow."""
    image_start_token_id: int
    """<I0>; the codebook's other entries follow."""
    num_image_tokens: int = 65536
    num_scale_tokens: int = 3

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> SpecialTokens:
        """From a config.json's fields. Raises ValueError where one is missing or no whole number.

        The counts may be absent, or be told by the ids of the last tokens."""
        values = dict(config)
        for count, first, last in (
            ("num_image_tokens", "image_start_token_id", "image_end_token_id"),
            ("num_scale_tokens", "scale_start_token_id", "scale_end_token_id"),
        ):
            if values.get(count) is None and isinstance(values.get(last), int) and isinstance(values.get(first), int):
                values[count] = values[last] - values[first] + 1
        fields = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
        needed = [n for n in ("image_start_tag_id", "image_end_tag_id", "scale_start_token_id", "image_start_token_id")]
        wrong = [n for n in needed if n not in fields] + [n for n, v in fields.items() if type(v) is not int or v < 0]
        if wrong:
            raise ValueError(
                f"conditioning: {source} has no usable {wrong[0]}; expected the token ids of a BLIP3o-NEXT checkpoint"
            )
        return cls(**fields)


class Blip3oNext(Encoder):
    """Qwen3 language model and connector. State dict: language_model.*, connector.*.

    language_model: transformers' Qwen3ForCausalLM, or Qwen3Model where nothing is generated and ar_loss is not asked
              for.
    tokenizer: of transformers, with BLIP3o-NEXT's tokens added.
    window:   "inference": <S0> and the image tokens. "released": the last 1 + n positions of the row, as the released
              training code selects them: its test for the right length can never hold, so <S0> and the first two image
              tokens are lost to <im_end>, <|im_end|> and newline. Its sampler takes the other window. Applies in
              training and sampling alike; warns.
    scale:    TA-Tok's pooling 1, 2 or 3, named in the row by <S0>, <S1>, <S2>; n is 729, 169 or 81.
    released_padding: attend to padding too, at unshifted positions, as the released sampler does when it runs the
              language model again over a padded batch. At batch size 1 there is no padding and no difference.
    freeze:   no gradient to the language model. The connector's is the caller's to freeze.
    """

    def __init__(
        self,
        language_model: Any,
        tokenizer: Any,
        tokens: SpecialTokens,
        connector: Connector,
        *,
        window: Window = "inference",
        scale: int = 1,
        image_tokens: int | None = None,
        released_padding: bool = False,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        if window not in ("inference", "released"):
            raise ValueError(f"conditioning: window is {window!r}; expected inference or released")
        if window == "released":
            warnings.warn(
                "conditioning: window 'released' shifts the states by 3 tokens against those that BLIP3o-NEXT samples "
                "with; 'inference' matches them",
                stacklevel=2,
            )
        self.language_model, self.connector, self.tokenizer = language_model, connector, tokenizer
        self.tokens, self.window, self.released_padding = tokens, window, released_padding
        self.channels: int = connector.norm.weight.shape[0]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.pool(scale, image_tokens)
        self.tail = [tokens.image_end_tag_id, *([] if end is None else [end]), *newline]
        if freeze:
            set_frozen(language_model)

    def pool(self, scale: int, image_tokens: int | None = None) -> None:
        """Read and draw images at one of TA-Tok's scales. Raises ValueError where the vocabulary has none such."""
        if not 1 <= scale <= min(3, self.tokens.num_scale_tokens):
            raise ValueError(f"conditioning: scale {scale}; expected 1 to {min(3, self.tokens.num_scale_tokens)}")
        self.scale = scale
        self.image_tokens = (27 // scale) ** 2 if image_tokens is None else image_tokens
        self.head = [self.tokens.image_start_tag_id, self.tokens.scale_start_token_id + scale - 1]

    def train(self, mode: bool = True) -> Blip3oNext:
        super().train(mode)
        if is_frozen(self.language_model):
            self.language_model.eval()
        return self

    @property
    def length(self) -> int:
        """States that condition the transformer."""
        return 1 + self.image_tokens

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return self.language_model.model if hasattr(self.language_model, "lm_head") else self.language_model

    @property
    def output_layer(self) -> nn.Module:
        if not hasattr(self.language_model, "lm_head"):
            raise ValueError("conditioning: a Qwen3Model has no output layer; load a Qwen3ForCausalLM to generate")
        layer: nn.Module = self.language_model.lm_head
        return layer

    # -- text and ids ------------------------------------------------------------------------------------------------

    def prompt(self, caption: str) -> str:
        """The chat up to where the assistant's answer begins, by the tokenizer's template where it has one, else by
        Qwen's format."""
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": REQUEST.format(caption)}]
        if getattr(self.tokenizer, "chat_template", None):
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        said = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        return said + "<|im_start|>assistant\n"

    def tokenize(self, captions: Sequence[str], image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of ids and their mask, [B, L], left-padded.

        image_ids [B, n] int64: the images' tokens as vocabulary ids (TA-Tok's codes through `from_codes`, or
        `generate`'s). None: the rows end after <S0>, ready to be continued; forward has no states for them.
        A prompt of more than LONGEST tokens loses the end of its caption, with a warning: a batch's rows are as long as
        its longest. Raises ValueError where image_ids have another shape.
        """
        texts = prompt_ids(self, captions)
        if image_ids is None:
            return self.pad([[*text, *self.head] for text in texts])
        if image_ids.shape != (len(captions), self.image_tokens):
            raise ValueError(
                f"conditioning: image_ids is {tuple(image_ids.shape)}; expected ({len(captions)}, {self.image_tokens})"
            )
        images = image_ids.tolist()
        return self.pad([[*t, *self.head, *i, *self.tail] for t, i in zip(texts, images, strict=True)])

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """ids and mask [B, L] of rows aligned at their ends."""
        length, filler = max(map(len, rows)), getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.tensor([[filler] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
        return ids, mask

    def from_codes(self, codes: Tensor) -> Tensor:
        """Vocabulary ids of TA-Tok's codes. Raises ValueError on a code outside the codebook."""
        n = self.tokens.num_image_tokens
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= n):
            raise ValueError(f"conditioning: codes lie in [{codes.min()}, {codes.max()}]; expected [0, {n})")
        return codes.long() + self.tokens.image_start_token_id

    # -- states ------------------------------------------------------------------------------------------------------

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [B, L, hidden], after the final norm; positions count from a row's first token."""
        kept: dict[str, Tensor] = {}
        if not self.released_padding:
            kept = {"attention_mask": mask.long(), "position_ids": positions(mask)}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.language_model)):
            states: Tensor = self.decoder(input_ids=ids, use_cache=False, **kept).last_hidden_state
        return states

    def select(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The 1 + n states of hidden [B, L, hidden] that condition the transformer. Raises ValueError where ids are
        not rows of `tokenize` with image tokens."""
        count, tail = 1 + self.image_tokens, len(self.tail)
        start = ids.shape[1] - count - tail
        head = torch.tensor(self.head, device=ids.device)
        if start < 1 or not torch.equal(ids[:, start - 1 : start + 1], head.expand(len(ids), 2)):
            raise ValueError(
                f"conditioning: the rows of ids {tuple(ids.shape)} do not end in <im_start>, <S{self.scale - 1}>, "
                f"{self.image_tokens} image tokens and {tail} more; make them with tokenize(captions, image_ids)"
            )
        return hidden[:, -count:] if self.window == "released" else hidden[:, start : start + count]

    def states(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None) -> tuple[Tensor, None]:
        return self.select(self.hidden(ids, mask), ids), None

    def condition(self, states: States, drop: Tensor | None = None) -> tuple[Tensor, None]:
        """Selected states [B, 1 + n, hidden] -> condition states [B, 1 + n, C]; no key mask: all are attended to. drop
        [B] bool zeroes a sample's states before the connector."""
        selected, _ = states
        if drop is not None:
            selected = torch.where(drop[:, None, None], 0.0, selected)
        return self.connector(selected.to(self.connector.norm.weight.dtype)), None

    def text_states(self, captions: Sequence[str], template: bool = True) -> tuple[Tensor, Tensor]:
        """Of the chat prompt before <im_start>, or of the caption alone; see Encoder."""
        ids, mask = (x.to(self.device) for x in self.pad(prompt_ids(self, captions, template)))
        return self.hidden(ids, mask), mask

    def save(self, folder: Path) -> None:
        language = folder / "language_model"
        self.language_model.save_pretrained(language)
        self.tokenizer.save_pretrained(language)
        write_json(language / "config.json", read_json(language / "config.json") | asdict(self.tokens), indent=2)
        self.connector.save(folder)

    # -- the language model itself -----------------------------------------------------------------------------------

    def ar_loss(self, ids: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Next-token cross entropy [B] float32 in nats, the mean over all tokens of a row, prompt included
        (BLIP3o-NEXT's second loss).

        hidden: that of `hidden(ids, mask)`, where it is there already: one pass of the language model serves both
                losses by `condition((select(hidden, ids), None), drop)`.
        Logits are made row by row and again in backward: 217,210 words times 800 positions are 0.7 GB in float32.
        """
        hidden = self.hidden(ids, mask) if hidden is None else hidden
        layer, follows = self.output_layer, mask[:, 1:] & mask[:, :-1]

        def row(states: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
            each = nn.functional.cross_entropy(layer(states).float(), labels, reduction="none")
            return (each * kept).sum() / kept.sum().clamp(min=1)

        rows = zip(hidden[:, :-1], ids[:, 1:], follows, strict=True)
        return torch.stack([checkpoint(row, *r, use_reentrant=False) for r in rows])

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        generator: torch.Generator | Sequence[torch.Generator],
        sampling: Sampling | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Exactly n image tokens a caption, as vocabulary ids [B, n] for `tokenize`.

        generator: one each makes a row independent of its batch; one for all draws the rows in turn.
        As in the released code nothing but top-k and top-p restricts a token: a model that answers with words gives
        words. Where that would end a text early it goes on: n is fixed.
        """
        from emf.show.progress import track

        layer = self.output_layer
        uniform = uniforms(generator, len(captions), self.image_tokens).to(self.device)
        rows = [[*text, *self.head] for text in prompt_ids(self, captions)]
        shown = partial(track, description="image tokens", disable=not progress)
        return draw(self.decoder, layer, rows, uniform, sampling or Sampling(), shown)


def prompt_ids(encoder: Blip3oNext, captions: Sequence[str], template: bool = True) -> list[list[int]]:
    """The tokens of each caption in its chat, or alone: LONGEST at most, of which the chat's end is kept."""

    def ids(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = encoder.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return rows

    rows = ids([encoder.prompt(c) if template else c for c in captions])
    if max(map(len, rows), default=0) <= LONGEST:
        return rows
    long = {c: len(row) for c, row in zip(captions, rows, strict=True) if len(row) > LONGEST}
    Encoder.tell_cut(encoder, long, LONGEST)
    ending = len(ids([encoder.prompt("caption").rpartition("caption")[2]])[0]) if template else 0
    return [row if len(row) <= LONGEST else row[: LONGEST - ending] + row[len(row) - ending :] for row in rows]
