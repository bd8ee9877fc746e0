"""The images of flow-matching backbones at several numbers of steps, drawn once and kept: stopped, it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emf.analyze.bootstrap import Interval, bootstrap
from emf.analyze.choices import Sampling
from emf.config import read
from emf.evaluate.digits_scorer import Scorer
from emf.files import open_image, whole_file
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import SMALL_AT_ONCE, Settings
from emf.show.progress import track
from emf.weights.checkpoints import at_newest
from emf.weights.converted import is_base
from emf.weights.folders import load, text_parts

Picture = Callable[[str, int, int], Image.Image]
"""(backbone, steps, number of the prompt) -> its image."""


@dataclass(frozen=True)
class Backbones:
    """Backbones by name, and what all of them draw."""

    runs: Mapping[str, Path]
    stamps: Mapping[str, str]
    """By name: what tells a backbone's weights from others."""
    sampling: Sampling
    texts: list[str]
    out: Path

    @property
    def counts(self) -> list[int]:
        """Numbers of steps, from low to high."""
        return sorted({*self.sampling.steps})

    @property
    def settings(self) -> Settings:
        """What the sampler is asked for, but the number of steps."""
        s = self.sampling
        return Settings(guidance=s.guidance, seed=s.seed, average=False, batch=s.batch)

    def folder(self, name: str) -> Path:
        """Where a backbone's images are kept: those of other weights under the same name lie elsewhere."""
        return self.out / "images" / f"{name}-{hashlib.sha256(self.stamps[name].encode()).hexdigest()[:8]}"

    def draw_digits(self, specs: list[Any]) -> tuple[Picture, dict[str, dict[int, Interval]]]:
        """(pictures, scores): the overall score is the mean of the tasks' shares of right images, its interval over
        images, task by task. A file STEPS.npy a number of steps."""
        scorer, kept = Scorer.fit(), {}
        scores: dict[str, dict[int, Interval]] = {name: {} for name in self.runs}
        networks: dict[str, Any] = {}
        for name, n in track([(name, n) for name in self.runs for n in self.counts], "sampling"):
            file = self.folder(name) / f"{n}.npy"
            if not file.exists():
                if name not in networks:
                    networks[name] = load(self.runs[name])
                config, network = networks[name]
                how = replace(self.settings, steps=n, batch=SMALL_AT_ONCE)
                drawn = Sampler(config, network, source=self.runs[name]).images(self.texts, how).numpy()
                with whole_file(file) as part, part.open("wb") as opened:
                    np.save(opened, drawn)
            images = np.load(file)
            rows = scorer.score(images, specs)["images"]
            scores[name][n] = bootstrap([float(row["correct"]) for row in rows], [row["tag"] for row in rows])
            kept[name, n] = to_uint8(images)
        return (lambda name, n, i: Image.fromarray(kept[name, n][i])), scores

    def draw(self, vae: Path | None, text: Path | None, dtype: str, device: str) -> Picture:
        """Every image as a PNG file STEPS/00000.png, those that are not there yet."""
        batch, every = self.sampling.batch, range(len(self.texts))
        for name, folder in self.runs.items():
            missing = {n: [i for i in every if not self._file(name, n, i).exists()] for n in self.counts}
            jobs = [(n, left[j : j + batch]) for n, left in missing.items() for j in range(0, len(left), batch)]
            if not jobs:
                continue
            sampler = Sampler.load(folder, vae, dtype, device, flow_matching=True, text=text)
            check_flow_matching(folder, sampler.config.objective)
            for n, part in track(jobs, f"sampling, {name}"):
                pictures = sampler.pictures([self.texts[i] for i in part], self.settings, numbers=part, steps=n)
                for i, picture in zip(part, pictures, strict=True):
                    with whole_file(self._file(name, n, i)) as file:
                        picture.save(file, "png")
        return lambda name, n, i: open_image(self._file(name, n, i))

    def _file(self, name: str, n: int, i: int) -> Path:
        return self.folder(name) / str(n) / f"{i:05d}.png"


def draws_digits(folder: Path) -> bool:
    """Whether a backbone draws the digits' world. Raises ValueError where it is a run of another objective."""
    if (folder / "model_index.json").is_file():
        return bool(text_parts(folder)["kind"] == "small")
    if is_base(folder):
        return False
    tree = at_newest(folder, lambda checkpoint: read(checkpoint / "config.json"))
    check_flow_matching(folder, tree.get("objective"))
    return bool(tree.get("condition", {}).get("kind", "small") == "small")


def check_flow_matching(folder: Path, objective: str | None) -> None:
    """Raises ValueError where a backbone was trained for another objective."""
    if objective != "flow_matching":
        raise ValueError(
            f"analyze: {folder} was trained for MeanFlow; the comparison is of flow-matching backbones, before EMF"
        )
