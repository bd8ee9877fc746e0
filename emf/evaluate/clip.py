"""CLIP as two encoders (transformers' CLIPModel), and how a scorer gets a pretrained model."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emf.files import check_readable, files_in, why
from emf.model.state import variant
from emf.sample.sampler import bad_weight
from emf.weights.hub import NETWORK, named

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels CLIP was trained on, in [0, 1]; BLIP uses them too."""

VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
"""What a tokenizer's words are in."""


def pretrained(cls: Any, where: str, what: str) -> Any:
    """cls.from_pretrained(where), whole: weights that a checkpoint lacks would otherwise be random, with a warning.

    where: a folder or a Hub name. Raises ValueError, saying what to put where.
    """
    # a tokenizer has no weights that could be missing
    weights = hasattr(cls, "forward")
    how: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32} if weights else {}
    folder = named(where, NETWORK, what)
    try:
        if folder.is_dir():
            check_readable(folder)
            how |= {"variant": variant(folder)} if weights else {}
        loaded = cls.from_pretrained(str(folder), **how)
    except Exception as error:  # a config with a value of another kind fails wherever that is used
        files = "config.json and model.safetensors" if weights else "the tokenizer's files"
        raise ValueError(
            f"{what}: {where} cannot be loaded ({why(error)}); put {files} of it into a folder and name that"
        ) from None
    if not weights:
        if folder.is_dir() and not files_in(folder, *VOCABULARY):  # transformers would make one without words
            raise ValueError(f"{what}: {where} holds none of {', '.join(VOCABULARY)}; put the tokenizer's files there")
        return loaded
    model, info = loaded
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("criterion."))  # of training alone
    if missing:
        raise ValueError(f"{what}: {where} lacks {len(missing)} weights of {cls.__name__}, {missing[0]} the first")
    if bad := bad_weight(model):
        raise ValueError(f"{what}: {bad} of {where} holds NaN or inf; download it again")
    return model.eval()


def normalized(image: Image.Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """RGB image -> (pixels / 255 - mean) / std, float32 [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def center_square(image: Image.Image, size: int) -> Image.Image:
    """CLIP's own view: shorter side to `size` (bicubic), then the central square."""
    w, h = image.size
    short = min(w, h)
    w, h = (size * w // short, size) if w > h else (size, size * h // short)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


class Clip:
    """Images and texts to unit vectors.

    The text's state is taken at the highest token id, the end of text, as OpenAI's and open_clip's code do: right
    whatever the tokenizer pads with, for attention is causal.
    """

    def __init__(self, model: Any, tokenizer: Any, cleaned: bool = True) -> None:
        """cleaned: texts go through `clean` first, as in open_clip; else to the tokenizer as they are, as in
        transformers."""
        self.model, self.tokenizer, self.cleaned = model.eval(), tokenizer, cleaned
        self.size = int(model.config.vision_config.image_size)
        """Pixels along a side."""

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, size, size] -> [n, E] float32, unit length."""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
        return _unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """n texts -> [n, E] float32, unit length; what exceeds the context is cut off."""
        length = int(self.model.config.text_config.max_position_embeddings)
        ids = self.tokenizer(
            [clean(t) if self.cleaned else t for t in texts],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).input_ids.to(self.model.device)
        known = int(self.model.config.text_config.vocab_size)
        if int(ids.max()) >= known:
            raise ValueError(
                f"evaluate: the tokenizer gives token {int(ids.max())}, and CLIP knows {known}; give its own tokenizer"
            )
        states = self.model.text_model(input_ids=ids).last_hidden_state
        return _unit(self.model.text_projection(states[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]))


def clean(text: str) -> str:
    """A text as open_clip cleans and splits it before it looks for tokens: broken Unicode is mended, typographic quotes
    and full-width letters are made plain, HTML's names of letters are read, white space is one blank.

    The names of OpenAI's special tokens are text there, of three words. Those of open_clip's own, <start_of_text> and
    <end_of_text>, are text here too, which they are not there.
    """
    import ftfy  # where a text is scored alone

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = re.sub(r"<\|(startoftext|endoftext)\|>", r"<| \1 |>", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)
