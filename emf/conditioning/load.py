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

Kind = Literal["blip3o", "gemma", "clip", "t5", "text"]
TEXT_MODELS = {"gemma": "Gemma2Model", "clip": "CLIPTextModel", "t5": "T5EncoderModel"}
"""Classes of transformers."""
LENGTHS = {"gemma": 300, "clip": 77, "t5": 300, "text": 300}
"""Most tokens of a caption; of "text" less where the model reads less."""
BY_TYPE: dict[str, Kind] = {"gemma2": "gemma", "clip": "clip", "clip_text_model": "clip", "t5": "t5"}
"""By the model_type of a config.json: the kinds that are read in a way of their own."""


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
          300 tokens. "clip": 77 tokens. "t5": 300 tokens. "text": any other text model that transformers' AutoModel
          knows, of an encoder with a decoder the encoder. A diffusers pipeline's folder will do for these four:
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
    parts = _parts(folder)
    model = (_empty if empty else _model)(_class(kind, parts[0]), parts[0], dtype)
    tokenizer = _tokenizer(parts[1])
    if kind == "text":
        model = _text_part(model)
        settings = {"length": _most_tokens(model, tokenizer), **settings}
        if tokenizer.pad_token is None:  # of a language model: what stands at padding is never read
            tokenizer.pad_token = tokenizer.eos_token
    if kind == "gemma":
        settings = {"lower": True, **settings}
        if "instruction" not in settings:
            settings["instruction"] = sana_instruction()
    settings = {"length": LENGTHS[kind], **settings}
    try:
        return TextEncoder(model, tokenizer, freeze=freeze, **settings)
    except Exception as error:  # a tokenizer that cannot pad, or a model that says no width
        raise ValueError(f"conditioning: {folder}: {why(error).removeprefix('conditioning: ')}") from None


def kind_of(folder: Path) -> Kind:
    """Which kind of encoder a folder holds. Raises ValueError where it has no config.json that says so."""
    if (folder / "language_model").is_dir():
        return "blip3o"
    told = _config(_parts(folder)[0]).get("model_type")
    if not isinstance(told, str):
        raise ValueError(
            f"conditioning: {_parts(folder)[0] / 'config.json'} says no model_type; expected a text model's"
        )
    return BY_TYPE.get(told, "text")


def _parts(folder: Path) -> list[Path]:
    """Where the model and its tokenizer lie: in folders of their own in a diffusers pipeline."""
    return [folder / name if (folder / name).is_dir() else folder for name in ("text_encoder", "tokenizer")]


def _class(kind: Kind, folder: Path) -> Any:
    """The class of transformers that reads a folder."""
    import transformers

    if kind in TEXT_MODELS:
        return getattr(transformers, TEXT_MODELS[kind])
    _config(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        known = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING, transformers.MODEL_MAPPING
        # a configuration has one class, or a tuple of which the first is the usual one
        found = next(mapping[type(config)] for mapping in known if type(config) in mapping)
    except StopIteration:
        raise ValueError(f"conditioning: {folder} holds no text model that transformers knows") from None
    except Exception as error:  # a config with a value of another kind fails wherever that is used
        raise ValueError(f"conditioning: {folder} holds no text model: {why(error)}") from None
    return found[0] if isinstance(found, (tuple, list)) else found


def _text_part(model: Any) -> Any:
    """What of a model reads text alone: the encoder of one with a decoder, the text tower of one for images too."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "text_model", model)


def _most_tokens(model: Any, tokenizer: Any) -> int:
    """How many tokens a text model reads, at most LENGTHS says so many."""
    sizes = model.config.get_text_config()
    positions = getattr(sizes, "max_position_embeddings", None) or LENGTHS["text"]
    # RoBERTa and its like count positions from behind the padding's
    reserved = (getattr(sizes, "pad_token_id", None) or 0) + 1 if "roberta" in sizes.model_type else 0
    return int(min(LENGTHS["text"], positions - reserved, tokenizer.model_max_length))


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
    # a pooler makes one vector of the states, which nobody asks for: a model without a head for it may lack it
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
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
