"""Whatever the settings of a model hold that another library reads: the model, or one line that names its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from damaged import changed, damaged, holds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from image_files import small_autoencoder
from text_models import clip

from emf.conditioning.load import load
from emf.evaluate.clip import pretrained
from emf.model.autoencoder import load_dcae


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text encoder and its tokenizer, and one with an autoencoder."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = clip()
    model.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    small_autoencoder().save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("name", ["clip/config.json", "clip/tokenizer_config.json", "vae/config.json"])
@settings(max_examples=15)
@given(data=st.data())
def test_any_settings_of_a_model(name: str, data: st.DataObject, models: Path) -> None:
    """Numbers of layers that take hours to make are left out."""
    file = models / name
    whole = file.read_bytes()
    tree: Any = data.draw(changed([json.loads(whole)]))
    assume(not any(str(large) in json.dumps(tree) for large in (2**31, 2**70)))
    torn = data.draw(st.none() | damaged([whole]))
    file.write_bytes(json.dumps(tree).encode() if torn is None else torn)
    try:
        if name.startswith("vae"):
            holds(lambda: load_dcae(models / "vae"), str(models / "vae"))
        else:
            from transformers import AutoTokenizer, CLIPTextModel

            holds(lambda: load("clip", models / "clip"), str(models / "clip"))
            kind = CLIPTextModel if name == "clip/config.json" else AutoTokenizer
            holds(lambda: pretrained(kind, str(models / "clip"), "a scorer"), str(models / "clip"))
    finally:
        file.write_bytes(whole)
