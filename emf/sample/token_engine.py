"""Engines that draw BLIP3o-NEXT's image tokens in the place of its language model here.

Their random numbers are their own: the tokens of a seed are not those of Blip3oNext.generate. What conditions the
transformer is computed here, of whatever tokens there are, so that the same tokens give the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from os import environ
from pathlib import Path
from typing import Any, Protocol

import torch

from emf.conditioning.blip3o import LONGEST, Blip3oNext
from emf.conditioning.sampling import Sampling
from emf.config import Config
from emf.device import launched
from emf.files import why
from emf.idle import refuse_idle
from emf.model.text_to_image import TextToImage
from emf.sample.token_server import TokenServer

SHARE = 0.5
"""Of a GPU's memory, which vLLM takes at once: the language model and the transformer here need theirs beside it."""


class Engine(Protocol):
    """What draws image tokens."""

    said: str
    """What it is, for a picture's manifest: other engines and other models draw other tokens of a seed."""

    def begin(self, encoder: Blip3oNext, folder: Path) -> None:
        """Before the first drawing, with the encoder whose states the tokens will give. folder: of the language model.
        Raises ValueError where the engine cannot read it, or has another vocabulary."""

    def draw(self, rows: list[list[int]], n: int, seeds: Sequence[int], sampling: Sampling) -> list[list[int]]:
        """n ids that continue each row of ids, by a seed of 31 bits each. Raises ValueError where they cannot be had.
        Their number and range are the caller's to check."""


class Vllm:
    """vLLM in this process, by its offline interface: LLM(model).generate of prompts with prompt_token_ids, with a
    SamplingParams each (docs.vllm.ai, "Offline Inference" and "SamplingParams"). Raises ValueError where vllm cannot be
    imported."""

    def __init__(self) -> None:
        environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # its own is stdout, where files are named
        try:
            self.vllm: Any = import_module("vllm")
        except ImportError as error:
            raise ValueError(
                f"image tokens: --ar vllm imports vllm, which is not there ({why(error)}); install it, or let a server "
                "draw them: --ar-server"
            ) from None
        self.said = f"vllm {getattr(self.vllm, '__version__', '')}".strip()

    def begin(self, encoder: Blip3oNext, folder: Path) -> None:
        length = LONGEST + len(encoder.head) + encoder.image_tokens
        try:
            self.llm = self.vllm.LLM(model=str(folder), max_model_len=length, gpu_memory_utilization=SHARE)
        except Exception as error:  # whatever its many parts raise
            raise ValueError(f"image tokens: vLLM cannot load {folder}: {why(error)}") from None

    def draw(self, rows: list[list[int]], n: int, seeds: Sequence[int], sampling: Sampling) -> list[list[int]]:
        how = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        each = [
            self.vllm.SamplingParams(**how, max_tokens=n, ignore_eos=True, detokenize=False, seed=seed)
            for seed in seeds
        ]
        try:
            done = self.llm.generate([{"prompt_token_ids": row} for row in rows], each, use_tqdm=False)
        except Exception as error:
            raise ValueError(f"image tokens: vLLM cannot draw them: {why(error)}") from None
        return [list(request.outputs[0].token_ids) for request in done]


def find_engine(ar: str, place: torch.device | None = None) -> Engine:
    """`vllm`, or a server by its address. place: where the transformer computes. Raises ValueError where the engine is
    not there, and where vLLM, which takes the first GPU that it sees, would meet others on it."""
    if ar != "vllm":
        return TokenServer(ar)
    if (place is not None and place.index) or launched()[1] > 1:
        raise ValueError(
            "image tokens: --ar vllm draws on the first GPU, for one process; choose the GPU by CUDA_VISIBLE_DEVICES, "
            "or let a server draw for all processes: --ar-server"
        )
    return Vllm()


def begin(engine: Engine, run: Path, config: Config, network: TextToImage) -> None:
    """Make an engine ready for the network of a run. Raises ValueError where it has nothing to draw there, or other
    weights or another vocabulary."""
    here, encoder = isinstance(engine, Vllm), network.encoder
    if not isinstance(encoder, Blip3oNext):
        why_idle = f"the text encoder of {run} draws no image tokens"
        refuse_idle("generate", {"ar": here, "ar_server": not here}, why_idle)
        return
    if any(name.startswith("encoder.language_model.") for name in network.own_encoder):
        raise ValueError(
            f"generate: {run} tuned its language model, and an engine reads one from a folder: emf export the run, "
            "and draw from the export" + ", whose language_model the server then serves" * (not here)
        )
    engine.begin(encoder, (config.text_folder or Path(run)) / "language_model")
