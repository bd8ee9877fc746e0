"""BLIP3o-NEXT's states, losses and image tokens, against plain forwards of a tiny model of the real class."""

from __future__ import annotations

import pytest
import torch
from text_models import (
    CAPTIONS,
    CLOSE,
    CODES,
    CONNECTOR,
    IMAGE_TOKENS,
    QWEN,
    TOKENIZER,
    blip3o,
    conversation,
    gemma,
    image_ids,
    plain_connector,
    plain_states,
)
from tiny import tiny_sana

from emf.conditioning.blip3o import LONGEST
from emf.conditioning.encoder import mean_pool
from emf.conditioning.small import Connector
from emf.conditioning.text import TextEncoder
from emf.flow import FlowConfig, meanflow_loss
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 2])
def test_blip3o_equals_a_plain_forward_of_each_caption(scale: int) -> None:
    codes, ids = image_ids()
    encoder = blip3o(scale=scale)
    states, mask = encoder(*encoder.tokenize(CAPTIONS, ids))
    assert mask is None and states.shape == (len(CAPTIONS), 1 + IMAGE_TOKENS, encoder.channels)
    released = CONNECTOR.state_dict()
    for row, caption, code in zip(states, CAPTIONS, codes, strict=True):
        plain = plain_states(conversation(caption, code, scale - 1))
        # the last three are <im_end>, <|im_end|> and newline
        torch.testing.assert_close(row, plain_connector(released, plain[-IMAGE_TOKENS - 4 : -3]), **CLOSE)


def test_another_scale_of_an_encoder_that_is_there() -> None:
    encoder, made = blip3o(), blip3o(scale=3, image_tokens=None)
    encoder.pool(3)
    assert (encoder.scale, encoder.image_tokens, encoder.head) == (3, 81, made.head) and made.image_tokens == 81
    assert torch.equal(encoder.tokenize(CAPTIONS)[0], made.tokenize(CAPTIONS)[0])
    with pytest.raises(ValueError, match="scale 4; expected 1 to 3"):
        encoder.pool(4)


@torch.no_grad()
def test_released_window_is_the_end_of_the_row() -> None:
    codes, ids = image_ids()
    with pytest.warns(UserWarning, match="shifts the states by 3 tokens"):
        encoder = blip3o(window="released")
    states, _ = encoder.states(*encoder.tokenize(CAPTIONS, ids))
    for row, caption, code in zip(states, CAPTIONS, codes, strict=True):
        plain = plain_states(conversation(caption, code))
        torch.testing.assert_close(row, plain[-IMAGE_TOKENS - 1 :], **CLOSE)


@torch.no_grad()
def test_released_padding_is_attended_to() -> None:
    _, image = image_ids()
    encoder = blip3o(released_padding=True)
    ids, mask = encoder.tokenize(CAPTIONS, image)
    states, _ = encoder.states(ids, mask)
    plain = QWEN(ids, output_hidden_states=True).hidden_states[-1][:, -IMAGE_TOKENS - 4 : -3]
    torch.testing.assert_close(states, plain, **CLOSE)
    other, _ = blip3o().states(ids, mask)
    assert not torch.allclose(states[0], other[0], atol=1e-3)
    torch.testing.assert_close(states[1], other[1], **CLOSE)  # the longest has no padding


@torch.no_grad()
def test_template_of_the_tokenizer_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}>{% endif %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    said = "[system] You are a helpful assistant.[user] Please generate image based on the following caption: a cat>"
    ids, mask = blip3o().tokenize(["a cat"])
    assert TOKENIZER.decode(ids[0]) == said + "<im_start><S0>"
    assert mask.all()


@torch.no_grad()
def test_drop_zeroes_the_states_before_the_connector() -> None:
    encoder = blip3o()
    ids, mask = encoder.tokenize(CAPTIONS, image_ids()[1])
    kept, _ = encoder(ids, mask)
    dropped, _ = encoder(ids, mask, torch.tensor([False, True, False]))
    null = plain_connector(CONNECTOR.state_dict(), torch.zeros(1 + IMAGE_TOKENS, 32))
    torch.testing.assert_close(dropped[1], null, **CLOSE)
    assert null.abs().max() > 0.1
    torch.testing.assert_close(dropped[[0, 2]], kept[[0, 2]], rtol=0, atol=0)


@torch.no_grad()
def test_bfloat16_as_close_as_transformers_own() -> None:
    codes, image = image_ids()
    encoder = blip3o()
    ids, mask = encoder.tokenize(CAPTIONS, image)
    exact, _ = encoder(ids, mask)
    connector, frequencies = encoder.connector, QWEN.model.rotary_emb.inv_freq.clone()
    try:
        encoder.bfloat16()
        states, _ = encoder(ids, mask)
        # a float32 connector after a bfloat16 language model
        encoder.connector = Connector(32, 20)
        mixed, _ = encoder(ids, mask)
        plain = torch.stack(
            [plain_states(conversation(*row))[-IMAGE_TOKENS - 4 : -3] for row in zip(CAPTIONS, codes, strict=True)]
        )
        error = (connector(plain).float() - exact).norm()
        assert torch.equal(QWEN.model.rotary_emb.inv_freq, frequencies)  # positions in float32
    finally:
        encoder.float(), connector.float()
    assert states.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    assert 0 < (states.float() - exact).norm() < 2 * error


def test_rows_without_an_image_are_refused() -> None:
    encoder = blip3o()
    with pytest.raises(ValueError, match=r"do not end in <im_start>, <S0>, 6 image tokens and 3 more"):
        encoder(*encoder.tokenize(CAPTIONS))
    with pytest.raises(ValueError, match=r"image_ids is \(1, 6\); expected \(3, 6\)"):
        encoder.tokenize(CAPTIONS, image_ids()[1][:1])
    with pytest.raises(ValueError, match=r"codes lie in \[0, 40\]; expected \[0, 40\)"):
        encoder.from_codes(torch.tensor([[0, CODES]]))
    codes, ids = image_ids()
    assert torch.equal(encoder.from_codes(codes), ids)


def test_freezing() -> None:
    frozen = blip3o().train()
    ids, mask = frozen.tokenize(CAPTIONS, image_ids()[1])
    frozen(ids, mask)[0].square().mean().backward()
    assert not QWEN.training and all(p.grad is None for p in QWEN.parameters())
    assert frozen.connector.linear_1.weight.grad.abs().max() > 0
    QWEN.requires_grad_(True)
    tuned = blip3o(freeze=False).train()
    tuned(ids, mask)[0].sin().mean().backward()
    assert QWEN.training and QWEN.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    QWEN.eval()


def test_ar_loss_is_transformers_own() -> None:
    codes, ids = image_ids()
    encoder = blip3o(freeze=False)
    QWEN.requires_grad_(True)
    rows = encoder.tokenize(CAPTIONS, ids)
    loss = encoder.ar_loss(*rows)
    for value, caption, code in zip(loss, CAPTIONS, codes, strict=True):
        plain = TOKENIZER(conversation(caption, code), return_tensors="pt")["input_ids"]
        torch.testing.assert_close(value, QWEN(plain, labels=plain).loss, **CLOSE)
    weight = QWEN.model.layers[0].mlp.up_proj.weight
    (whole,) = torch.autograd.grad(loss.mean(), weight)
    hidden = encoder.hidden(*rows)
    states = encoder.select(hidden, rows[0])
    (shared,) = torch.autograd.grad(encoder.ar_loss(*rows, hidden=hidden).mean() + 0 * states.sum(), weight)
    assert whole.abs().max() > 0
    torch.testing.assert_close(shared, whole, **CLOSE)


@torch.no_grad()
def test_text_states_of_blip3o() -> None:
    encoder = blip3o()
    bare = torch.stack([plain_states(c).mean(0) for c in CAPTIONS])
    torch.testing.assert_close(mean_pool(*encoder.text_states(CAPTIONS, template=False)), bare, **CLOSE)
    chat = torch.stack([plain_states(encoder.prompt(c)).mean(0) for c in CAPTIONS])
    torch.testing.assert_close(mean_pool(*encoder.text_states(CAPTIONS)), chat, **CLOSE)
    codes, ids = image_ids()
    rows = [plain_states(conversation(*r)) for r in zip(CAPTIONS, codes, strict=True)]
    image = torch.stack([r[-IMAGE_TOKENS - 4 : -3].mean(0) for r in rows])
    torch.testing.assert_close(mean_pool(*encoder.states(*encoder.tokenize(CAPTIONS, ids))), image, **CLOSE)


@pytest.mark.parametrize("which", ["blip3o", "gemma"])
def test_the_trainers_loss_takes_any_encoder(which: str) -> None:
    torch.manual_seed(0)
    encoder = blip3o() if which == "blip3o" else TextEncoder(*gemma(), 40, instruction="Draw: ")
    config = tiny_sana(caption_channels=encoder.channels)
    network = TextToImage(encoder, Transformer(config))
    ids, mask = encoder.tokenize(CAPTIONS, image_ids()[1])
    x, e = torch.randn(2, 3, 3, 4, 4).unbind()
    t, r = torch.tensor([0.9, 0.5, 0.4]), torch.tensor([0.1, 0.5, 0.4])
    drop = torch.tensor([False, True, False])

    def velocity(z, t, r):
        return network(z, t, r, network.read(ids, mask), drop)

    loss, _ = meanflow_loss(velocity, velocity, x, e, (t, r, 1), FlowConfig())
    loss.mean().backward()
    weight = network.transformer.caption_projection.linear_1.weight
    assert torch.isfinite(loss).all() and weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_long_caption_is_cut_to_what_the_released_code_takes() -> None:
    """The rows of a batch are as long as its longest, and the end of the prompt is kept."""
    encoder = blip3o()
    with pytest.warns(UserWarning, match=r"a caption of \d+ tokens, .* was cut to 2048; 1 captions so far"):
        ids, mask = encoder.tokenize(["a cat", "word " * 4000])
    assert ids.shape == (2, LONGEST + len(encoder.head)) and mask[1].all()
    said = TOKENIZER.decode(ids[1])
    assert said.endswith("<|im_end|>\n<|im_start|>assistant\n<im_start><S0>") and said.count("word ") > 300
    alone, _ = encoder.tokenize(["a cat"])
    assert torch.equal(ids[0][mask[0]], alone[0])


@torch.no_grad()
def test_long_captions_are_counted_wherever_they_are_read(recwarn: pytest.WarningsRecorder) -> None:
    """Each once, and told when their number has doubled; in the analyses' states too, in the chat or alone."""
    encoder = blip3o()
    for n in (1, 1, 2, 3, 4):
        encoder.tokenize([f"word {n} " * 700])
    told = [str(w.message).rpartition("; ")[2] for w in recwarn]
    assert told == [f"{n} captions so far" for n in (1, 2, 4)]
    for template in (True, False):
        states, mask = encoder.text_states(["a cat", "word " * 4000], template)
        assert states.shape[1] == mask.shape[1] == LONGEST
