"""A small text encoder of the paper's kind: a Qwen3 language model from a config, and BLIP3o-NEXT's connector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emf.conditioning.encoder import Encoder
from emf.conditioning.words import Words
from emf.files import make_folder, whole_file, write_json
from emf.model.layers import Linear, RMSNorm, States
from emf.model.sizes import EncoderConfig


class Connector(nn.Module):
    """LLM states [B, M, hidden] -> [B, M, C]: Linear, GELU(tanh), Linear, RMSNorm whose weight starts at sqrt(5.5)
    (BLIP3o-NEXT, arXiv 2510.15857)."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2, self.norm = (
            Linear(hidden, channels),
            Linear(channels, channels),
            RMSNorm(channels),
        )
        nn.init.constant_(self.norm.weight, 5.5**0.5)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(self.linear_2(nn.functional.gelu(self.linear_1(states), approximate="tanh")))

    def save(self, folder: Path) -> None:
        """Write the weights into a pipeline's folder, where `connector_file` finds them."""
        make_folder(folder / CONNECTOR[0])
        with whole_file(folder.joinpath(*CONNECTOR)) as part:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, part)


CONNECTOR = ("connector", "diffusion_pytorch_model.safetensors")
"""Where an export has a connector's weights: in a folder of their own, as diffusers loads them."""


def connector_file(folder: Path) -> Path:
    """Where a folder has, or would have, a connector's weights: an export, or one from `emf convert`, where they are a
    file beside the language model."""
    exported = folder.joinpath(*CONNECTOR)
    return exported if exported.is_file() else folder / "connector.safetensors"


class SmallEncoder(Encoder):
    """A small world's words -> condition states [B, M, C] and key mask [B, M]; jointly trained."""

    def __init__(self, config: EncoderConfig, words: Words) -> None:
        from transformers import Qwen3Config, Qwen3Model  # seconds, which `emf --help` need not take

        super().__init__()
        self.config, self.words, self.channels = config, words, config.out_channels
        self.language_model = Qwen3Model(
            Qwen3Config(
                vocab_size=len(words.vocabulary),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                use_cache=False,
                pad_token_id=0,
                attn_implementation="eager",  # type: ignore[call-arg]
            )
        )
        # Words must stay apart while nothing depends on them yet: at the usual 0.02 the first steps drown their
        # differences in a common drift.
        nn.init.normal_(self.language_model.embed_tokens.weight)
        self.connector = Connector(config.hidden_size, config.out_channels)
        self.read_as: Tensor | None
        self.register_buffer("read_as", words.blurred() if config.blurred else None, persistent=False)

    def tokenize(self, captions: Sequence[str], image_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Right-padded. Raises ValueError on a word that is none of the world's."""
        return self.words.encode(captions)

    def states(self, ids: Tensor, mask: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ids = ids if self.read_as is None else self.read_as[ids]
        return self.language_model(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def condition(self, states: States, drop: Tensor | None = None) -> States:
        """drop [B] bool: samples whose states are zeroed before the connector (condition dropout, the null condition);
        they attend to all M positions, so that the length of the dropped caption does not show."""
        read, mask = states
        assert mask is not None
        if drop is not None:
            read, mask = torch.where(drop[:, None, None], 0.0, read), mask | drop[:, None]
        return self.connector(read), mask

    def text_states(self, captions: Sequence[str], template: bool = True) -> tuple[Tensor, Tensor]:
        return self.states(*(x.to(self.device) for x in self.tokenize(captions)))

    def save(self, folder: Path) -> None:
        own = folder / "text_encoder"
        own.mkdir(parents=True, exist_ok=True)
        write_json(own / "config.json", asdict(self.config), indent=2)
        with whole_file(own / "model.safetensors") as part:
            save_file(self.state_dict(), part)

    @property
    def parts(self) -> dict[str, list[str]]:
        return {"text_encoder": ["emf", "SmallEncoder"]}
