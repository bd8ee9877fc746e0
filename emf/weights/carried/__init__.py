"""What an export carries for those who have not got emf: the modules of this folder, which diffusers runs where it is
told trust_remote_code=True, and what they have to know of the text stage. They import nothing of emf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emf.conditioning.blip3o import REQUEST, SYSTEM, Blip3oNext
from emf.conditioning.load import TEXT_MODELS
from emf.conditioning.sampling import Sampling
from emf.conditioning.small import CONNECTOR, SmallEncoder
from emf.conditioning.text import TextEncoder
from emf.files import copy_file, write_json
from emf.weights.tensors import Weights

HERE = Path(__file__).parent
PIPELINE, TRANSFORMER = "flow_map_pipeline", "flow_map_transformer"
SMALL, CONNECTED = "flow_map_words", "flow_map_connector"
INDEX: dict[str, Any] = {
    "_class_name": [PIPELINE, "EMFPipeline"],
    "transformer": [TRANSFORMER, "EMFTransformer2DModel"],
    "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
}
"""How model_index.json names the parts that every flow map has: [library or file beside the weights, class]."""
TOKENIZER_FILES = (
    "token*.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_templ*",
)


def settings_of(encoder: Any, built_in: float) -> dict[str, Any]:
    """What the carried pipeline has to know of a text encoder, to read captions as it does.

    built_in: guidance that the network has already (FlowConfig.built_in).
    """
    told: dict[str, Any] = {"built_in": built_in}
    if isinstance(encoder, SmallEncoder):
        told |= {"kind": "small", "vocabulary": list(encoder.words.vocabulary), "length": encoder.words.length}
        told["read_as"] = list(range(len(told["vocabulary"]))) if encoder.read_as is None else encoder.read_as.tolist()
    elif isinstance(encoder, TextEncoder) and encoder.null_kind == "empty":
        kinds = {model: kind for kind, model in TEXT_MODELS.items()}
        told |= {"kind": kinds.get(type(encoder.model).__name__), "length": encoder.length}
        told |= {"instruction": encoder.instruction, "lower": encoder.lower}
    elif isinstance(encoder, Blip3oNext) and not encoder.released_padding:
        told |= {"kind": "blip3o", "system": SYSTEM, "request": REQUEST, "window": encoder.window}
        told |= {"head": encoder.head, "tail": encoder.tail, "tokens": encoder.image_tokens}
        told |= dict(vars(Sampling()))
    return told


def carry(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Put the modules, and what they ask for, beside the weights of an unfinished export of a flow map. Returns what
    model_index.json says of them beside INDEX."""
    index, language = dict[str, Any](settings=settings), folder / "language_model"
    _put(PIPELINE, folder)
    _put(TRANSFORMER, folder / "transformer")
    if settings.get("kind") == "small":
        _put(SMALL, folder / "text_encoder")
        index["text_encoder"] = [SMALL, "SmallEncoder"]
    index |= {"language_model": [None, None], "connector": [None, None]}
    if not language.is_dir():
        return index
    index["language_model"] = ["transformers", "Qwen3ForCausalLM"]
    if (language / "tokenizer.json").is_file():  # once more, in the folder where diffusers looks for it
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        (folder / "tokenizer").mkdir()
        for file in {f for pattern in TOKENIZER_FILES for f in language.glob(pattern)}:
            copy_file(file, folder / "tokenizer" / file.name)
    file = folder.joinpath(*CONNECTOR)
    _put(CONNECTED, file.parent)
    channels, hidden = Weights([file]).entries["linear_1.weight"].shape
    about = {"_class_name": "EMFConnector", "hidden": hidden, "channels": channels}
    write_json(file.with_name("config.json"), about, indent=2)
    return index | {"connector": [CONNECTED, about["_class_name"]]}


def _put(module: str, folder: Path) -> None:
    copy_file(HERE / f"{module}.py", folder / f"{module}.py")
