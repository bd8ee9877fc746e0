"""Analyses of text encoders: retrieval against brute force, and the whole path on tiny models of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, noise, write_folder
from PIL import Image
from tiny import byte_tokenizer, clip_tokenizer
from torch.nn import functional as F

from emf.analyze import discriminability as on_retrieval
from emf.analyze import steps
from emf.analyze.bootstrap import bootstrap
from emf.analyze.dino import Dino
from emf.analyze.discriminability import Protocol, chance, discriminability, run_discriminability
from emf.analyze.disentanglement import disentanglement, run_disentanglement, similarities
from emf.analyze.encoders import Embedding, EncoderName, TextVectors, embed_texts, parse_encoders, pool
from emf.analyze.pairs import choose_captions, choose_queries, read_pairs
from emf.analyze.prompts import Shortening, read_prompts, shorten, shortened, split_units
from emf.analyze.retrieval import cosine, mean_vector, nearest
from emf.analyze.steps import Sampling, parse_runs, psnr, run_steps
from emf.analyze.vectors import VectorCache
from emf.conditioning.blip3o import Blip3oNext, SpecialTokens
from emf.conditioning.small import Connector, EncoderConfig, SmallEncoder
from emf.config import ConditionConfig, Config, to_json
from emf.data.digits import WORDS as DIGITS
from emf.data.digits import make_batch
from emf.evaluate.digits_scorer import Scorer
from emf.model.transformer import TransformerConfig
from emf.sample import sampler as generating

WORDS = ["a red cat", "two blue dogs", "a red cat", "a tall tree, in the fog", "one green bus", "x"]


# -- numerics ---------------------------------------------------------------------------------------------------------


def brute_force(x: np.ndarray, image: np.ndarray, q: int, k: int, mean: np.ndarray | None) -> list[int]:
    """Every other image's caption by falling cosine, of equal ones the first."""
    x = x - (0 if mean is None else mean)
    near = [(-round(float(x[q] @ y / np.linalg.norm(x[q]) / np.linalg.norm(y)), 9), j) for j, y in enumerate(x)]
    return [j for _, j in sorted(n for n in near if image[n[1]] != image[q])][:k]


def captions_with_twins(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [60, 5], some twice, and their images, three captions each."""
    x = np.random.default_rng(seed).normal(size=(60, 5)).astype(np.float32) + 1
    x[40:50] = x[5:15]
    return x, np.arange(60) // 3


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_retrieval_is_brute_force_whatever_the_block(k, centred):
    x, image = captions_with_twins()
    mean = mean_vector(x, 7) if centred else None
    if mean is not None:
        np.testing.assert_allclose(mean, x.astype(np.float64).mean(0))
    expected = [brute_force(x.astype(np.float64), image, q, k, mean) for q in range(60)]
    for block in (1, 7, 60, 1000):
        index, near = nearest(x, image, np.arange(60), k, mean=mean, block=block)
        assert index.tolist() == expected
        shift = 0 if mean is None else mean
        np.testing.assert_allclose(near, cosine((x - shift)[:, None], (x - shift)[index]), atol=2e-9)


def test_the_own_image_is_never_retrieved():
    x, image = captions_with_twins()
    x[image == 3] = x[9]  # its other captions say the same
    index, _ = nearest(x, image, np.arange(60), 57)
    assert (image[index] != image[:, None]).all()
    assert all(len({*row}) == 57 for row in index.tolist())
    with pytest.raises(ValueError, match="57 captions of other images, k is 58"):
        nearest(x, image, [0], 58)
    with pytest.raises(ValueError, match="0 queries"):
        nearest(x, image, [], 1)


def test_bootstrap_holds_the_mean_and_shrinks():
    x = np.random.default_rng(0).normal(3, 1, 2500)
    few, many = bootstrap(x[:100]), bootstrap(x)
    for made, n in ((few, 100), (many, 2500)):
        assert made.mean == pytest.approx(x[:n].mean()) and made.low < made.mean < made.high
        # the normal theory's interval
        assert made.high - made.low == pytest.approx(2 * 1.96 * x[:n].std() / n**0.5, rel=0.1)
    assert bootstrap(x) == many != bootstrap(x, seed=1)
    same = bootstrap([0.1] * 7)
    assert [same.low, same.mean, same.high] == pytest.approx([0.1] * 3) and same.low <= 0.1 <= same.high
    assert f"{bootstrap([])}" == "–" and f"{same}" == "0.100 [0.100, 0.100]"


def test_bootstrap_by_group_is_the_mean_of_means():
    made = bootstrap([1, 1, 1, 0, 0.5], ["a", "a", "a", "b", "b"])
    assert made.mean == pytest.approx((1 + 0.25) / 2)
    assert made.high <= (1 + 0.5) / 2 and made.low >= 0.5  # group a is constant


@pytest.mark.parametrize("wrong", [dict(level=1), dict(resamples=0), dict(groups=["a"])])
def test_bootstrap_refuses(wrong):
    with pytest.raises(ValueError, match="bootstrap: .*expected"):
        bootstrap([1.0, 2.0], **wrong)


def test_discriminability_by_hand():
    """Captions of two kinds; the encoder sees the kind, or a large common part and noise as well."""
    rng, kind = np.random.default_rng(0), np.arange(40) % 2
    text = np.stack([1 - kind, kind], 1) + 0.01 * rng.normal(size=(40, 2))
    features = np.stack([1 - kind, kind], 1).astype(np.float32)
    good = discriminability(text, np.arange(40), features)
    assert good.score.mean == pytest.approx(1) and len(good.each) == 40
    blind = discriminability(rng.normal(size=(40, 2)), np.arange(40), features, k=3)
    assert 0.2 < blind.score.mean < 0.8 and blind.score.low < blind.score.mean < blind.score.high
    assert chance(features, np.arange(40)) == pytest.approx(0.5, abs=0.2)
    # one caption an image queries, though each image has two
    twice = discriminability(np.repeat(text, 2, 0), np.repeat(np.arange(40), 2), features)
    assert len(twice.queries) == 40 and twice.score.mean == pytest.approx(1)


def test_centring_changes_what_it_should():
    """A common offset hides in the norm what tells captions apart; less the mean it plays no part."""
    x, image = captions_with_twins()
    features = np.random.default_rng(1).normal(size=(20, 4))
    shifted = x.astype(np.float64) + 50
    plain, moved = discriminability(x, image, features), discriminability(shifted, image, features)
    assert moved.text_cosine.min() > 0.99 and (plain.retrieved != moved.retrieved).any()
    centred = [discriminability(e, image, features, centred=True) for e in (x, shifted)]
    assert (centred[0].retrieved == centred[1].retrieved).all() and centred[0].score == centred[1].score
    assert (centred[0].retrieved != plain.retrieved).any()


# -- prompts ----------------------------------------------------------------------------------------------------------

LONG = "A red barn, old and tall, stands in a field. Two cows graze beside it; the sky is grey. It rains."


@pytest.mark.parametrize("unit, count", [("word", 21), ("phrase", 6), ("sentence", 3)])
def test_units(unit, count):
    units = split_units(LONG, unit)
    assert len(units) == count and " ".join(units) == LONG


@pytest.mark.parametrize("unit", ["word", "phrase", "sentence"])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.99])
def test_deletion_keeps_order_and_fraction(unit, fraction):
    units = split_units(LONG, unit)
    numbered = " ".join(f"{i}{'. ' if unit == 'sentence' else ', '}" for i in range(len(units))).strip()
    seen = set()
    for seed in range(20):
        text = shorten(numbered, Shortening(unit, fraction), np.random.default_rng(seed))
        kept = [int(part.strip(",.")) for part in text.split()]
        removed = min(max(1, int(fraction * len(units) + 0.5)), len(units) - 1)
        assert kept == sorted({*kept}) and len(kept) == len(units) - removed
        assert not text.endswith(",")
        seen.add(text)
    assert len(seen) > 1


def test_shortening_is_a_function_of_the_seed():
    how = Shortening(repeats=3, seed=5)
    first = shortened([LONG, "word", LONG], how)
    assert first == shortened([LONG, "word", LONG], how) != shortened([LONG, "word", LONG], Shortening(repeats=3))
    assert [len(v) for v in first] == [3, 0, 3] and first[0] != first[2]
    for wrong in (dict(fraction=0), dict(fraction=1), dict(unit="letter"), dict(repeats=0)):
        with pytest.raises(ValueError, match="analyze: unit"):
            Shortening(**wrong)


def test_prompts_of_every_kind(tmp_path):
    folder = write_folder(tmp_path / "prompts", {"b.txt": b"second\none \n", "a.txt": b"first", "c.txt": b" "})
    assert read_prompts(folder) == (["first", "second one"], ["a", "b"])
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\n two words \n")
    assert read_prompts(lines) == (["one", "two words"], ["1", "3"])
    rows.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    assert read_prompts(rows)[0] == ["one", "two"]
    rows.write_text('{"prompt": "one"}\n{"id": 3}\n')
    for path, said in ((rows, "p.jsonl:2 is no JSON object"), (tmp_path / "none", "cannot be read: No such file")):
        with pytest.raises(ValueError, match=said):
            read_prompts(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "empty")


def test_similarity_of_shortened_prompts_by_hand():
    full, short = np.array([[2.0, 0], [0, 1]]), np.array([[[1.0, 0], [1, 1]], [[1.0, 0], [0, 3]]])
    np.testing.assert_allclose(similarities(full, short), [[1, 0.5**0.5], [0, 1]])
    mean = mean_vector(full)
    # less (1, 1/2): (1, -1/2) with (0, -1/2)
    assert similarities(full, short, mean)[0, 0] == pytest.approx(0.25 / (1.25**0.5 * 0.5))


# -- the cache --------------------------------------------------------------------------------------------------------


def vectors_of(keys: list[str]) -> np.ndarray:
    return np.array([[len(k), ord(k[0]), 0.5] for k in keys], np.float32)


@pytest.mark.parametrize(
    "rows, names, kept", [(-3, 0, 7), (0, -2, 7), (-13, -1, 6), (5, 0, 8), (-10_000, 0, 0), (0, -10_000, 0)]
)
def test_a_torn_cache_is_continued(tmp_path, rows, names, kept):
    """Bytes lost (or too many) at the end of either file: the same vectors, nothing made twice that was whole."""
    keys, asked = [f"{chr(97 + i)}\n{'x' * i}" for i in range(12)], []

    def compute(part):
        asked.extend(part)
        if len(asked) > 8:  # Ctrl-C in the fifth batch
            raise KeyboardInterrupt
        return vectors_of([keys[i] for i in part])

    with pytest.raises(KeyboardInterrupt):
        VectorCache(tmp_path / "v").fill(keys, compute, 2, "")
    assert len(np.load(tmp_path / "v.npy")) == 8
    for path, cut in ((tmp_path / "v.npy", rows), (tmp_path / "v.keys", names)):
        data = path.read_bytes()
        path.write_bytes(data[: max(0, len(data) + cut)] if cut <= 0 else data + b"\0" * cut)
    whole = VectorCache(tmp_path / "v")
    assert len(whole.where) == kept
    redone: list[int] = []

    def rest(part):
        redone.extend(part)
        return vectors_of([keys[i] for i in part])

    again = whole.fill(keys + keys[:1], rest, 5, "")
    assert redone == list(range(kept, 12))
    assert again.shape == (13, 3) and np.array_equal(again[:], vectors_of([*keys, keys[0]]))
    assert np.array_equal(again[np.array([12, 3])], vectors_of([keys[0], keys[3]]))
    assert np.load(tmp_path / "v.npy").shape == (12, 3)
    more = VectorCache(tmp_path / "v")
    assert more.missing([*keys, "new", "new"]) == [12]
    with pytest.raises(ValueError, match=r"vectors \(1, 3\).*finite"):
        more.fill(["new"], lambda part: np.full((1, 3), np.nan), 1, "")
    (tmp_path / "v.npy").write_bytes(b"something else" * 20)
    with pytest.raises(ValueError, match="no file of vectors"):
        VectorCache(tmp_path / "v")


# -- encoders and images of the real classes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders clip, t5, blip3o, dinov2, dinov3 of tiny random models."""
    from transformers import (
        BitImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        Dinov2Config,
        Dinov2Model,
        DINOv3ViTConfig,
        DINOv3ViTModel,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5EncoderModel,
    )

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = clip_tokenizer(77)
    ends = dict(bos_token_id=298, eos_token_id=299, pad_token_id=299)
    CLIPTextModel(CLIPTextConfig(vocab_size=300, **small, **ends)).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    tokenizer = byte_tokenizer(["<pad>", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "t5")
    tokenizer.save_pretrained(root / "t5")
    own = ["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>", *(f"<I{i}>" for i in range(9))]
    tokenizer = byte_tokenizer(["<pad>", "<|im_start|>", "<|im_end|>", *own], pad_token="<pad>", eos_token="<|im_end|>")
    heads = dict(num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
    language = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **small, **heads)).eval()
    ids = (tokenizer.convert_tokens_to_ids(n) for n in ("<im_start>", "<im_end>", "<S0>", "<I0>"))
    Blip3oNext(language, tokenizer, SpecialTokens(*ids, 9, 3), Connector(16, 12)).save(root / "blip3o")
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
    Dinov2Model(Dinov2Config(image_size=24, **vision)).save_pretrained(root / "dinov2")
    BitImageProcessor(size={"shortest_edge": 26}, crop_size={"height": 24, "width": 24}).save_pretrained(
        root / "dinov2"
    )
    registers = DINOv3ViTConfig(image_size=24, intermediate_size=24, num_register_tokens=3, **vision)
    DINOv3ViTModel(registers).save_pretrained(root / "dinov3")
    pixels = dict(image_processor_type="DINOv3ViTImageProcessorFast", size=dict(height=24, width=24))
    pixels |= dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4], do_resize=True)
    (root / "dinov3" / "preprocessor_config.json").write_text(json.dumps(pixels))
    return root


def write_coco(folder: Path, images: int = 7, split: str = "train2017") -> Path:
    """COCO's layout, two captions an image; ids are neither dense nor sorted."""
    ids = [3 * i + 40 for i in reversed(range(images))]
    tree = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids],
        "annotations": [
            {"id": 1000 * j + i, "image_id": i, "caption": f"{'first' if j else 'second'} of {i}, {'x' * (i % 5)}. "}
            for j in (1, 2)
            for i in ids
        ],
    }
    for a in tree["annotations"]:
        a["caption"] = a["caption"].replace("first", "FIRST") if a["id"] < 2000 else a["caption"]
    files = {f"{split}/{i:012d}.jpg": encoded(noise(i), "jpeg") for i in ids}
    return write_folder(folder, {f"annotations/captions_{split}.json": json.dumps(tree).encode(), **files})


def test_coco_is_read(tmp_path):
    data = write_coco(tmp_path, 5)
    (data / "train2017" / f"{43:012d}.jpg").unlink()
    pairs = read_pairs(data)
    assert pairs.keys == [f"{i:012d}.jpg" for i in (40, 46, 49, 52)] and pairs.image.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert pairs.captions[2].startswith("FIRST of 46") and "46" in pairs.captions[3]
    assert pairs.notes == ["1 of 5 images of captions_train2017.json were not there and left out"]
    assert pairs.open(1).size == (40, 32)
    assert choose_captions(pairs.image, "first", 0).tolist() == [0, 2, 4, 6]
    assert choose_captions(pairs.image, "all", 0).tolist() == list(range(8))
    drawn = [choose_captions(pairs.image, "random", seed) for seed in range(8)]
    assert all(pairs.image[d].tolist() == [0, 1, 2, 3] for d in drawn) and len({tuple(d) for d in drawn}) > 1
    for count in (2, None, 99):
        asked = choose_queries(pairs.image, count, 0)
        assert len({*pairs.image[asked].tolist()}) == len(asked) == min(count or 4, 4)


def test_folders_of_images_with_texts_are_read(tmp_path):
    files = {"a/1.png": encoded(noise(1)), "a/1.txt": b"one ", "b.jpg": encoded(noise(2), "jpeg"), "b.txt": b"two"}
    pairs = read_pairs(write_folder(tmp_path / "d", files | {"c.png": encoded(noise(3)), "c.txt": b" "}))
    assert pairs.captions == ["one", "two"] and pairs.image.tolist() == [0, 1] and pairs.open(1).size == (40, 32)
    assert len(pairs.notes) == 1 and "empty caption" in pairs.notes[0]
    assert np.array_equal(np.asarray(pairs.open(0)), np.asarray(noise(1)))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_dino_features_are_the_models(models, kind):
    images = [noise(1), noise(2, 30, 50)]
    made = {p: Dino.load(str(models / kind), p).features(images) for p in ("cls", "pooler", "mean")}
    network = Dino.load(str(models / kind))
    pixels = network.processor(images=images, return_tensors="pt")["pixel_values"]
    if kind == "dinov3":  # by hand: squashed, antialiased
        x = torch.from_numpy(np.asarray(images[1], np.float32) / 255).permute(2, 0, 1)[None]
        x = F.interpolate(x, (24, 24), mode="bilinear", antialias=True)[0]
        x = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
        torch.testing.assert_close(pixels[1], x)
    with torch.no_grad():
        states = network.model(pixel_values=pixels).last_hidden_state
    assert states.shape == (2, {"dinov2": 1, "dinov3": 4}[kind] + 36, 16)
    torch.testing.assert_close(made["cls"], states[:, 0])
    torch.testing.assert_close(made["pooler"], made["cls"])
    torch.testing.assert_close(made["mean"], states[:, -36:].mean(1))


@torch.no_grad()
def test_text_embeddings_pool_what_they_say(models):
    clip = EncoderName.parse(f"{models / 'clip'}".join(["clip:", ""])).load()
    states, mask = clip.text_states(WORDS)
    assert torch.equal(embed_texts(clip, WORDS)[0], states[0][mask[0]].mean(0))
    last = embed_texts(clip, WORDS, Embedding("last"))
    assert all(torch.equal(last[i], states[i][mask[i]][-1]) for i in range(len(WORDS)))
    blip = EncoderName.parse(f"B=blip3o:{models / 'blip3o'}").load()
    blip.image_tokens = 4
    every = ("prompt", "caption", "condition", "connector")
    vectors = {s: embed_texts(blip, WORDS[:3], Embedding("mean", s)) for s in every}
    assert {s: v.shape[1] for s, v in vectors.items()} == dict(prompt=16, caption=16, condition=16, connector=12)
    assert len({float(v[0, 0]) for v in vectors.values()}) == 4
    torch.testing.assert_close(vectors["condition"][0], vectors["condition"][2])  # a caption's own tokens
    alone = embed_texts(blip, WORDS[:1], Embedding("mean", "condition"))
    torch.testing.assert_close(vectors["condition"][:1], alone)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    x = torch.arange(6.0).reshape(2, 3, 1)
    assert pool(x, mask, "last").tolist() == [[2], [3]] and pool(x, None, "last").tolist() == [[2], [5]]


def test_vectors_of_changed_weights_are_not_taken(models, tmp_path):
    import shutil

    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    encoder = EncoderName.parse(f"A=clip:{folder}")
    first = TextVectors(encoder, Embedding(), tmp_path)(WORDS)
    assert TextVectors(encoder, Embedding(), tmp_path).cache.missing(WORDS) == []
    assert (
        len(TextVectors(encoder, Embedding("last"), tmp_path).cache.missing(WORDS)) == 5
    )  # one caption is there twice
    assert np.array_equal(first[0], first[2])
    (folder / "model.safetensors").touch()
    assert TextVectors(encoder, Embedding(), tmp_path).cache.missing(WORDS)


def test_discriminability_of_a_folder_as_a_whole(models, tmp_path, monkeypatch):
    """Two encoders in one call; stopped in the middle, continued; a third named later."""
    data, out = write_coco(tmp_path / "coco"), tmp_path / "out"
    names = [f"{n}={n}:{models / n}" for n in ("clip", "t5")]
    protocol, dino = Protocol(queries=6, k=2, captions="all"), str(models / "dinov2")
    run = run_discriminability

    class Stopped(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(on_retrieval, "image_similarity", stop)
        run(parse_encoders(names), data, out, protocol, dino=dino)
    with monkeypatch.context() as m:  # every vector is there: no model runs
        m.setattr(EncoderName, "load", stop)
        m.setattr(Dino, "features", stop)
        rows = run(parse_encoders(names), data, out, protocol, dino=dino)
    tree = json.loads((out / "results.json").read_text())
    assert [r["name"] for r in tree["rows"]] == ["clip", "t5"] and tree["captions"] == 14
    # the same, by the functions
    pairs, network = read_pairs(data), Dino.load(dino)
    features = network.features([pairs.open(i) for i in range(7)]).numpy()
    texts = embed_texts(parse_encoders(names)[1].load(), pairs.captions).numpy()
    queries = choose_queries(pairs.image, 6, 0)
    for centred, score in ((False, rows[1].plain), (True, rows[1].centred)):
        expected = discriminability(texts, pairs.image, features, queries, 2, centred=centred).score
        assert score.mean == pytest.approx(expected.mean, abs=1e-5) and score.low <= score.mean <= score.high
    table = (out / "results.md").read_text()
    for said in ("| CLIP, paper | 0.730 |", "| **t5** |", "k = 2", "6 queries", "all captions of each image", "cls"):
        assert said in table
    for picture in ("discriminability.png", "retrieved.png"):
        with Image.open(out / picture) as image:
            assert image.width > 300 and len(np.unique(np.asarray(image))) > 20
    with pytest.raises(ValueError, match="is no T5EncoderModel"):  # a slip leaves no trace
        run(parse_encoders([*names, f"next=t5:{models / 'clip'}"]), data, out, protocol, dino=dino)
    run(parse_encoders([*names, f"next=blip3o:{models / 'blip3o'}"]), data, out, protocol, dino=dino)
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 3
    with pytest.raises(ValueError, match="holds results of next"):
        run(parse_encoders(names), data, out, protocol, dino=dino)
    with pytest.raises(ValueError, match=r"holds results by other settings \(k\)"):
        names.append(f"next=blip3o:{models / 'blip3o'}")
        run(parse_encoders(names), data, out, Protocol(queries=6, captions="all"), dino=dino)


def test_disentanglement_of_a_folder_as_a_whole(models, tmp_path):
    prompts = write_folder(
        tmp_path / "p", {f"{i}.txt": f"{LONG} {WORDS[i]}".encode() for i in range(5)} | {"9.txt": b"x"}
    )
    names = [f"{n}={n}:{models / n}" for n in ("clip", "t5")]
    how = Shortening("phrase", 0.4, 3)
    rows = run_disentanglement(parse_encoders(names), prompts, tmp_path / "out", how)
    expected = disentanglement(parse_encoders(names)[1].load(), read_prompts(prompts)[0], how)
    assert expected.each.shape == (5, 3) and expected.used == [0, 1, 2, 3, 4]
    for made, other in ((rows[1].plain, expected.plain), (rows[1].centred, expected.centred)):
        assert made.mean == pytest.approx(other.mean, abs=1e-5) and made.low <= made.mean <= made.high
    assert rows[1].centred.mean < rows[1].plain.mean  # random weights: nearly one vector for all
    table = (tmp_path / "out" / "results.md").read_text()
    for said in ("| BLIP3o-NEXT, paper | 0.999 |", "0.4 of the phrases", "5 of 6 prompts", "| **clip** |"):
        assert said in table
    for picture in ("disentanglement.png", "shortened.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width > 300
    with pytest.raises(ValueError, match="none of 2 prompts has two"):
        disentanglement(parse_encoders(names)[0].load(), ["x", "y"], how)


def test_the_digits_own_encoder_is_analysed_too():
    torch.manual_seed(0)
    encoder = SmallEncoder(EncoderConfig(32, 48, 1, 2, 1, 16, 24), DIGITS).eval()
    images, captions = make_batch(0, 24)
    made = disentanglement(encoder, captions, Shortening(fraction=0.3))
    assert 0 < made.plain.mean < 1 and 0 < len(made.used) <= 24
    one = disentanglement(encoder, [captions[made.used[0]]])
    assert np.isnan(one.centred.mean) and 0 < one.plain.mean <= 1
    score = discriminability(embed_texts(encoder, captions), np.arange(24), images.flatten(1).numpy())
    assert -1 <= score.score.mean <= 1 and score.retrieved.shape == (24, 1)


# -- steps ------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, seed: int, objective: str = "flow_matching", **fields: object) -> Path:
    """A run's folder with one checkpoint of random weights."""
    from safetensors.torch import save_file

    from emf.network.build import build, saved_names

    torch.manual_seed(seed)
    sizes = dict(in_channels=3, out_channels=3, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    sizes |= dict(num_cross_attention_heads=2, cross_attention_head_dim=8, caption_channels=fields.pop("width", 24))
    sizes |= dict(sample_size=fields.pop("size", 18), mlp_ratio=2.0, dual_time=objective == "meanflow")
    given = dict(encoder=EncoderConfig(32, 48, 1, 2, 1, 16, 24)) | fields
    config = Config("digits-base", objective, transformer=TransformerConfig(**sizes), **given)
    network = build(config)
    names = saved_names(network, config)
    place = folder / "checkpoints" / "step_0000001"
    place.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items() if k in names}, place / "model.safetensors")
    (place / "config.json").write_text(to_json(config))
    return folder


@pytest.fixture(scope="module")
def digit_runs(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    return [f"{n}={write_run(root / n, i)}" for i, n in enumerate(("one", "two"))]


def test_steps_on_the_digits(digit_runs, tmp_path, monkeypatch):
    scorer = Scorer.fit()
    monkeypatch.setattr(Scorer, "fit", lambda: scorer)  # once is enough
    sampling = Sampling((1, 2, 3), per_tag=1, batch=16)
    panels = run_steps(parse_runs(digit_runs), tmp_path / "out", sampling)
    assert list(panels) == ["score", "PSNR, dB"] and list(panels["score"]) == ["one", "two"]
    assert all(0 <= x.low <= x.mean <= x.high <= 1 for line in panels["score"].values() for x in line.values())
    close = panels["PSNR, dB"]["one"]
    assert list(close) == [1, 2] and close[1].mean < close[2].mean < 100  # nearer with every step
    table = (tmp_path / "out" / "results.md").read_text()
    assert "PSNR, dB, to its own 3 steps" in table and "| GenEval | 0.46 | 0.86 | 0.91 |" in table
    with Image.open(tmp_path / "out" / "samples.png") as image:
        assert image.width > 300
    assert (tmp_path / "out" / "steps.png").is_file()
    with pytest.raises(ValueError, match="other settings"):
        run_steps(parse_runs(digit_runs), tmp_path / "out", Sampling((1, 2), per_tag=1))
    # all images are there, and are not drawn again
    monkeypatch.setattr(steps, "generate", None)
    assert run_steps(parse_runs(digit_runs), tmp_path / "out", sampling) == panels


def test_steps_elsewhere_go_on_where_they_were_stopped(models, tmp_path, monkeypatch):
    condition = ConditionConfig("clip", models / "clip")
    runs = {n: write_run(tmp_path / n, i, condition=condition, width=16, size=8) for i, n in enumerate("ab")}
    prompts, out, sampling = tmp_path / "p.txt", tmp_path / "out", Sampling((1, 3), batch=2)
    prompts.write_text("\n".join(WORDS[:3]))
    calls, real = [], generating.generate

    def some(*arguments, **settings):
        calls.append(len(arguments[2]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(generating, "generate", some)
    with pytest.raises(KeyboardInterrupt):
        run_steps(runs, out, sampling, prompts=prompts)
    kept = {p: p.read_bytes() for p in out.rglob("images/**/*.png")}
    assert len(kept) == 5  # of three calls, two of them with two images
    next(iter(kept)).unlink()
    panels = run_steps(runs, out, sampling, prompts=prompts)
    assert sum(calls[4:]) == 12 - 4  # those that were there are not drawn again
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert list(panels) == ["PSNR, dB"]
    calls[:] = [0] * 9
    named = run_steps(runs, tmp_path / "other", sampling, prompts=prompts, dino=str(models / "dinov3"))
    assert named["PSNR, dB"] == panels["PSNR, dB"] and set(named["cosine of DINO features"]) == {"a", "b"}
    assert all(-1 <= x.mean <= 1 for x in named["cosine of DINO features"]["a"].values())


def test_psnr_by_hand():
    a, b = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert psnr(a, b) == pytest.approx(20 * np.log10(5)) and psnr(a, a) == 100


# -- what a user gets wrong is one line -------------------------------------------------------------------------------


def analyze(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """(exit code, stderr) of `emf analyze ...`."""
    from emf.cli import main as cli

    monkeypatch.setattr("sys.argv", ["emf", "analyze", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("discriminability A=clip:{none} --data {coco} --out {out}", "names no folder; expected NAME=KIND:FOLDER"),
        (
            "discriminability A={m}/clip --data {coco} --out {out}",
            "is no run and no export; of an encoder's folder say",
        ),
        ("discriminability A=clip:{m}/clip A=t5:{m}/t5 --data {coco} --out {out}", "two encoders are called A"),
        ("discriminability --data {coco} --out {out}", "no encoder"),
        ("discriminability A=t5:{m}/clip --data {coco} --out {out} --dino {m}/dinov2", "is no T5EncoderModel"),
        ("discriminability A=clip:{m}/clip --data {none} --out {out}", "does not exist; expected COCO's folder"),
        (
            "discriminability A=clip:{m}/clip --data {coco} --split val2017 --out {out}",
            "captions_val2017.json does not",
        ),
        ("discriminability A=clip:{m}/clip --data {m} --out {out}", "holds no image with a caption"),
        ("discriminability A=clip:{m}/clip --data {coco} --out {out} --dino {m}/t5", "its model_type is t5"),
        ("discriminability A=clip:{m}/clip --data {coco} --out {out} --dino {none}", "cannot be loaded as DINO"),
        ("discriminability A=clip:{m}/clip --data {coco} --out {full} --dino {m}/dinov2", "not this analysis's"),
        ("discriminability A=clip:{m}/clip --data {coco} --out {out} --k 0", "expected at least 1, 0, 1 and 0"),
        ("disentanglement A=clip:{m}/clip --prompts {none} --out {out}", "cannot be read"),
        ("disentanglement A=clip:{m}/clip --prompts {p} --out {out} --unit sentence", "choose a smaller --unit"),
        ("disentanglement A=clip:{m}/clip --prompts {p} --out {out} --fraction 1", "above 0 and below 1"),
        ("steps a={one} --out {out}", "1 backbones; give two or more"),
        ("steps a={one} b={none} --out {out}", "no such folder"),
        ("steps a={one} b={mean} --out {out}", "was trained for MeanFlow"),
        ("steps a={one} b={one} --out {out} --steps 1", "expected two different numbers of steps"),
        ("steps a={one} b={m}/clip --out {out}", "it holds no run"),
        ("steps a={one} b={one} --out {out} --prompts {p}", "leave --prompts out"),
    ],
)
def test_wrong_arguments_are_one_line(models, digit_runs, tmp_path, monkeypatch, capsys, arguments, said):
    (tmp_path / "p.txt").write_text("a prompt\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.md").write_text("mine")
    places = dict(m=models, none=tmp_path / "none", out=tmp_path / "out", p=tmp_path / "p.txt", full=tmp_path / "full")
    places |= dict(one=digit_runs[0].partition("=")[2], coco="")
    if "{coco}" in arguments:
        places["coco"] = write_coco(tmp_path / "coco", 3)
    if "{mean}" in arguments:
        places["mean"] = write_run(tmp_path / "mean", 0, "meanflow")
    code, printed = analyze(monkeypatch, capsys, *arguments.format(**places).split())
    line = printed.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and said in line
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert (tmp_path / "full" / "results.md").read_text() == "mine"
