"""GenEval's detector: Mask2Former's pixels and answers, CLIP's colours, and the whole path on tiny networks of the real
classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from geneval_cases import make_folder, one
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import clip_tokenizer, tiny_clip

from emf.data.digits import COLORS
from emf.evaluate import benchmark
from emf.evaluate.clip import Clip, center_square, normalized
from emf.evaluate.detector import CLASSES, HFDetector, Views, cut_out, detector_pixels, instances
from emf.evaluate.geneval import score_geneval
from emf.evaluate.rules import Detection
from emf.files import read_rows

# Mask2Former's pixels and answers


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [  # width, height; mmdet's rescaling to at most 1333 x 800, then padding to multiples of 32
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((640, 480), (800, 1067), (800, 1088)),
        ((480, 640), (1067, 800), (1088, 800)),
        ((1000, 300), (400, 1333), (416, 1344)),
    ],
)
def test_pixels_are_scaled_and_padded(size: tuple[int, int], inner: tuple[int, int], padded: tuple[int, int]) -> None:
    pixels, shape = detector_pixels(Image.new("RGB", size, (255, 0, 0)), Views())
    assert shape == inner and tuple(pixels.shape[1:]) == padded
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    inside = torch.zeros(padded, dtype=torch.bool)
    inside[: inner[0], : inner[1]] = True
    assert (pixels[:, inside] == pixels[:, :1, 0]).all() and (pixels[:, ~inside] == 0).all()


def test_answers_become_instances_as_in_the_official_detector() -> None:
    logits = torch.full((3, 4), -50.0)
    logits[0, 1] = logits[1, 2] = 50  # sure
    logits[2, 0] = logits[2, 3] = 50  # half void
    masks = torch.full((3, 8, 8), -3.0)
    masks[0, 2:4, 1:5] = 2.0
    masks[2, :, :4] = 1.0
    found = instances(logits, masks, (8, 8), (8, 8), (8, 8), Views(least=0.3))
    by_class = {k: (score, box, mask) for k, score, box, mask in found}
    assert by_class.keys() == {0, 1}  # query 1 has no mask
    sigmoid = torch.sigmoid(torch.tensor([1.0, 2.0])).tolist()
    assert by_class[1][0] == pytest.approx(sigmoid[1], abs=1e-5) and by_class[1][1] == (1, 2, 5, 4)
    assert by_class[0][0] == pytest.approx(0.5 * sigmoid[0], abs=1e-5) and by_class[0][1] == (0, 0, 4, 8)
    assert by_class[1][2].sum() == 8 and by_class[1][2].dtype == bool


def test_padding_is_cut_off_before_masks_are_scaled_to_the_image() -> None:
    logits = torch.tensor([[50.0, -50, -50]])
    masks = torch.full((1, 8, 16), -4.0)
    masks[0, :, 8:] = 4.0  # the right half of 16, of which 12 are image
    ((_, _, box, mask),) = instances(logits, masks, (32, 64), (32, 48), (64, 96), Views())
    assert mask.shape == (64, 96) and box == (64, 0, 96, 64)


def test_one_query_may_be_several_objects_and_the_top_is_kept() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.35, 0.25], [0.05, 0.9, 0.05]]))
    masks = torch.full((2, 4, 4), 5.0)
    both = instances(logits, masks, (4, 4), (4, 4), (4, 4), Views())
    assert [(k, round(score, 2)) for k, score, *_ in both] == [(1, 0.89), (0, 0.4), (1, 0.35)]
    assert len(instances(logits, masks, (4, 4), (4, 4), (4, 4), Views(top=2))) == 2
    # what is left out for its class alone could not have passed the threshold
    every = instances(logits, masks, (4, 4), (4, 4), (4, 4), Views(least=0.0))
    assert [f[:3] for f in every if f[1] > 0.3] == [f[:3] for f in both if f[1] > 0.3]


def test_objects_are_cut_out_over_grey() -> None:
    image = Image.new("RGB", (10, 8), "red")
    mask = np.zeros((8, 10), bool)
    mask[2:6, 3:5] = True
    crop = np.array(cut_out(image, Detection("dog", 1, (3, 2, 7, 6), mask=mask)))
    assert crop.shape == (4, 4, 3)
    assert (crop[:, :2] == (255, 0, 0)).all() and (crop[:, 2:] == 0x99).all()
    assert cut_out(image, Detection("dog", 1, (3, 2, 7, 6))).getcolors() == [(16, (255, 0, 0))]


def test_clips_view_is_the_central_square() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    view = center_square(Image.fromarray(pixels), 10)
    assert view.size == (10, 10) and np.array(view)[:, 1:-1].min() > 200
    assert center_square(Image.new("RGB", (33, 77)), 16).size == (16, 16)


# The whole path on tiny networks of the real classes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random Mask2Former that is sure of itself, and of a random CLIP."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages)
    sizes = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16)
    layers = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6, num_labels=80)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **sizes, **layers))
    with torch.no_grad():
        model.class_predictor.weight.mul_(40)
        model.class_predictor.bias[-1] = -40  # never void
    model.save_pretrained(root / "mask2former")
    tiny_clip().save_pretrained(root / "clip")
    clip_tokenizer().save_pretrained(root / "clip")
    return root / "mask2former", root / "clip"


def test_the_whole_path(weights: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    detector.views = Views(long=120, short=64)
    specs = [
        {"tag": "colors", "prompt": f"a red {label}", "include": [one(label, color="red")]} for label in CLASSES[::20]
    ]
    names = make_folder(tmp_path / "images", specs)
    for n in names:
        Image.open(tmp_path / "images" / n).resize((48, 40)).save(tmp_path / "images" / n)
    found = detector.detect(tmp_path / "images" / names[0])
    assert found
    for d in found:
        ys, xs = np.nonzero(d.mask)
        assert d.mask is not None and d.mask.shape == (40, 48) and 0 < d.score <= 1 and d.label in CLASSES
        assert d.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    # ask for what is there, so that colours are classified too
    best = max(found, key=lambda d: d.score)
    color = detector.colors(tmp_path / "images" / names[0], best.label, [best])[0]
    asked = {"tag": "colors", "prompt": "", "include": [one(best.label, color=color)]}
    (tmp_path / "images" / "00000" / "metadata.jsonl").write_text(json.dumps(asked))
    result = score_geneval(tmp_path / "images", tmp_path / "out", detector)
    rows = read_rows(tmp_path / "out" / "scored.jsonl")
    assert rows[0]["correct"] and result.label == "GenEval (HF detector)"
    assert any("not interchangeable" in text for text in result.deviations)
    assert f"{best.label}" in json.loads(rows[0]["details"])
    monkeypatch.setattr(HFDetector, "detect", lambda *_: pytest.fail("was scored already"))
    assert score_geneval(tmp_path / "images", tmp_path / "out", detector) == result


def test_other_weights_in_the_same_folder_are_another_detector(
    weights: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts that are there are not taken for theirs; where the folder's path is spelled otherwise they are."""
    names = make_folder(tmp_path / "images", [{"tag": "colors", "prompt": "a dog", "include": [one("dog")]}])
    monkeypatch.setattr(HFDetector, "detect", lambda *_: [])
    for which in weights:
        shutil.copytree(which, tmp_path / which.name)
    model, clip = (tmp_path / which.name for which in weights)

    def scored(detector: str) -> int:
        return score_geneval(tmp_path / "images", tmp_path / "out", HFDetector.load(detector, str(clip))).images

    assert scored(str(model)) == len(names)
    monkeypatch.chdir(tmp_path)
    assert scored(model.name) == len(names)
    for folder, other in ((model, "detector weights"), (clip, "clip weights")):
        state = load_file(folder / "model.safetensors")
        save_file({k: v + 1 for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"other settings \(.*{other}.*\); give another folder"):
            scored(str(model))


def test_colours_are_clips_nearest_mean_of_templates(weights: tuple[Path, Path], tmp_path: Path) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(weights[1]).eval(), AutoTokenizer.from_pretrained(weights[1])
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    boxes = [(0, 0, 20, 20), (10, 5, 40, 30), (3, 9, 8, 12)]
    texts = [[f"a photo of a {c} dog", f"a photo of a {c}-colored dog", f"a photo of a {c} object"] for c in COLORS]
    with torch.no_grad():  # CLIP's own forward: unit vectors of a batch of texts and images
        tokens = tokenizer(sum(texts, []), padding=True, return_tensors="pt")
        crops = [normalized(center_square(Image.open(path).crop(b), 16)) for b in boxes]
        out = model(**tokens, pixel_values=torch.stack(crops))
        means = out.text_embeds.reshape(10, 3, -1).mean(1)
        similar = out.image_embeds @ (means / means.norm(dim=-1, keepdim=True)).T
    found = [Detection("dog", 1, b) for b in boxes]
    assert detector.colors(path, "dog", found) == [COLORS[i] for i in similar.argmax(1)]
    assert torch.allclose(detector.clip.texts(sum(texts, [])), out.text_embeds, atol=1e-5)
    assert torch.allclose(detector.clip.images(torch.stack(crops)), out.image_embeds, atol=1e-5)


def test_weights_that_are_not_there_are_named(weights: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="GenEval's detector: .*absent cannot be loaded .* put config.json") as error:
        HFDetector.load(str(tmp_path / "absent"), str(weights[1]))
    assert "\n" not in str(error.value)
    half = tmp_path / "half"
    half.mkdir()
    state = load_file(weights[1] / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    (half / "config.json").write_bytes((weights[1] / "config.json").read_bytes())
    with pytest.raises(ValueError, match="lacks 1 weights of CLIPModel, visual_projection.weight"):
        HFDetector.load(str(weights[0]), str(half))


def test_a_detector_of_other_classes_is_refused(weights: tuple[Path, Path]) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    with pytest.raises(ValueError, match="80 classes; expected COCO's 2"):
        HFDetector(detector.model, Clip(tiny_clip(), clip_tokenizer()), classes=("cat", "dog"))


def test_an_image_that_cannot_be_read_is_named(weights: tuple[Path, Path], tmp_path: Path) -> None:
    detector = HFDetector.load(str(weights[0]), str(weights[1]))
    make_folder(tmp_path / "images", [{"tag": "colors", "prompt": "", "include": [one("dog")]}])
    (tmp_path / "images" / "00000" / "samples" / "0000.png").write_text("text")
    with pytest.raises(ValueError, match=r"0000.png cannot be read as an image"):
        score_geneval(tmp_path / "images", tmp_path / "out", detector)
    assert not (tmp_path / "out" / benchmark.RESULTS).exists()
