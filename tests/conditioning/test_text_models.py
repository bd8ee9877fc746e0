"""Gemma, CLIP and T5 as text encoders, against plain forwards of tiny models of the real classes."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from text_models import (
    CAPTIONS,
    CLOSE,
    TextModel,
    clip,
    every_text_model,
    gemma,
)

from emf.conditioning.encoder import mean_pool
from emf.conditioning.text import TextEncoder, sana_instruction


@torch.no_grad()
def test_gemma_is_sana_pipelines_own() -> None:
    from diffusers import SanaPipeline

    torch.manual_seed(0)
    model, tokenizer = gemma()
    encoder = TextEncoder(model, tokenizer, 300, instruction=sana_instruction(), lower=True)
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
    captions = [*CAPTIONS, "a very long caption " * 40]
    # what SanaPipeline.__call__ passes on by default
    lines = sana_instruction().split("\n")
    states, mask, null, null_mask = pipeline.encode_prompt(captions, device="cpu", complex_human_instruction=lines)
    ids, row_mask = encoder.tokenize(captions)
    own, own_mask = encoder(ids, row_mask)
    assert own.shape == (4, 300, 16) and torch.equal(own_mask, mask.bool())
    torch.testing.assert_close(own, states, **CLOSE)
    dropped, dropped_mask = encoder(ids, row_mask, torch.tensor([False, True, True, False]))
    assert torch.equal(dropped_mask[1:3], null_mask[1:3].bool()) and null_mask.sum() == 4
    torch.testing.assert_close(dropped[1:3][dropped_mask[1:3]], null[1:3][null_mask[1:3].bool()], **CLOSE)
    torch.testing.assert_close(dropped[[0, 3]], own[[0, 3]], **CLOSE)


@every_text_model
@torch.no_grad()
def test_text_states_are_those_of_each_caption_alone(text_model: TextModel) -> None:
    model, tokenizer = text_model()
    encoder = TextEncoder(model, tokenizer, 77)
    states, mask = encoder(*encoder.tokenize(CAPTIONS))
    assert states.shape == (3, 77, encoder.channels) and mask.shape == (3, 77)
    for row, keep, caption in zip(states, mask, CAPTIONS, strict=True):
        plain = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[keep], plain, **CLOSE)


def test_rows_longer_than_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="90 tokens with the instruction; the model has 77 positions"):
        TextEncoder(*clip(), 77, instruction="Read: " * 2 + ".")


@every_text_model
@torch.no_grad()
@pytest.mark.parametrize("kind", ["empty", "zeros"])
def test_null_of_text_encoders(text_model: TextModel, kind: Literal["empty", "zeros"]) -> None:
    model, tokenizer = text_model()
    encoder = TextEncoder(model, tokenizer, 77, null=kind)
    states, mask = encoder(*encoder.tokenize(CAPTIONS), torch.tensor([False, True, False]))
    if kind == "zeros":
        assert mask[1].all() and not states[1].any() and states[0].any()
    else:
        plain = model(**tokenizer("", return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states[1][mask[1]], plain, **CLOSE)


@torch.no_grad()
def test_a_frozen_model_reads_its_null_once() -> None:
    """And again where its weights are others."""
    model, tokenizer = gemma()
    encoder = TextEncoder(model, tokenizer, 20)
    rows: list[int] = []
    model.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    captions, drop = encoder.tokenize(CAPTIONS), torch.tensor([False, True, True])
    states = encoder.states(*captions, drop)
    first, again = (encoder.condition(states, drop)[0] for _ in range(2))
    assert rows == [3, 1] and torch.equal(first, again) and torch.equal(encoder.null(states)[0][0], first[1])

    def now() -> torch.Tensor:
        return encoder.states(encoder.empty_ids[None], encoder.empty_mask[None])[0]

    encoder.load_state_dict({name: 1.5 * x for name, x in encoder.state_dict().items()})
    loaded = encoder.empty()[0]
    torch.testing.assert_close(loaded, now())
    assert not torch.allclose(loaded, first[1], atol=1e-3)
    encoder.double()
    assert encoder.empty()[0].dtype == torch.float64
    torch.testing.assert_close(encoder.empty()[0], now())
    rows.clear()
    model.requires_grad_(True)  # what is trained has other weights at every step, and reads it with the captions
    states = encoder.states(*captions, drop)
    kept = encoder.condition(states, drop)[0]
    assert rows == [3] and torch.equal(kept, states[0])
    torch.testing.assert_close(kept[1:2], now())
    rows.clear()
    encoder.null(states), encoder.null(states)
    assert rows == [1, 1]
    model.requires_grad_(False)
    with torch.inference_mode():
        encoder.empty()
    model.requires_grad_(True)
    encoder.states(*captions)
    next(model.parameters()).mul_(2)
    model.requires_grad_(False)
    torch.testing.assert_close(encoder.empty()[0], now())  # not what it read before it was trained


def test_a_null_that_was_read_in_inference_mode_serves_training() -> None:
    encoder = TextEncoder(*gemma(), 20)
    with torch.inference_mode():
        empty = encoder.empty()[0]
    (empty * torch.ones(1, requires_grad=True)).sum().backward()


@every_text_model
@torch.no_grad()
def test_the_mean_is_over_the_captions_tokens(text_model: TextModel) -> None:
    model, tokenizer = text_model()
    plain = torch.stack([model(**tokenizer(c, return_tensors="pt")).last_hidden_state[0].mean(0) for c in CAPTIONS])
    alone = TextEncoder(model, tokenizer, 77)
    torch.testing.assert_close(mean_pool(*alone.text_states(CAPTIONS)), plain, **CLOSE)
    instructed = TextEncoder(model, tokenizer, 60, instruction="Describe: ")
    torch.testing.assert_close(mean_pool(*instructed.text_states(CAPTIONS, template=False)), plain, **CLOSE)
    assert not torch.allclose(mean_pool(*instructed.text_states(CAPTIONS)), plain, atol=1e-3)


@every_text_model
def test_captions_that_are_cut_are_counted(text_model: TextModel, recwarn: pytest.WarningsRecorder) -> None:
    """Those that fill the row to its last token are not cut."""
    encoder = TextEncoder(*text_model(), 8)
    whole = next(text for n in range(1, 9) if len(encoder.tokenizer(text := "a" * n).input_ids) == 8)
    assert encoder.tokenize([whole, "a"])[1][0].all() and not recwarn.list
    for caption in (whole + "a", whole + "b", whole + "a"):
        encoder.text_states([caption], template=False)
    told = [str(w.message) for w in recwarn]
    assert len(told) == 2 and all("was cut to 8" in line for line in told) and told[1].endswith("2 captions so far")
