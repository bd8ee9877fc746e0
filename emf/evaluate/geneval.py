"""GenEval (arXiv 2310.11513): a folder of images in the benchmark's own layout, scored by its rules on a detector.

<root>/00000/metadata.jsonl (one JSON object), <root>/00000/samples/0000.png ...; a folder a prompt, four images each.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emf.data.digits import TAGS
from emf.device import AUTO
from emf.evaluate.benchmark import Result, Row, check_images, mean, score_images, stamps, write_results
from emf.evaluate.detector import CLASSES, Detector, HFDetector, RecordedDetector
from emf.evaluate.network_names import CLIP, MASK2FORMER
from emf.evaluate.rules import Detection, check_metadata, evaluate, select
from emf.files import files_in, read_json

PROMPTS, IMAGES = 553, 4
"""Of the benchmark; images of each prompt."""


def read_folder(root: Path, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """File name, relative to root -> metadata, of every image. Raises ValueError where something is missing."""
    folders = [p for p in files_in(root, "[0-9]*") if p.is_dir() and p.name.isdigit()]
    if not folders:
        raise ValueError(
            f"{root} holds no prompts; expected folders 00000, 00001, ... with metadata.jsonl and samples/"
        )
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        file = folder / "metadata.jsonl"
        try:
            metadata = read_json(file)
        except ValueError as error:
            raise ValueError(f"{error}; expected the prompt's object of GenEval's metadata") from None
        check_metadata(metadata, classes, str(file))
        images = [p for p in files_in(folder / "samples", "*.png") if re.fullmatch(r"\d+\.png", p.name)]
        if not images:
            raise ValueError(f"{folder} holds no images; expected samples/0000.png, samples/0001.png, ...")
        found |= {p.relative_to(root).as_posix(): metadata for p in images}
    return found


def judge(metadata: dict[str, Any], path: Path, detector: Detector) -> Row:
    """An image's row: tag, prompt, correct, reason, metadata and details (both JSON strings).

    details: class -> [x0, y0, x1, y1, score] of every object looked at.
    """
    found = select(detector.detect(path), metadata["tag"])

    def colors(label: str, of: Sequence[Detection]) -> list[str | None]:
        return detector.colors(path, label, of)

    correct, reason = evaluate(metadata, found, colors=colors)
    details: dict[str, list[list[float]]] = {}
    for d in found:
        details.setdefault(d.label, []).append([*d.box, d.score])
    return {
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }


def summarize(rows: Sequence[Row]) -> tuple[float, dict[str, float]]:
    """(overall, share of correct images by tag); overall is the mean of the tags, not of the images."""
    tags = sorted({r["tag"] for r in rows}, key=lambda tag: (TAGS.index(tag) if tag in TAGS else len(TAGS), tag))
    by_tag = {tag: mean(float(r["correct"]) for r in rows if r["tag"] == tag) for tag in tags}
    return mean(by_tag.values()), by_tag


def shares(rows: Sequence[Row]) -> dict[str, float]:
    """Shares over everything, as the official summary names them beside the overall score."""
    by_prompt: dict[str, list[bool]] = {}
    for r in rows:
        by_prompt.setdefault(r["metadata"], []).append(r["correct"])
    return {
        "correct images": mean(float(r["correct"]) for r in rows),
        "prompts with a correct image": mean(float(any(c)) for c in by_prompt.values()),
    }


def incomplete(names: Sequence[str], tags: Sequence[str]) -> list[str]:
    """What the folder lacks of the whole benchmark, a sentence each."""
    images = Counter(n.split("/")[0] for n in names)
    said = []
    if len(images) != PROMPTS:
        said.append(f"{len(images)} prompts instead of {PROMPTS}")
    if set(images.values()) != {IMAGES}:
        said.append(f"{min(images.values())} to {max(images.values())} images a prompt instead of {IMAGES}")
    missing = [tag for tag in TAGS if tag not in tags]
    if missing:
        said.append(f"overall is the mean of {len(tags)} tasks; no image for {', '.join(missing)}")
    return said


def settings_of(detector: Detector) -> dict[str, Any]:
    """What scores depend on beside the images."""
    return {"benchmark": "GenEval", **detector.settings}


def score_geneval(root: Path, out: Path, detector: Detector, *, name: str = "", steps: int | None = None) -> Result:
    """Score a folder; scored.jsonl, results.json and results.md in `out`. A killed run goes on where it was.

    name, steps: what the images are of, for the table. Raises ValueError on a folder that is not in GenEval's layout.
    """
    work = read_folder(root, detector.classes)

    def score(names: Sequence[str]) -> list[Row]:
        return [judge(work[n], root / n, detector) for n in names]

    settings = settings_of(detector)
    rows = score_images(out, root, settings, stamps({n: (root / n, work[n]) for n in work}), score)
    overall, by_tag = summarize(rows)
    deviations = [*detector.deviations, *incomplete(list(work), list(by_tag))]
    result = Result(
        benchmark="GenEval",
        label=detector.label,
        name=name or root.name,
        steps=steps,
        overall=overall,
        tables={"task": by_tag, "over all tasks": shares(rows)},
        images=len(rows),
        settings=settings,
        deviations=deviations,
    )
    write_results(out, result)
    return result


@dataclass(frozen=True)
class GenEval:
    """GenEval and its detector, loaded once for however many folders are scored; a benchmark.Benchmark."""

    detector: Detector

    @classmethod
    def load(
        cls, detector: str = MASK2FORMER, clip: str = CLIP, detections: Path | None = None, device: str = AUTO
    ) -> GenEval:
        """With Mask2Former and CLIP (folders or Hub names), or with a file of recorded detections. Raises ValueError,
        saying what to put where."""
        return cls(RecordedDetector(detections) if detections else HFDetector.load(detector, clip, device))

    @property
    def label(self) -> str:
        return self.detector.label

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.detector)

    @property
    def result_settings(self) -> dict[str, Any]:
        """See benchmark.Benchmark."""
        return self.settings

    def check(self, files: Sequence[str]) -> None:
        """See benchmark.Benchmark."""
        if isinstance(self.detector, RecordedDetector):
            self.detector.check(files)

    def score(self, images: Path, out: Path, *, name: str = "", steps: int | None = None) -> Result:
        """See score_geneval."""
        return score_geneval(images, out, self.detector, name=name, steps=steps)


def run_geneval(images: Path, out: Path, *, name: str = "", steps: int | None = None, **networks: Any) -> Result:
    """score_geneval on what GenEval.load makes of `networks`; the images are looked at before."""
    check_images(images)
    read_folder(images, CLASSES)
    return GenEval.load(**networks).score(images, out, name=name, steps=steps)
