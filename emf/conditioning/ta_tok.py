"""TA-Tok, the image tokenizer of BLIP3o-NEXT (Tar, arXiv 2506.18898): an image to 729 codes, for training without
codes at hand.

    SigLIP2's vision model, last hidden states but one -> average pool -> Linear, tanh -> Linear -> nearest entry of a
    codebook that is itself a Linear of an embedding (SimVQ)
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emf.errors import Torn
from emf.files import why
from emf.model.state import read_pickle

HEADS = 16  # attention heads of so400m; no weight's shape tells them
UNUSED = ("decoder.", "decode_task_layer.", "teacher.", "scale_layer.", "bottleneck.out_linear.")


class TaTok(nn.Module):
    """Images -> codes. Parameters under the names of ta_tok.pth, without those that serve its decoder.

    vision: transformers' SiglipVisionModel. dim: channels of a codebook entry. codebook: number of entries.
    normalize: compare by cosine, else by distance. scale: pool 1 x 1, 2 x 2 or 3 x 3 tokens into one.
    layer: index into the hidden states.
    """

    def __init__(
        self, vision: Any, dim: int, codebook: int, *, normalize: bool = True, scale: int = 1, layer: int = -2
    ) -> None:
        super().__init__()
        hidden = vision.config.hidden_size
        self.encoder, self.size = vision, int(vision.config.image_size)
        self.normalize, self.scale, self.layer = normalize, scale, layer
        self.encode_task_layer = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())
        regularizer = nn.ModuleDict({"embedding": nn.Embedding(codebook, dim), "embedding_proj": nn.Linear(dim, dim)})
        self.bottleneck = nn.ModuleDict({"in_linear": nn.Linear(hidden, dim), "regularizer": regularizer})
        self.requires_grad_(False).eval()

    def codes_of(self, features: Tensor) -> Tensor:
        """features [B, N, dim] -> index [B, N] int64 of the nearest codebook entry. In float32: neighbours lie closer
        than bfloat16 tells."""
        parts: Any = self.bottleneck["regularizer"]
        table = parts["embedding_proj"](parts["embedding"].weight).float()
        features = features.float()
        if self.normalize:
            table, features = F.normalize(table, dim=-1), F.normalize(features, dim=-1)
            bias = table.new_zeros(len(table))
        else:
            bias = -table.square().sum(-1) / 2  # argmin of the distance: |z|^2 is the same for all entries
        # image by image: a score a token and entry, 191 MB
        return torch.stack([torch.addmm(bias, z, table.T).argmax(-1) for z in features])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1], RGB -> codes [B, N] int64, row by row; N is 729 at scale 1.

        Other sizes are resized to 384 x 384 with antialiasing, as SigLIP's processor does. Raises ValueError on
        another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"ta_tok: images is {tuple(images.shape)}; expected [B, 3, H, W]")
        x = images.to(next(self.parameters()).dtype)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(images.float(), (self.size, self.size), mode="bilinear", antialias=True).to(x.dtype)
        features = self.encoder(x, output_hidden_states=True).hidden_states[self.layer]
        if self.scale > 1:
            side = round(features.shape[1] ** 0.5)
            grid = features.transpose(1, 2).unflatten(2, (side, side))
            features = F.avg_pool2d(grid, self.scale).flatten(2).transpose(1, 2)
        return self.codes_of(self.bottleneck["in_linear"](self.encode_task_layer(features)))


def load_ta_tok(path: Path, *, scale: int | None = None, heads: int = HEADS) -> TaTok:
    """TaTok in float32 from ta_tok.pth, a torch.save of {"model": {"args": ..., "sd": ...}}.

    scale: as TaTok's; None: the file's. Raises ValueError where the file is missing, broken, or of another layout.
    """
    saved = _read(path)
    try:
        arguments, state = saved["model"]["args"], dict(saved["model"]["sd"])
        regularizer = arguments["bottleneck"]["args"]["regularizer"]["args"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'ta_tok: {path} has no ["model"]["args"] and ["model"]["sd"] of TA-Tok ({error!r})') from None
    try:
        state = {k: v.float() for k, v in state.items() if not k.startswith(UNUSED)}
        vision = _vision(state, int(arguments.get("input_size", 384)), heads)
        codebook, dim = state["bottleneck.regularizer.embedding.weight"].shape
        model = TaTok(
            vision,
            dim,
            codebook,
            normalize=bool(regularizer.get("l2_normalized", False)),
            scale=int(arguments.get("pool_scale", 1)) if scale is None else scale,
            layer=int(arguments.get("select_layer_id", -2)),
        )
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"ta_tok: {path} holds no TA-Tok weights ({why(error)})") from None
    own = model.state_dict()
    renamed = {_own_name(k, own): v for k, v in state.items()}
    wrong = sorted(own.keys() ^ renamed.keys()) or [k for k in own if own[k].shape != renamed[k].shape]
    if wrong:
        raise ValueError(f"ta_tok: {path} is of another model; {wrong[0]} is missing, unexpected or of another shape")
    model.load_state_dict(renamed)
    return model


def _read(path: Path) -> Any:
    """The file's contents, without running code of its own where that is possible."""
    if not path.is_file():
        raise ValueError(f"ta_tok: no file {path}; expected TA-Tok's ta_tok.pth")
    try:
        # the published arguments were saved as a dict subclass of a package that need not be installed
        return read_pickle(path, [(OrderedDict, "easydict.EasyDict")])
    except Torn as error:
        if not (isinstance(error.__cause__, pickle.UnpicklingError) and zipfile.is_zipfile(path)):
            raise ValueError(f"ta_tok: {path} is not a file of torch.save ({why(error.__cause__ or error)})") from None
    warnings.warn(f"ta_tok: {path} holds more than weights; reading it runs code from it", stacklevel=3)
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever a pickle can raise
        raise ValueError(f"ta_tok: {path} cannot be read: {type(error).__name__}: {why(error)}") from None


def _vision(state: Mapping[str, Tensor], size: int, heads: int) -> Any:
    """A SiglipVisionModel of the shapes in the weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    def shape(name: str) -> torch.Size:
        found = [v.shape for k, v in state.items() if k.startswith("encoder.") and k.endswith(name)]
        if not found:
            raise KeyError(f"no encoder.{name}")
        return found[0]

    hidden, _, patch, _ = shape("embeddings.patch_embedding.weight")
    layers = {k.split("layers.")[1].split(".")[0] for k in state if k.startswith("encoder.") and "layers." in k}
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=hidden,
            intermediate_size=shape("mlp.fc1.weight")[0] if layers else 1,
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            image_size=size,
            patch_size=patch,
            vision_use_head=any(k.startswith("encoder.") and ".head." in k for k in state),
        )
    )


def _own_name(key: str, own: Mapping[str, Tensor]) -> str:
    """A file's key under the installed transformers' nesting of the vision model, which has changed over versions."""
    if not key.startswith("encoder.") or key in own:
        return key
    bare = key.removeprefix("encoder.").removeprefix("vision_model.")
    return next((k for k in (f"encoder.{bare}", f"encoder.vision_model.{bare}") if k in own), key)
