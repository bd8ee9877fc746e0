"""Detectors for GenEval: recorded detections, or Mask2Former and CLIP through transformers
(arXiv 2310.11513; djghosh13/geneval, evaluation/)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emf.data.digits import COLORS
from emf.device import AUTO
from emf.device import device as find_device
from emf.evaluate.benchmark import stamp
from emf.evaluate.clip import Clip, center_square, normalized, pretrained
from emf.evaluate.network_names import CLIP, MASK2FORMER
from emf.evaluate.rules import SCORE, Detection
from emf.files import numbered_jsonl, open_image, place_or_name
from emf.weights.tensors import module_stamp

TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GREY = "#999"
"""What surrounds an object whose colour is asked."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# COCO's 80 classes in the order of the detector's outputs, under GenEval's names
CLASSES = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,
knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,
dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
)


class Detector(Protocol):
    """What GenEval's rules need; knows nothing of prompts or tags."""

    label: str
    """What the benchmark is called when it is scored with it."""
    classes: Sequence[str]
    settings: dict[str, Any]
    """What its answers depend on."""
    deviations: list[str]

    def detect(self, path: Path) -> list[Detection]:
        """All objects of an image file that could count for any tag."""

    def colors(self, path: Path, label: str, found: Sequence[Detection]) -> list[str | None]:
        """The colour of each of these objects of class `label`; asked only where a rule needs it."""


class RecordedDetector:
    """Detections from a jsonl file: {"filename", "detections": [{"label", "score", "box"[, "color"]}]} a line.

    file: names are those of GenEval's layout, 00000/samples/0000.png. Raises ValueError where the file is not so, or
    lacks an image asked for.
    """

    label = "GenEval (recorded detections)"
    classes: Sequence[str] = CLASSES

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, list[Detection]] = {}
        for number, row in numbered_jsonl(file):
            try:
                self.found[row["filename"]] = [_detection(d) for d in row["detections"]]
            except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{file}:{number} lacks {error}; expected filename and detections of label, score, box"
                ) from None
            if any(not math.isfinite(x) for d in self.found[row["filename"]] for x in (d.score, *d.box)):
                raise ValueError(f"{file}:{number} has a score or a box of NaN or inf, which no rule can be asked of")
        self.settings = {"detections": stamp(file)}
        self.deviations = [
            f"detections were read from {file.name}, not made here; its detector decides what they are worth"
        ]

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError where an image has no line."""
        if lost := next((name for name in names if name not in self.found), None):
            raise ValueError(f"{self.file} has no line for {lost}; expected one for every image")

    def detect(self, path: Path) -> list[Detection]:
        """See Detector."""
        name = "/".join(path.parts[-3:])
        self.check([name])
        return self.found[name]

    def colors(self, path: Path, label: str, found: Sequence[Detection]) -> list[str | None]:
        """See Detector: as recorded."""
        return [d.color for d in found]


def _detection(row: dict[str, Any]) -> Detection:
    label, color = row["label"], row.get("color")
    if not isinstance(label, str) or not isinstance(color, str | None):
        raise ValueError("a label or a colour that is text")
    return Detection(label, float(row["score"]), _box(row["box"]), color)


def _box(sides: Sequence[float]) -> tuple[float, float, float, float]:
    return float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])


@dataclass(frozen=True)
class Views:
    """Geometry of the detector's input and the number of its answers: mmdet's for this network."""

    long: int = 1333
    """Pixels that the longer side may have."""
    short: int = 800
    """Pixels that the shorter side may have."""
    multiple: int = 32
    """The padded sides are multiples of it."""
    top: int = 100
    """(query, class) pairs looked at, the most probable."""
    least: float = SCORE
    """Class probability below which a pair is not worth a mask: no score can exceed it."""


@dataclass
class HFDetector:
    """Mask2Former and CLIP with pre- and post-processing as in GenEval's official code, not as in their processors.

    Use HFDetector.load().
    """

    model: Any
    """Mask2FormerForUniversalSegmentation, instance segmentation of COCO's 80 classes."""
    clip: Clip
    settings: dict[str, Any] = field(default_factory=dict)
    views: Views = field(default_factory=Views)
    classes: Sequence[str] = CLASSES
    label: str = "GenEval (HF detector)"

    def __post_init__(self) -> None:
        if len(self.model.config.id2label) != len(self.classes):
            raise ValueError(
                f"detector: it knows {len(self.model.config.id2label)} classes; expected COCO's {len(self.classes)}"
            )
        self._texts: dict[str, Tensor] = {}
        called = _shown(self.settings.get("detector", "a Mask2Former"))
        self.deviations = [
            f"the detector is {called} through transformers, not mmdet's "
            "training run: numbers labelled so are not interchangeable with official ones",
            "the counting task's threshold of 0.9 was chosen for mmdet's scores",
            "images are resized by torch (bilinear, rounded) instead of OpenCV, colours are classified in float32",
        ]

    @classmethod
    def load(cls, detector: str = MASK2FORMER, clip: str = CLIP, device: str = AUTO) -> HFDetector:
        """From folders or Hub names. Raises ValueError, saying what to put where."""
        from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

        place = find_device(device)
        model = pretrained(Mask2FormerForUniversalSegmentation, detector, "GenEval's detector").to(place)
        colors = pretrained(CLIPModel, clip, "GenEval's colour classifier").to(place)
        tokenizer = pretrained(AutoTokenizer, clip, "GenEval's colour classifier")
        told = {"detector": place_or_name(detector), "clip": place_or_name(clip)}
        told |= {"detector weights": module_stamp(model), "clip weights": module_stamp(colors)}
        return cls(model, Clip(colors, tokenizer), told)

    @torch.no_grad()
    def detect(self, path: Path) -> list[Detection]:
        """See Detector."""
        image = open_image(path)
        pixels, inner = detector_pixels(image, self.views)
        out = self.model(pixel_values=pixels[None].to(self.model.device))
        logits, masks = out.class_queries_logits[0].float(), out.masks_queries_logits[0].float()
        found = instances(logits, masks, tuple(pixels.shape[1:]), inner, (image.height, image.width), self.views)
        return [Detection(self.classes[k], score, box, mask=mask) for k, score, box, mask in found]

    def colors(self, path: Path, label: str, found: Sequence[Detection]) -> list[str | None]:
        """See Detector: CLIP, zero-shot, on each object cut out over grey."""
        image = open_image(path)
        crops = [normalized(center_square(cut_out(image, d), self.clip.size)) for d in found]
        similar = self.clip.images(torch.stack(crops)) @ self._classifier(label).T
        return [COLORS[i] for i in similar.argmax(1).tolist()]

    def _classifier(self, label: str) -> Tensor:
        """[10, E]: of each colour the mean of its templates' unit vectors, itself of unit length."""
        if label not in self._texts:
            texts = [t.format(color=color, label=label) for color in COLORS for t in TEMPLATES]
            means = self.clip.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._texts[label] = F.normalize(means, dim=-1)
        return self._texts[label]


def _shown(name: str) -> str:
    """A folder's or a Hub name as a page has it, which may be published: not where the folder lies."""
    return Path(name).name if Path(name).is_absolute() else name


def cut_out(image: Image.Image, d: Detection) -> Image.Image:
    """An object's box, what its mask leaves out painted grey."""
    if d.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(d.mask))
    return image.crop((int(d.box[0]), int(d.box[1]), int(d.box[2]), int(d.box[3])))


def detector_pixels(image: Image.Image, views: Views) -> tuple[Tensor, tuple[int, int]]:
    """(normalised pixels [3, H, W], padded right and below with zeros; (height, width) of the image inside)."""
    w, h = image.size
    scale = min(views.long / max(w, h), views.short / min(w, h))
    inner = int(h * scale + 0.5), int(w * scale + 0.5)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    pixels = F.interpolate(pixels[None], inner, mode="bilinear", align_corners=False)[0].round() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in IMAGENET)
    below, right = (-side % views.multiple for side in inner)
    return F.pad((pixels - mean) / std, (0, right, 0, below)), inner


def instances(
    logits: Tensor,
    masks: Tensor,
    padded: tuple[int, ...],
    inner: tuple[int, int],
    size: tuple[int, int],
    views: Views,
) -> list[tuple[int, float, tuple[float, float, float, float], np.ndarray]]:
    """(class, score, box, mask [H, W] bool) of the most probable (query, class) pairs whose mask is not empty.

    logits [Q, K + 1], the last class void; masks [Q, h, w], logits. padded, inner, size: (height, width) of the
    network's input, of the image inside it, and of the image. Score: class probability x mean mask probability inside
    the mask.
    """
    probabilities = logits.softmax(-1)[:, :-1]
    best, index = probabilities.flatten().topk(min(views.top, probabilities.numel()))
    found = []
    for p, i in zip(best.tolist(), index.tolist(), strict=True):
        if p <= views.least:
            continue
        query, k = divmod(i, probabilities.shape[1])
        logit = F.interpolate(masks[query][None, None], padded, mode="bilinear", align_corners=False)
        logit = logit[..., : inner[0], : inner[1]]
        logit = F.interpolate(logit, size, mode="bilinear", align_corners=False)[0, 0]
        mask = logit > 0
        if not mask.any():
            continue
        score = p * float((logit.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        ys, xs = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
        found.append((k, score, box, mask.cpu().numpy()))
    return found
