"""Pretrained encoders from folders on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from emf.conditioning.blip3o import Blip3oNext, SpecialTokens, Window
from emf.conditioning.encoder import Encoder
from emf.conditioning.small import Connector, connector_file
from emf.conditioning.text import TextEncoder, sana_instruction
from emf.files import check_readable, files_in, read_object, why
from emf.model.state import read_state, variant

Kind = Literal["blip3o", "gemma", "clip", "t5"]
TEXT_MODELS = {"gemma": "Gemma2Model", "clip": "CLIPTextModel", "t5": "T5EncoderModel"}
"""Classes of transformers."""
LENGTHS = {"gemma": 300, "clip": 77, "t5": 300}


def load(
    kind: Kind,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    freeze: bool = True,
    empty: bool = False,
    **settings: Any,
) -> Encoder:
    """An encoder of a folder with config.json, safetensors and tokenizer files; nothing is downloaded.

    kind: "blip3o": BLIP3o-NEXT's or EMF's, as emf convert and emf export write it: language_model/ and
          a connector; what else is in the folder is not read. "gemma": Gemma-2 with SANA's instruction,
          300 tokens. "clip": 77 tokens. "t5": 300 tokens. A diffusers pipeline's folder will do for these three:
          text_encoder/ and tokenizer/ in it are taken.
    empty: leave the model's weights on the meta device: their values come from elsewhere.
    settings: keywords of Blip3oNext or TextEncoder (window, length, instruction, null, ...).
    Raises ValueError where the folder or one of its files is missing, broken or of another model.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"conditioning: encoder {kind!r}; expected one of {', '.join(get_args(Kind))}")
    if not folder.is_dir():
        raise ValueError(f"conditioning: no folder {folder}; expected that of a {kind} encoder")
    if kind == "blip3o":
        return _load_blip3o(folder, dtype, freeze, empty, **settings)
    import transformers

    parts = [folder / name if (folder / name).is_dir() else folder for name in ("text_encoder", "tokenizer")]
    model = (_empty if empty else _model)(getattr(transformers, TEXT_MODELS[kind]), parts[0], dtype)
    if kind == "gemma":
        settings = {"lower": True, **settings}
        if "instruction" not in settings:
            settings["instruction"] = sana_instruction()
    settings = {"length": LENGTHS[kind], **settings}
    try:
        return TextEncoder(model, _tokenizer(parts[1]), freeze=freeze, **settings)
    except Exception as error:  # a tokenizer that cannot pad, or a model that says no width
        raise ValueError(f"conditioning: {folder}: {why(error).removeprefix('conditioning: ')}") from None


def _load_blip3o(
    folder: Path, dtype: torch.dtype, freeze: bool, empty: bool, window: Window = "inference", **settings: Any
) -> Encoder:
    from transformers import Qwen3ForCausalLM

    language, file = folder / "language_model", connector_file(folder)
    if not (language.is_dir() and file.is_file()):
        raise ValueError(
            f"conditioning: {folder} has no language_model and connector; make them of a BLIP3o-NEXT "
            "checkpoint with `emf convert`"
        )
    tokens = SpecialTokens.from_config(_config(language), str(language / "config.json"))
    model = (_empty if empty else _model)(Qwen3ForCausalLM, language, dtype)
    try:
        state = read_state(file)
        channels, hidden = state["linear_1.weight"].shape
        connector = Connector(hidden, channels).to(dtype)
        connector.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"conditioning: {file} is no connector of BLIP3o-NEXT: {why(error)}") from None
    return Blip3oNext(model, _tokenizer(language), tokens, connector, window=window, freeze=freeze, **settings)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars, and its warnings: on a model type of BLIP3o-NEXT's own, and on every key of its
    transformer."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"conditioning: {folder} holds no config.json; expected a checkpoint's folder")
    return read_object(file, "conditioning")


def _model(kind: Any, folder: Path, dtype: torch.dtype, **arguments: Any) -> Any:
    """kind.from_pretrained, all of whose weights must be in the folder; what else is there is not read."""
    if not files_in(folder, "*.safetensors"):
        raise ValueError(f"conditioning: {folder} holds no *.safetensors; expected the weights of a {kind.__name__}")
    _config(folder)
    try:
        check_readable(folder)
        with quiet():
            model, report = kind.from_pretrained(
                folder,
                dtype=dtype,
                variant=variant(folder),
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:  # a config with a value of another kind fails wherever that is used
        raise ValueError(f"conditioning: {folder} is no {kind.__name__}: {why(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"conditioning: {folder} is no {kind.__name__}: {len(missing)} weights missing, first {missing[0]}"
        )
    return model


def _empty(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model that _model loads, on the meta device."""
    _config(folder)
    try:
        with quiet(), torch.device("meta"):
            config = kind.config_class.from_pretrained(folder, local_files_only=True)
            return kind._from_config(config, dtype=dtype).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"conditioning: {folder} is no {kind.__name__}: {why(error)}") from None


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        check_readable(folder)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer(
            "a", add_special_tokens=False
        ).input_ids:  # transformers 5 makes an empty one where there are no files
            raise ValueError("it reads no text; are tokenizer.json and its like missing?")
        return tokenizer
    except Exception as error:  # each tokenizer class has its own way to miss a file
        raise ValueError(f"conditioning: {folder} holds no usable tokenizer: {why(error)}") from None
