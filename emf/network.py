"""From a config to the network, and from files to its weights."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emf.conditioning.small import SmallEncoder
from emf.config import Config
from emf.convert import add_time_branches
from emf.data.digits import VOCAB
from emf.model import TextToImage, Transformer

ASSETS = Path(__file__).parent / "assets"


def build(config: Config, from_scratch: bool = False) -> TextToImage:
    """The network of a config, float32 on CPU. from_scratch: with config.init's weights, time branches added where
    the config asks for them.

    MeanFlow trains all but the pretrained time embedding and, with freeze_encoder, the encoder. EMF's release freezes
    the patch embedding, the caption's projection and norm, and the output projection too.
    """
    network = TextToImage(SmallEncoder(config.encoder, len(VOCAB)), Transformer(config.transformer))
    if from_scratch and config.init is not None:
        state = read_weights(config.init)
        if config.transformer.dual_time:
            state = add_time_branches(state, config.transformer, config.embedder_init)
        load_weights(network, state, str(config.init))
    if config.freeze_encoder:
        network.encoder.requires_grad_(False)
    if config.objective == "meanflow":
        network.transformer.time_embed.requires_grad_(False)
    return network


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first. One that is being written or removed has another name, and so
    has a copy that somebody keeps."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{7}", p.name) and p.is_dir())


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file in float32; a bare name that is no file here means the one shipped in emf/assets. Raises
    ValueError where it is missing or broken."""
    shipped = ASSETS / path
    try:
        return {
            k: v.float() for k, v in load_file(shipped if not path.exists() and shipped.is_file() else path).items()
        }
    except FileNotFoundError:
        raise ValueError(f"weights: no file {path}") from None
    except OSError as error:
        raise ValueError(f"weights: {path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is not a safetensors file: {error}") from None


def load_weights(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Strictly: every key and shape must agree. Raises ValueError naming the first that does not."""
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        first = f"missing {missing[0]}" if missing else f"unexpected {extra[0]}" if extra else f"shape of {shapes[0]}"
        raise ValueError(
            f"weights: {source} is of another model: {len(missing)} missing, {len(extra)} extra, "
            f"{len(shapes)} misshaped keys; {first}"
        )
    network.load_state_dict(state)
