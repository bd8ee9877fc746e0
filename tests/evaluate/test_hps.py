"""HPSv2.1: open_clip's weights in transformers' CLIP, held to a forward of open_clip's own layout; styles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import clip_tokenizer
from torch import Tensor

from emf.evaluate.clip import MEAN, STD, Clip, clean
from emf.evaluate.hps import STYLES, convert, hps_pixels, load_clip, run_hps, score_hps, summarize
from emf.files import read_rows

# open_clip's CLIP, small: width, heads, layers of both towers
WIDTHS, HEADS, LAYERS, EMBED, CONTEXT, VOCAB, PATCH, SIZE = (16, 12), (2, 3), (2, 3), 8, 40, 300, 8, 24


def open_clip_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under open_clip's names and shapes."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 0.4

    v, t = WIDTHS
    state = {
        "positional_embedding": r(CONTEXT, t),
        "text_projection": r(t, EMBED),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": r(v),
        "visual.positional_embedding": r((SIZE // PATCH) ** 2 + 1, v),
        "visual.proj": r(v, EMBED),
        "visual.conv1.weight": r(v, 3, PATCH, PATCH) * 0.2,
        "token_embedding.weight": r(VOCAB, t),
    }
    norms = {"visual.ln_pre": v, "visual.ln_post": v, "ln_final": t}
    for tower, w, n in (("visual.", v, LAYERS[0]), ("", t, LAYERS[1])):
        for i in range(n):
            block = f"{tower}transformer.resblocks.{i}."
            norms |= {f"{block}ln_1": w, f"{block}ln_2": w}
            state |= {f"{block}attn.in_proj_weight": r(3 * w, w), f"{block}attn.in_proj_bias": r(3 * w)}
            for name, rows, columns in (("attn.out_proj", w, w), ("mlp.c_fc", 4 * w, w), ("mlp.c_proj", w, 4 * w)):
                state |= {f"{block}{name}.weight": r(rows, columns), f"{block}{name}.bias": r(rows)}
    for name, w in norms.items():
        state |= {f"{name}.weight": 1 + r(w), f"{name}.bias": r(w)}
    return state


def norm(x: Tensor, s: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"])


def blocks(x: Tensor, s: dict[str, Tensor], tower: str, n: int, heads: int, mask: Tensor | None) -> Tensor:
    """Pre-norm blocks as nn.MultiheadAttention, with its fused input projection, and an exact GELU."""
    for i in range(n):
        name = f"{tower}transformer.resblocks.{i}."
        h = norm(x, s, f"{name}ln_1").transpose(0, 1)
        a, _ = F.multi_head_attention_forward(
            *(h, h, h, h.shape[-1], heads),
            *(s[f"{name}attn.in_proj_weight"], s[f"{name}attn.in_proj_bias"], None, None, False, 0.0),
            *(s[f"{name}attn.out_proj.weight"], s[f"{name}attn.out_proj.bias"]),
            need_weights=False,
            attn_mask=mask,
        )
        x = x + a.transpose(0, 1)
        h = F.linear(norm(x, s, f"{name}ln_2"), s[f"{name}mlp.c_fc.weight"], s[f"{name}mlp.c_fc.bias"])
        x = x + F.linear(F.gelu(h), s[f"{name}mlp.c_proj.weight"], s[f"{name}mlp.c_proj.bias"])
    return x


def open_clip_image(s: dict[str, Tensor], pixels: Tensor) -> Tensor:
    x = F.conv2d(pixels, s["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + s["visual.positional_embedding"]
    x = blocks(norm(x, s, "visual.ln_pre"), s, "visual.", LAYERS[0], HEADS[0], None)
    return F.normalize(norm(x[:, 0], s, "visual.ln_post") @ s["visual.proj"], dim=-1)


def open_clip_text(s: dict[str, Tensor], ids: Tensor) -> Tensor:
    x = s["token_embedding.weight"][ids] + s["positional_embedding"]
    mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
    x = norm(blocks(x, s, "", LAYERS[1], HEADS[1], mask), s, "ln_final")
    return F.normalize(x[torch.arange(len(x)), ids.argmax(-1)] @ s["text_projection"], dim=-1)


TEXTS = ["a red barn", "A Fox &amp; two   dogs, anime", "x", "a very long text that is cut off " * 4]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint in open_clip's layout, tokenizer folder)."""
    root = tmp_path_factory.mktemp("hps")
    torch.save({"epoch": 1, "name": "hps", "state_dict": open_clip_state()}, root / "HPS_v2.1_compressed.pt")
    clip_tokenizer(CONTEXT).save_pretrained(root / "tokenizer")
    return root / "HPS_v2.1_compressed.pt", root / "tokenizer"


@pytest.fixture(scope="module")
def clip(weights: tuple[Path, Path]) -> Iterator[Clip]:
    yield load_clip(weights[0], str(weights[1]), heads=HEADS)


def test_images_are_encoded_as_by_open_clip(clip: Clip) -> None:
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    expected = open_clip_image(open_clip_state(), pixels)
    assert clip.size == SIZE and expected.std(0).max() > 0.05  # the images differ
    torch.testing.assert_close(clip.images(pixels), expected, atol=2e-6, rtol=1e-5)


def test_texts_are_encoded_as_by_open_clip_which_pads_with_0(clip: Clip) -> None:
    ids = torch.zeros(len(TEXTS), CONTEXT, dtype=torch.int64)
    for row, text in zip(ids, ["a red barn", "a fox & two dogs, anime", *TEXTS[2:]], strict=True):
        tokens = clip_tokenizer(CONTEXT)(text, truncation=True, max_length=CONTEXT).input_ids
        row[: len(tokens)] = torch.tensor(tokens)
    assert (ids == 299).sum() == len(TEXTS) and ids[3, -1] == 299
    expected = open_clip_text(open_clip_state(), ids)
    assert expected.std(0).max() > 0.05
    torch.testing.assert_close(clip.texts(TEXTS), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("it\u2019s \u201ca  cat\u201d\u2026", 'it\'s "a cat"\u2026'),
        ("\uff32\uff25\uff24 \uff11", "RED 1"),  # full-width letters
        ("caf\u00c3\u00a9", "caf\u00e9"),  # UTF-8 that was read as Latin-1
        ("a &amp;amp; b &lt;3", "a & b <3"),
        ("a <|endoftext|> b<|STARTOFTEXT|>.", "a <| endoftext |> b<| STARTOFTEXT |>."),
        (" a\n\tb ", "a b"),
    ],
)
def test_texts_are_cleaned_as_by_open_clip(text: str, plain: str) -> None:
    assert clean(text) == plain


def test_a_special_tokens_name_in_a_prompt_is_text() -> None:
    """OpenAI's tokenizer of the real class: the text goes on behind it, and in three words, as in open_clip's."""
    from transformers import CLIPTokenizer

    pieces = ["<|", "endoftext", "|>"]
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz<|>"})
    vocab = {letter: i for i, letter in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocab |= {name: len(vocab) + i for i, name in enumerate(["<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    (ids,) = tokenizer([clean("a <|endoftext|> b")]).input_ids
    assert ids.index(vocab["<|endoftext|>"]) == len(ids) - 1
    assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [
        "a</w>",
        *(token for piece in pieces for token in (*piece[:-1], f"{piece[-1]}</w>")),
        "b</w>",
    ]


def test_every_weight_arrives_under_its_name() -> None:
    from transformers import CLIPModel

    from emf.evaluate.hps import config_of

    state = convert({f"module.{k}": v for k, v in open_clip_state().items()} | {"attn_mask": torch.zeros(1)})
    model = CLIPModel(config_of(state, HEADS))
    own = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    assert own == {k: v.shape for k, v in state.items()}
    assert model.config.text_config.hidden_act == model.config.vision_config.hidden_act == "gelu"


def test_the_released_checkpoints_shapes_are_vit_h_14() -> None:
    from emf.evaluate.hps import config_of

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    state = {
        "visual.positional_embedding": empty(257, 1280),
        "visual.conv1.weight": empty(1280, 3, 14, 14),
        "visual.proj": empty(1280, 1024),
        "positional_embedding": empty(77, 1024),
        "text_projection": empty(1024, 1024),
        "token_embedding.weight": empty(49408, 1024),
    }
    for tower, n, w in (("visual.", 32, 1280), ("", 24, 1024)):
        state |= {f"{tower}transformer.resblocks.{i}.mlp.c_fc.weight": empty(4 * w, w) for i in range(n)}
    config = config_of(convert(state))
    text, vision = config.text_config, config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1280, 32, 16)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (224, 14, 5120)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (1024, 24, 16)
    assert (text.max_position_embeddings, text.vocab_size, config.projection_dim) == (77, 49408, 1024)


@pytest.mark.parametrize(
    "key", ["visual.strange", "transformer.resblocks.0.attn.bias_k", "audio.resblocks.0.ln_1.bias"]
)
def test_a_strange_weight_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"the checkpoint's {key} is no weight of open_clip's CLIP"):
        convert({key: torch.zeros(1)})


def test_a_checkpoint_that_cannot_be_used_is_named(weights: tuple[Path, Path], tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "x.pt", str(weights[1])
    with pytest.raises(ValueError, match=r"x.pt does not exist; put HPS_v2.1_compressed.pt \(xswu/HPSv2\) there"):
        load_clip(file, tokenizer)
    file.write_text("no checkpoint")
    with pytest.raises(ValueError, match="x.pt cannot be read") as error:
        load_clip(file, tokenizer)
    assert "\n" not in str(error.value)
    torch.save({"state": {}}, file)
    with pytest.raises(ValueError, match=r"x.pt cannot be read \(KeyError\)"):
        load_clip(file, tokenizer)
    state = open_clip_state()
    state.pop("ln_final.bias")
    torch.save({"state_dict": state}, file)
    with pytest.raises(ValueError, match="lacks 1 weights, text_model.final_layer_norm.bias"):
        load_clip(file, tokenizer, heads=HEADS)
    with pytest.raises(ValueError, match="tokenizer: .*absent cannot be loaded .* put the tokenizer's files"):
        load_clip(weights[0], str(tmp_path / "absent"), heads=HEADS)


# Pixels


def test_pixels_are_of_the_longer_side_padded_with_black() -> None:
    black = (-torch.tensor(MEAN) / torch.tensor(STD))[:, None]
    white = ((1 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None]
    wide = hps_pixels(Image.new("RGB", (96, 40), "white"), SIZE)
    assert wide.shape == (3, SIZE, SIZE) and wide.dtype == torch.float32
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[7:17] = True  # 10 of 24 rows, in the middle
    torch.testing.assert_close(wide[:, inside], white.expand(3, 240), atol=1e-5, rtol=0)
    torch.testing.assert_close(wide[:, ~inside], black.expand(3, 336))
    tall = hps_pixels(Image.new("RGB", (40, 96), "white"), SIZE)
    torch.testing.assert_close(tall, wide.transpose(1, 2))


def test_pixels_of_the_right_size_are_not_touched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    expected = (torch.tensor(image) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(hps_pixels(Image.fromarray(image), SIZE), expected.permute(2, 0, 1))


def test_antialiasing_is_a_choice() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (96, 48, 3)))
    smooth, sharp = hps_pixels(stripes, SIZE), hps_pixels(stripes, SIZE, antialias=False)
    assert smooth[:, 5:-5, 5:-5].std(dim=(1, 2)).max() < 0.01  # grey
    assert not torch.allclose(smooth, sharp, atol=1e-2)


# Folders


def make_images(root: Path, prompts: Path, n: int, styles: tuple[str, ...] = STYLES) -> None:
    rng = np.random.default_rng(0)
    prompts.mkdir()
    for style in styles:
        (root / style).mkdir(parents=True)
        (prompts / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(n)]))
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(root / style / f"{i:05d}.jpg")


def test_a_style_is_the_mean_and_deviation_of_groups_of_80() -> None:
    values = np.random.default_rng(0).normal(28, 3, 800)
    scores = {f"photo/{i:05d}.jpg": v for i, v in enumerate(values)}
    groups = values.reshape(10, 80).mean(1)
    assert summarize(scores) == pytest.approx((groups.mean(), groups.std()))
    assert summarize(dict(reversed(scores.items()))) == summarize(scores)


def test_the_whole_path(
    weights: tuple[Path, Path], clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, prompts = tmp_path / "images", tmp_path / "benchmark"
    make_images(root, prompts, 5)
    monkeypatch.setattr("emf.evaluate.hps.GROUP", 2)
    result = score_hps(root, tmp_path / "out", prompts, clip, batch=3, name="mine", steps=4)
    rows = read_rows(tmp_path / "out" / "scored.jsonl")
    assert result.images == len(rows) == 20
    state, by_style = open_clip_state(), {}
    for style in STYLES:
        pixels = [hps_pixels(Image.open(root / style / f"{i:05d}.jpg"), SIZE) for i in range(5)]
        ids = [clip_tokenizer(CONTEXT)(f"{style} {i}", padding="max_length").input_ids for i in range(5)]
        images, texts = open_clip_image(state, torch.stack(pixels)), open_clip_text(state, torch.tensor(ids))
        by_style[style] = 100 * (images * texts).sum(-1).double().numpy()
        assert [r["score"] for r in rows if r["style"] == style] == pytest.approx(by_style[style], abs=1e-3)
    groups = {s: [x[:2].mean(), x[2:4].mean(), x[4]] for s, x in by_style.items()}
    assert result.tables["style"] == pytest.approx({s: np.mean(g) for s, g in groups.items()}, abs=1e-3)
    spread = result.tables["style, standard deviation over groups of 2"]
    assert spread == pytest.approx({s: np.std(g) for s, g in groups.items()}, abs=1e-3)
    assert result.overall == pytest.approx(np.mean(list(by_style.values())), abs=1e-3)
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| EMF, paper | 4 | 29.25 |" in page
    assert f"| **mine**, HPSv2.1 (transformers) | 4 | **{result.overall:.2f}** |" in page
    assert "- 5 prompts of photo instead of 800" in page and "- float32 instead of autocast to float16" in page


def test_a_killed_run_goes_on(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, prompts = tmp_path / "images", tmp_path / "benchmark"
    make_images(root, prompts, 5)
    whole = score_hps(root, tmp_path / "whole", prompts, clip, batch=3)
    done: list[int] = []
    images = Clip.images

    def stop_after_two(self: Clip, pixels: Tensor) -> Tensor:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(pixels))
        return images(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Clip, "images", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            score_hps(root, tmp_path / "out", prompts, clip, batch=3)
    assert len(read_rows(tmp_path / "out" / "scored.jsonl")) == 6
    again = score_hps(root, tmp_path / "out", prompts, clip, batch=3)
    assert again.overall == pytest.approx(whole.overall, abs=1e-5)
    one = score_hps(root, tmp_path / "one", prompts, clip, batch=1)
    assert one.overall == pytest.approx(whole.overall, abs=1e-5)


def test_one_style_of_png_files(weights: tuple[Path, Path], tmp_path: Path, clip: Clip) -> None:
    root, prompts = tmp_path / "images", tmp_path / "benchmark"
    make_images(root, prompts, 2, ("photo",))
    for file in (root / "photo").iterdir():
        Image.open(file).save(file.with_suffix(".png"))
        file.unlink()
    result = score_hps(root, tmp_path / "out", prompts, clip, styles=("photo",))
    assert result.images == 2 and list(result.tables["style"]) == ["photo"]
    assert "PNG files instead of JPEG" in result.deviations and "the average is over photo alone" in result.deviations


def test_half_precision_is_near(clip: Clip, tmp_path: Path) -> None:
    root, prompts = tmp_path / "images", tmp_path / "benchmark"
    make_images(root, prompts, 3, ("photo",))
    full, half = (
        score_hps(root, tmp_path / f"{half}", prompts, clip, styles=("photo",), half=half) for half in (False, True)
    )
    assert 0 < abs(full.overall - half.overall) < 1
    assert not any("float32" in text for text in half.deviations)


def test_missing_files_are_named(weights: tuple[Path, Path], clip: Clip, tmp_path: Path) -> None:
    root, prompts, out = tmp_path / "images", tmp_path / "benchmark", tmp_path / "out"
    make_images(root, prompts, 3)
    (root / "photo" / "00001.jpg").unlink()
    (root / "photo" / "00002.jpg").unlink()
    with pytest.raises(ValueError, match=r"photo/00001.jpg is missing, and 1 more of photo"):
        score_hps(root, out, prompts, clip)
    (prompts / "anime.json").unlink()
    with pytest.raises(ValueError, match=r"anime.json does not exist; put HPDv2's benchmark/anime.json there"):
        score_hps(root, out, prompts, clip)
    (prompts / "anime.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"anime.json is no list of texts"):
        score_hps(root, out, prompts, clip)
    with pytest.raises(ValueError, match="absent.pt does not exist"):
        run_hps(root, out, prompts, tmp_path / "absent.pt", tokenizer=str(weights[1]))
    assert not out.exists()
