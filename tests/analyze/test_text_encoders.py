"""The analyses of text encoders on tiny models of the real classes, from their folders to their pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from analyzed import LONG, WORDS, write_coco, write_models
from image_files import encoded, noise, write_folder
from PIL import Image
from torch.nn import functional as F

from emf.analyze import discriminability as on_retrieval
from emf.analyze.choices import Embedding, Protocol, Shortening
from emf.analyze.dino import Dino
from emf.analyze.discriminability import discriminability, run_discriminability
from emf.analyze.disentanglement import disentanglement, run_disentanglement
from emf.analyze.encoders import TextVectors, embed_texts, pool
from emf.analyze.names import EncoderName, parse_encoders
from emf.analyze.pairs import choose_captions, choose_queries, read_pairs
from emf.analyze.prompts import read_prompts
from emf.conditioning.small import EncoderConfig, SmallEncoder
from emf.data.digits import WORDS as DIGITS
from emf.data.digits import make_batch
from emf.files import alone


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def test_coco_is_read(tmp_path: Path) -> None:
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
    file = data / "annotations" / "captions_train2017.json"
    tree = json.loads(file.read_text())
    tree["annotations"][0]["caption"], tree["annotations"][1]["caption"] = None, " "
    del tree["annotations"][2]["caption"]
    file.write_text(json.dumps(tree))
    assert read_pairs(data).notes[-1] == "3 of 10 captions of captions_train2017.json were empty and left out"
    tree["annotations"][0]["caption"] = 5
    file.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="is no file of COCO captions: the caption 5 is no text"):
        read_pairs(data)
    assert choose_captions(pairs.image, "first", 0).tolist() == [0, 2, 4, 6]
    assert choose_captions(pairs.image, "all", 0).tolist() == list(range(8))
    drawn = [choose_captions(pairs.image, "random", seed) for seed in range(8)]
    assert all(pairs.image[d].tolist() == [0, 1, 2, 3] for d in drawn) and len({tuple(d) for d in drawn}) > 1
    for count in (2, None, 99):
        asked = choose_queries(pairs.image, count, 0)
        assert len({*pairs.image[asked].tolist()}) == len(asked) == min(count or 4, 4)


def test_folders_of_images_with_texts_are_read(tmp_path: Path) -> None:
    files = {"a/1.png": encoded(noise(1)), "a/1.txt": b"one ", "b.jpg": encoded(noise(2), "jpeg"), "b.txt": b"two"}
    pairs = read_pairs(write_folder(tmp_path / "d", files | {"c.png": encoded(noise(3)), "c.txt": b" "}))
    assert pairs.captions == ["one", "two"] and pairs.image.tolist() == [0, 1] and pairs.open(1).size == (40, 32)
    assert len(pairs.notes) == 1 and "empty caption" in pairs.notes[0]
    assert np.array_equal(np.asarray(pairs.open(0)), np.asarray(noise(1)))
    with (tmp_path / "d" / "b.jpg").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 2)  # an image that would still open
    with pytest.raises(ValueError, match="d: b: file cannot be read: it became shorter since it was scanned$"):
        pairs.open(1)
    (tmp_path / "d" / "a" / "1.png").unlink()
    with pytest.raises(ValueError, match="d: a/1: file cannot be read: No such file or directory$"):
        pairs.open(0)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_dino_features_are_the_models(models: Path, kind: str) -> None:
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
def test_text_embeddings_pool_what_they_say(models: Path) -> None:
    clip = EncoderName.parse(f"{models / 'clip'}".join(["clip:", ""])).load()
    states, mask = clip.text_states(WORDS)
    torch.testing.assert_close(embed_texts(clip, WORDS)[0], states[0][mask[0]].mean(0))
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


def test_vectors_of_changed_weights_are_not_taken(models: Path, tmp_path: Path) -> None:

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


def test_discriminability_of_a_folder_as_a_whole(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with alone(out), pytest.raises(ValueError, match="another process is at work in .*out; wait for it"):
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
    with pytest.raises(ValueError, match=r"holds what was made by other settings \(k\)"):
        names.append(f"next=blip3o:{models / 'blip3o'}")
        run(parse_encoders(names), data, out, Protocol(queries=6, captions="all"), dino=dino)


def test_images_that_cannot_be_read_are_dropped_before_any_caption_is_encoded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name and counted, and the score is the one without them."""
    data, dino = write_coco(tmp_path / "coco", images=9), str(models / "dinov2")
    names = [f"clip=clip:{models / 'clip'}"]
    (first, second), images = ((data / "train2017" / f"{i:012d}.jpg" for i in (40, 49)), data / "train2017")
    first.write_bytes(first.read_bytes()[:300])
    second.write_bytes(b"")
    rows = run_discriminability(parse_encoders(names), data, tmp_path / "out", Protocol(captions="all"), dino=dino)
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tree["captions"] == 14 and tree["queries"] == 7
    table = (tmp_path / "out" / "results.md").read_text()
    assert f"{data}: 1 dropped: corrupt image: {first.name} (" in table
    assert f"{data}: 1 dropped: empty image file: {second.name}" in table
    for file in (first, second):
        file.unlink()
    without = run_discriminability(parse_encoders(names), data, tmp_path / "again", Protocol(captions="all"), dino=dino)
    assert rows == without
    for file in images.iterdir():
        file.write_bytes(b"no picture")
    monkeypatch.setattr(EncoderName, "load", None)
    with pytest.raises(
        ValueError, match=f"analyze: {data} holds no image that can be read; {data}: 7 dropped: corrupt"
    ):
        run_discriminability(parse_encoders(names), data, tmp_path / "none", dino=dino)


def test_disentanglement_of_a_folder_as_a_whole(models: Path, tmp_path: Path) -> None:
    prompts = write_folder(
        tmp_path / "p", {f"{i}.txt": f"{LONG} {WORDS[i]}".encode() for i in range(5)} | {"9.txt": b"x"}
    )
    names = [f"{n}={n}:{models / n}" for n in ("clip", "t5")]
    how = Shortening("phrase", 0.4, 3)
    with alone(tmp_path / "out"), pytest.raises(ValueError, match="another process is at work in .*out; wait for it"):
        run_disentanglement(parse_encoders(names), prompts, tmp_path / "out", how)
    assert not (tmp_path / "out").exists()  # it wrote nothing
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


def test_the_digits_own_encoder_is_analysed_too() -> None:
    torch.manual_seed(0)
    encoder = SmallEncoder(EncoderConfig(32, 48, 1, 2, 1, 16, 24), DIGITS).eval()
    images, captions = make_batch(0, 24)
    made = disentanglement(encoder, captions, Shortening(fraction=0.3))
    assert 0 < made.plain.mean < 1 and 0 < len(made.used) <= 24
    one = disentanglement(encoder, [captions[made.used[0]]])
    assert np.isnan(one.centred.mean) and 0 < one.plain.mean <= 1
    score = discriminability(embed_texts(encoder, captions), np.arange(24), images.flatten(1).numpy())
    assert -1 <= score.score.mean <= 1 and score.retrieved.shape == (24, 1)
