"""Pretrained text encoders, as tiny random models of the real classes, against plain forwards of them."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, ta_tok_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from emf.conditioning.blip3o import Blip3oNext, SpecialTokens
from emf.conditioning.encoder import mean_pool
from emf.conditioning.load import load
from emf.conditioning.sampling import Sampling, distribution, pick
from emf.conditioning.small import Connector
from emf.conditioning.ta_tok import load_ta_tok
from emf.conditioning.text import TextEncoder, sana_instruction
from emf.flow import FlowConfig, meanflow_loss
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer, TransformerConfig

IMAGE_TOKENS = 6
CODES = 40
CAPTIONS = ["a red cat", "Two blue dogs under an umbrella ", "x"]
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def qwen_tokenizer():
    own = ["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>", *(f"<I{i}>" for i in range(CODES))]
    return byte_tokenizer(["<pad>", "<|im_start|>", "<|im_end|>", *own], pad_token="<pad>", eos_token="<|im_end|>")


def special_tokens(tokenizer):
    names = ("<im_start>", "<im_end>", "<S0>", "<I0>")
    return SpecialTokens(*(tokenizer.convert_tokens_to_ids(n) for n in names), CODES, 3)


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(qwen_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        pad_token_id=qwen_tokenizer.pad_token_id,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):  # tokens that differ, in and out
        nn.init.normal_(weight, std=0.3)
    with torch.no_grad():  # a final norm whose absence shows
        model.model.norm.weight.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def connector():
    torch.manual_seed(1)
    return Connector(32, 20)


@pytest.fixture
def blip3o(qwen, qwen_tokenizer, connector):
    def make(**settings):
        settings = {"image_tokens": IMAGE_TOKENS, **settings}
        return Blip3oNext(qwen, qwen_tokenizer, special_tokens(qwen_tokenizer), connector, **settings)

    yield make
    qwen.requires_grad_(True)
    qwen.zero_grad()


def image_ids(tokenizer):
    codes = torch.randint(CODES, (len(CAPTIONS), IMAGE_TOKENS), generator=torch.Generator().manual_seed(2))
    return codes, tokenizer.convert_tokens_to_ids("<I0>") + codes


def conversation(caption: str, codes: Tensor, scale: int = 0) -> str:
    """A training row as text, by hand."""
    request = f"Please generate image based on the following caption: {caption}"
    said = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n"
    image = "".join(f"<I{c}>" for c in codes.tolist())
    return f"{said}<|im_start|>assistant\n<im_start><S{scale}>{image}<im_end><|im_end|>\n"


def plain_states(model, tokenizer, text: str) -> Tensor:
    """transformers, one text, no padding: [L, hidden] after the final norm."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return model(ids, output_hidden_states=True).hidden_states[-1][0]


def plain_connector(s: dict[str, Tensor], x: Tensor) -> Tensor:
    """Linear, GELU(tanh), Linear, RMSNorm."""
    h = F.gelu(F.linear(x, s["linear_1.weight"], s["linear_1.bias"]), approximate="tanh")
    h = F.linear(h, s["linear_2.weight"], s["linear_2.bias"])
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * s["norm.weight"]


# -- BLIP3o-NEXT ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 2])
def test_blip3o_equals_a_plain_forward_of_each_caption(blip3o, qwen, qwen_tokenizer, connector, scale):
    codes, ids = image_ids(qwen_tokenizer)
    encoder = blip3o(scale=scale)
    states, mask = encoder(*encoder.tokenize(CAPTIONS, ids))
    assert mask is None and states.shape == (len(CAPTIONS), 1 + IMAGE_TOKENS, encoder.channels)
    released = connector.state_dict()
    for row, caption, code in zip(states, CAPTIONS, codes, strict=True):
        plain = plain_states(qwen, qwen_tokenizer, conversation(caption, code, scale - 1))
        # the last three are <im_end>, <|im_end|> and newline
        torch.testing.assert_close(row, plain_connector(released, plain[-IMAGE_TOKENS - 4 : -3]), **CLOSE)


@torch.no_grad()
def test_released_window_is_the_end_of_the_row(blip3o, qwen, qwen_tokenizer):
    codes, ids = image_ids(qwen_tokenizer)
    with pytest.warns(UserWarning, match="shifts the states by 3 tokens"):
        encoder = blip3o(window="released")
    states, _ = encoder.states(*encoder.tokenize(CAPTIONS, ids))
    for row, caption, code in zip(states, CAPTIONS, codes, strict=True):
        plain = plain_states(qwen, qwen_tokenizer, conversation(caption, code))
        torch.testing.assert_close(row, plain[-IMAGE_TOKENS - 1 :], **CLOSE)


@torch.no_grad()
def test_released_padding_is_attended_to(blip3o, qwen, qwen_tokenizer):
    _, image = image_ids(qwen_tokenizer)
    encoder = blip3o(released_padding=True)
    ids, mask = encoder.tokenize(CAPTIONS, image)
    states, _ = encoder.states(ids, mask)
    plain = qwen(ids, output_hidden_states=True).hidden_states[-1][:, -IMAGE_TOKENS - 4 : -3]
    torch.testing.assert_close(states, plain, **CLOSE)
    other, _ = blip3o().states(ids, mask)
    assert not torch.allclose(states[0], other[0], atol=1e-3)
    torch.testing.assert_close(states[1], other[1], **CLOSE)  # the longest has no padding


@torch.no_grad()
def test_template_of_the_tokenizer_is_used(blip3o, qwen_tokenizer, monkeypatch):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}>{% endif %}"
    monkeypatch.setattr(qwen_tokenizer, "chat_template", template)
    said = "[system] You are a helpful assistant.[user] Please generate image based on the following caption: a cat>"
    ids, mask = blip3o().tokenize(["a cat"])
    assert qwen_tokenizer.decode(ids[0]) == said + "<im_start><S0>"
    assert mask.all()


@torch.no_grad()
def test_drop_zeroes_the_states_before_the_connector(blip3o, qwen_tokenizer, connector):
    encoder = blip3o()
    ids, mask = encoder.tokenize(CAPTIONS, image_ids(qwen_tokenizer)[1])
    kept, _ = encoder(ids, mask)
    dropped, _ = encoder(ids, mask, torch.tensor([False, True, False]))
    null = plain_connector(connector.state_dict(), torch.zeros(1 + IMAGE_TOKENS, 32))
    torch.testing.assert_close(dropped[1], null, **CLOSE)
    assert null.abs().max() > 0.1
    torch.testing.assert_close(dropped[[0, 2]], kept[[0, 2]], rtol=0, atol=0)


@torch.no_grad()
def test_bfloat16_as_close_as_transformers_own(qwen, qwen_tokenizer, blip3o):
    codes, image = image_ids(qwen_tokenizer)
    encoder = blip3o()
    ids, mask = encoder.tokenize(CAPTIONS, image)
    exact, _ = encoder(ids, mask)
    connector, frequencies = encoder.connector, qwen.model.rotary_emb.inv_freq.clone()
    try:
        encoder.bfloat16()
        states, _ = encoder(ids, mask)
        # a float32 connector after a bfloat16 language model
        encoder.connector = Connector(32, 20)
        mixed, _ = encoder(ids, mask)
        plain = torch.stack(
            [
                plain_states(qwen, qwen_tokenizer, conversation(*row))[-IMAGE_TOKENS - 4 : -3]
                for row in zip(CAPTIONS, codes, strict=True)
            ]
        )
        error = (connector(plain).float() - exact).norm()
        assert torch.equal(qwen.model.rotary_emb.inv_freq, frequencies)  # positions in float32
    finally:
        encoder.float(), connector.float()
    assert states.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    assert 0 < (states.float() - exact).norm() < 2 * error


def test_rows_without_an_image_are_refused(blip3o, qwen_tokenizer):
    encoder = blip3o()
    with pytest.raises(ValueError, match=r"do not end in <im_start>, <S0>, 6 image tokens and 3 more"):
        encoder(*encoder.tokenize(CAPTIONS))
    with pytest.raises(ValueError, match=r"image_ids is \(1, 6\); expected \(3, 6\)"):
        encoder.tokenize(CAPTIONS, image_ids(qwen_tokenizer)[1][:1])
    with pytest.raises(ValueError, match=r"codes lie in \[0, 40\]; expected \[0, 40\)"):
        encoder.from_codes(torch.tensor([[0, CODES]]))
    codes, ids = image_ids(qwen_tokenizer)
    assert torch.equal(encoder.from_codes(codes), ids)


def test_freezing(blip3o, qwen, qwen_tokenizer):
    frozen = blip3o().train()
    ids, mask = frozen.tokenize(CAPTIONS, image_ids(qwen_tokenizer)[1])
    frozen(ids, mask)[0].square().mean().backward()
    assert not qwen.training and all(p.grad is None for p in qwen.parameters())
    assert frozen.connector.linear_1.weight.grad.abs().max() > 0
    qwen.requires_grad_(True)
    tuned = blip3o(freeze=False).train()
    tuned(ids, mask)[0].sin().mean().backward()
    assert qwen.training and qwen.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    qwen.eval()


def test_ar_loss_is_transformers_own(blip3o, qwen, qwen_tokenizer):
    codes, ids = image_ids(qwen_tokenizer)
    encoder = blip3o(freeze=False)
    qwen.requires_grad_(True)
    rows = encoder.tokenize(CAPTIONS, ids)
    loss = encoder.ar_loss(*rows)
    for value, caption, code in zip(loss, CAPTIONS, codes, strict=True):
        plain = qwen_tokenizer(conversation(caption, code), return_tensors="pt")["input_ids"]
        torch.testing.assert_close(value, qwen(plain, labels=plain).loss, **CLOSE)
    weight = qwen.model.layers[0].mlp.up_proj.weight
    (whole,) = torch.autograd.grad(loss.mean(), weight)
    hidden = encoder.hidden(*rows)
    states = encoder.select(hidden, rows[0])
    (shared,) = torch.autograd.grad(encoder.ar_loss(*rows, hidden=hidden).mean() + 0 * states.sum(), weight)
    assert whole.abs().max() > 0
    torch.testing.assert_close(shared, whole, **CLOSE)


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k, top_p, temperature", [(7, 0.8, 1.0), (50, 0.5, 0.7), (3, 1.0, 1.0), (50, 1e-6, 1.0)])
def test_distribution_is_transformers_own(top_k, top_p, temperature):
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits / temperature))
    p, ids = distribution(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(torch.zeros(5, 50).scatter(1, ids, p), scores.softmax(-1))


def test_draws_have_the_distribution():
    logits, n = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)), 20000
    sampling = Sampling(top_k=10, top_p=0.9)
    p, ids = distribution(logits, sampling)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1))
    counts = pick(logits.expand(n, -1), uniform, sampling).bincount(minlength=20) / n
    torch.testing.assert_close(counts, torch.zeros(1, 20).scatter(1, ids, p)[0], atol=0.015, rtol=0)
    assert pick(logits, torch.tensor([1 - 2**-24]), sampling) == ids[0, (p > 0).sum() - 1]


def test_greedy_generation_is_transformers_own(blip3o, qwen, qwen_tokenizer):
    encoder = blip3o(image_tokens=20)
    drawn = encoder.generate(CAPTIONS, torch.Generator(), Sampling(top_k=1))
    ids, mask = encoder.tokenize(CAPTIONS)
    plain = qwen.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=20)
    assert torch.equal(drawn, plain[:, ids.shape[1] :])


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_generation_depends_on_its_own_generator_only(blip3o, qwen_tokenizer):
    encoder = blip3o(image_tokens=20)
    together = encoder.generate(CAPTIONS, seeds(3, 4, 5))
    assert together.shape == (3, 20)
    assert torch.equal(encoder.generate(CAPTIONS[1:2], seeds(4))[0], together[1])
    assert not torch.equal(encoder.generate(CAPTIONS[1:2], seeds(6))[0], together[1])
    with pytest.raises(ValueError, match="2 generators for 3 captions"):
        encoder.generate(CAPTIONS, seeds(0, 1))


@torch.no_grad()
def test_teacher_forcing_repeats_the_generation(blip3o, qwen):
    encoder, seen = blip3o(image_tokens=20), []
    hook = qwen.model.norm.register_forward_hook(lambda module, x, y: seen.append(y[:, -1]))
    ids = encoder.generate(CAPTIONS, seeds(3, 4, 5))
    hook.remove()
    states, _ = encoder.states(*encoder.tokenize(CAPTIONS, ids))
    # the last token is drawn, but not yet read
    torch.testing.assert_close(states[:, :-1], torch.stack(seen, 1), **CLOSE)


# -- other text encoders ----------------------------------------------------------------------------------------------


def gemma():
    tokenizer = byte_tokenizer(["<pad>", "<bos>"], "<bos> $A", pad_token="<pad>", bos_token="<bos>")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return Gemma2Model(config).eval(), tokenizer


def clip():
    tokenizer = byte_tokenizer(["<s>", "</s>"], "<s> $A </s>", pad_token="</s>", bos_token="<s>", eos_token="</s>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval(), tokenizer


def t5():
    tokenizer = byte_tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config).eval(), tokenizer


@pytest.fixture(params=[gemma, clip, t5], ids=lambda f: f.__name__)
def text_model(request):
    torch.manual_seed(0)
    return request.param()


@torch.no_grad()
def test_gemma_is_sana_pipelines_own():
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


@torch.no_grad()
def test_text_states_are_those_of_each_caption_alone(text_model):
    model, tokenizer = text_model
    encoder = TextEncoder(model, tokenizer, 77)
    states, mask = encoder(*encoder.tokenize(CAPTIONS))
    assert states.shape == (3, 77, encoder.channels) and mask.shape == (3, 77)
    for row, keep, caption in zip(states, mask, CAPTIONS, strict=True):
        plain = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[keep], plain, **CLOSE)


def test_rows_longer_than_the_model_are_refused():
    with pytest.raises(ValueError, match="90 tokens with the instruction; the model has 77 positions"):
        TextEncoder(*clip(), 77, instruction="Read: " * 2 + ".")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["empty", "zeros"])
def test_null_of_text_encoders(text_model, kind):
    model, tokenizer = text_model
    encoder = TextEncoder(model, tokenizer, 77, null=kind)
    states, mask = encoder(*encoder.tokenize(CAPTIONS), torch.tensor([False, True, False]))
    if kind == "zeros":
        assert mask[1].all() and not states[1].any() and states[0].any()
    else:
        plain = model(**tokenizer("", return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states[1][mask[1]], plain, **CLOSE)


@torch.no_grad()
def test_the_mean_is_over_the_captions_tokens(text_model):
    model, tokenizer = text_model
    plain = torch.stack([model(**tokenizer(c, return_tensors="pt")).last_hidden_state[0].mean(0) for c in CAPTIONS])
    alone = TextEncoder(model, tokenizer, 77)
    torch.testing.assert_close(mean_pool(*alone.text_states(CAPTIONS)), plain, **CLOSE)
    instructed = TextEncoder(model, tokenizer, 60, instruction="Describe: ")
    torch.testing.assert_close(mean_pool(*instructed.text_states(CAPTIONS, template=False)), plain, **CLOSE)
    assert not torch.allclose(mean_pool(*instructed.text_states(CAPTIONS)), plain, atol=1e-3)


@torch.no_grad()
def test_text_states_of_blip3o(blip3o, qwen, qwen_tokenizer):
    encoder = blip3o()
    bare = torch.stack([plain_states(qwen, qwen_tokenizer, c).mean(0) for c in CAPTIONS])
    torch.testing.assert_close(mean_pool(*encoder.text_states(CAPTIONS, template=False)), bare, **CLOSE)
    chat = torch.stack([plain_states(qwen, qwen_tokenizer, encoder.prompt(c)).mean(0) for c in CAPTIONS])
    torch.testing.assert_close(mean_pool(*encoder.text_states(CAPTIONS)), chat, **CLOSE)
    codes, ids = image_ids(qwen_tokenizer)
    rows = [plain_states(qwen, qwen_tokenizer, conversation(*r)) for r in zip(CAPTIONS, codes, strict=True)]
    image = torch.stack([r[-IMAGE_TOKENS - 4 : -3].mean(0) for r in rows])
    torch.testing.assert_close(mean_pool(*encoder.states(*encoder.tokenize(CAPTIONS, ids))), image, **CLOSE)


@pytest.mark.parametrize("which", ["blip3o", "gemma"])
def test_the_trainers_loss_takes_any_encoder(which, blip3o, qwen_tokenizer):
    torch.manual_seed(0)
    encoder = blip3o() if which == "blip3o" else TextEncoder(*gemma(), 40, instruction="Draw: ")
    config = TransformerConfig(
        in_channels=3,
        out_channels=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        caption_channels=encoder.channels,
        sample_size=4,
        dual_time=True,
    )
    network = TextToImage(encoder, Transformer(config))
    ids, mask = encoder.tokenize(CAPTIONS, image_ids(qwen_tokenizer)[1])
    x, e = torch.randn(2, 3, 3, 4, 4).unbind()
    t, r = torch.tensor([0.9, 0.5, 0.4]), torch.tensor([0.1, 0.5, 0.4])
    drop = torch.tensor([False, True, False])

    def velocity(z, t, r):
        return network(z, t, r, ids, mask, drop)

    loss, _ = meanflow_loss(velocity, velocity, x, e, (t, r, 1), FlowConfig())
    loss.mean().backward()
    weight = network.transformer.caption_projection.linear_1.weight
    assert torch.isfinite(loss).all() and weight.grad.abs().max() > 0


# -- TA-Tok -----------------------------------------------------------------------------------------------------------


class EasyDict(dict):
    """As the published file's arguments: a dict subclass whose module is not installed."""

    __module__ = "easydict"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for k, v in self.items():
            self[k] = EasyDict(v) if type(v) is dict else v
            setattr(self, k, self[k])


class Opaque:
    """Something in a file that is no weight."""


def plain_codes(s: dict[str, Tensor], images: Tensor, normalized: bool, pool: int) -> Tensor:
    """TA-Tok's encoder in plain torch, from the file's weights, in float64."""
    s = {k: v.double() for k, v in s.items()}

    def linear(name, x):
        return F.linear(x, s[name + ".weight"], s[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6)

    e = "encoder.embeddings."
    x = F.conv2d(images.double(), s[e + "patch_embedding.weight"], s[e + "patch_embedding.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2) + s[e + "position_embedding.weight"]
    for i in range(2):  # of 3: the last layer's output is not used
        layer = f"encoder.encoder.layers.{i}."
        h = norm(layer + "layer_norm1", x)
        q, k, v = (linear(f"{layer}self_attn.{n}_proj", h).unflatten(-1, (2, 16)).transpose(1, 2) for n in "qkv")
        h = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(layer + "self_attn.out_proj", h)
        h = F.gelu(linear(layer + "mlp.fc1", norm(layer + "layer_norm2", x)), approximate="tanh")
        x = x + linear(layer + "mlp.fc2", h)
    side = 6 // pool
    x = x.reshape(-1, side, pool, side, pool, 32).mean((2, 4)).flatten(1, 2)
    z = linear("bottleneck.in_linear", linear("encode_task_layer.0", x).tanh())
    table = linear("bottleneck.regularizer.embedding_proj", s["bottleneck.regularizer.embedding.weight"])
    if normalized:
        z, table = z / z.norm(dim=-1, keepdim=True), table / table.norm(dim=-1, keepdim=True)
        return (z @ table.T).argmax(-1)
    return (z[:, :, None] - table).norm(dim=-1).argmin(-1)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_ta_tok_against_plain_torch(tmp_path, normalized, pool):
    state = ta_tok_file(tmp_path / "ta_tok.pth", normalized=normalized, pool=pool)
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = load_ta_tok(tmp_path / "ta_tok.pth", heads=2)(images)
    assert codes.shape == (4, (6 // pool) ** 2) and len(codes.unique()) > 3
    assert torch.equal(codes, plain_codes(state, images, normalized, pool))
    if pool == 1:
        assert load_ta_tok(tmp_path / "ta_tok.pth", heads=2, scale=3)(images).shape == (4, 4)


@pytest.mark.parametrize("prefix", ["encoder.", "encoder.vision_model."])
def test_ta_tok_resizes(tmp_path, prefix):
    ta_tok_file(tmp_path / "ta_tok.pth", prefix=prefix)
    model = load_ta_tok(tmp_path / "ta_tok.pth", heads=2)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    doubled = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (model(doubled) == model(images)).float().mean() > 0.2  # smoothed, yet alike
    with pytest.raises(ValueError, match=r"images is \(3, 24, 24\); expected \[B, 3, H, W\]"):
        model(images[0])


def test_ta_tok_reads_a_saved_easydict_without_running_code(tmp_path, monkeypatch, recwarn):
    module = types.ModuleType("easydict")
    module.EasyDict = EasyDict
    EasyDict.__qualname__ = "EasyDict"
    monkeypatch.setitem(sys.modules, "easydict", module)
    state = ta_tok_file(tmp_path / "ta_tok.pth", kind=EasyDict, pool=2)
    monkeypatch.delitem(sys.modules, "easydict")
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    codes = load_ta_tok(tmp_path / "ta_tok.pth", heads=2)(images)
    assert torch.equal(codes, plain_codes(state, images, True, 2))
    assert not [w for w in recwarn if "runs code" in str(w.message)]


def test_ta_tok_warns_before_it_runs_code(tmp_path):
    ta_tok_file(tmp_path / "ta_tok.pth", extra={"note": Opaque()})
    with pytest.warns(UserWarning, match="holds more than weights; reading it runs code from it"):
        load_ta_tok(tmp_path / "ta_tok.pth", heads=2)


def test_ta_tok_errors_are_one_line(tmp_path):
    path = tmp_path / "ta_tok.pth"
    cases = {"no file": lambda: None}
    cases["not a file of torch.save"] = lambda: path.write_bytes(b"text, not a pickle")
    cases['has no ["model"]["args"]'] = lambda: torch.save({"weights": {}}, path)
    regularizer = {"bottleneck": {"args": {"regularizer": {"args": {}}}}}
    cases["holds no TA-Tok weights"] = lambda: torch.save({"model": {"args": regularizer, "sd": {}}}, path)
    for message, write in cases.items():
        write()
        with pytest.raises(ValueError) as raised:
            load_ta_tok(path)
        assert message in str(raised.value) and "\n" not in str(raised.value)
    state = ta_tok_file(path)
    del state["encode_task_layer.0.bias"]
    torch.save({"model": {"args": regularizer | {"input_size": 24}, "sd": state}}, path)
    with pytest.raises(ValueError, match=r"of another model; encode_task_layer.0.bias is missing"):
        load_ta_tok(path, heads=2)


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, qwen, qwen_tokenizer, connector):
    """A folder as emf convert writes it."""
    folder = tmp_path / "blip3o"
    language = folder / "language_model"
    qwen.save_pretrained(language)
    qwen_tokenizer.save_pretrained(language)
    save_file(connector.state_dict(), folder / "connector.safetensors")
    config = json.loads((language / "config.json").read_text()) | vars(special_tokens(qwen_tokenizer))
    (language / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_load_blip3o(checkpoint, blip3o, qwen_tokenizer):
    encoder, expected = load("blip3o", checkpoint, image_tokens=IMAGE_TOKENS), blip3o()
    rows = encoder.tokenize(CAPTIONS, image_ids(qwen_tokenizer)[1])
    for own, other in zip(rows, expected.tokenize(CAPTIONS, image_ids(qwen_tokenizer)[1]), strict=True):
        assert torch.equal(own, other)
    torch.testing.assert_close(encoder(*rows)[0], expected(*rows)[0], rtol=0, atol=0)
    assert encoder.tokens == expected.tokens
    assert load("blip3o", checkpoint, dtype=torch.bfloat16).image_tokens == 729


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_load_text_encoders(text_model, tmp_path, nested, request):
    model, tokenizer = text_model
    kind = {"Gemma2Model": "gemma", "CLIPTextModel": "clip", "T5EncoderModel": "t5"}[type(model).__name__]
    model.save_pretrained(tmp_path / "text_encoder" if nested else tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer" if nested else tmp_path)
    encoder = load(kind, tmp_path)
    assert encoder.length == {"gemma": 300, "clip": 77, "t5": 300}[kind]
    assert encoder.instruction == (sana_instruction() if kind == "gemma" else "")
    plain = TextEncoder(model, tokenizer, 20)
    own = load(kind, tmp_path, length=20, instruction="", lower=False)
    torch.testing.assert_close(own(*own.tokenize(CAPTIONS)), plain(*plain.tokenize(CAPTIONS)), rtol=0, atol=0)


def test_load_errors_are_one_line(checkpoint, tmp_path):
    language, connector = checkpoint / "language_model", checkpoint / "connector.safetensors"
    weights, config = language / "model.safetensors", language / "config.json"
    whole, fields = weights.read_bytes(), json.loads(config.read_text())

    def check(message, *arguments):
        with pytest.raises(ValueError, match=message) as raised:
            load(*arguments)
        assert "\n" not in str(raised.value)

    check("encoder 'bert'; expected one of blip3o, gemma, clip, t5", "bert", checkpoint)
    check("no folder .*; expected that of a t5 encoder", "t5", tmp_path / "nowhere")
    check("has no language_model and connector.safetensors; .*`emf convert`", "blip3o", language)
    save_file({k: v for k, v in load_file(weights).items() if "1.mlp.up_proj" not in k}, weights, {"format": "pt"})
    check(r"model\.layers\.1\.mlp\.up_proj\.weight", "blip3o", checkpoint)
    weights.write_bytes(whole)
    kept = connector.read_bytes()
    save_file({k: v for k, v in load_file(connector).items() if k != "linear_2.bias"}, connector)
    check("is no connector of BLIP3o-NEXT", "blip3o", checkpoint)
    connector.write_bytes(kept[:40])
    check("is no connector of BLIP3o-NEXT", "blip3o", checkpoint)
    connector.write_bytes(kept)
    config.write_text(json.dumps({k: v for k, v in fields.items() if k != "image_start_tag_id"}))
    check("has no usable image_start_tag_id", "blip3o", checkpoint)
    config.write_text("{")
    check("config.json is JSON that ends too early", "blip3o", checkpoint)
    config.write_text(json.dumps(fields))
    weights.write_bytes(whole[: len(whole) // 2])
    check("is no Qwen3ForCausalLM", "blip3o", checkpoint)
    weights.unlink()
    check("holds no .*safetensors", "blip3o", checkpoint)
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (language / name).unlink()
    check("holds no usable tokenizer", "blip3o", checkpoint)


def test_special_tokens_of_a_config():
    fields = dict(image_start_tag_id=10, image_end_tag_id=11, scale_start_token_id=12, image_start_token_id=15)
    assert SpecialTokens.from_config(fields | {"hidden_size": 8}) == SpecialTokens(10, 11, 12, 15)
    counted = SpecialTokens.from_config(fields | {"scale_end_token_id": 13, "image_end_token_id": 24})
    assert (counted.num_scale_tokens, counted.num_image_tokens) == (2, 10)
    with pytest.raises(ValueError, match="no usable image_start_tag_id"):
        SpecialTokens.from_config({})
