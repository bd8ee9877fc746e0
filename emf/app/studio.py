"""What the app draws, without the browser: what was asked for, the ways of sampling, the pictures and their times.

The pictures are those of `emf generate`: of the same sampler, seeds and files.
"""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emf.config import Scale
from emf.files import whole_file
from emf.sample.picture_files import words_of, write_images
from emf.sample.sampler import Sampler
from emf.sample.sampling_settings import Settings

FEW = (1, 2, 4, 8)
"""Numbers of steps that EMF is offered at."""
EULER = (1, 2, 4, 8, 30)
"""Numbers of steps that flow matching is offered at."""
MOST = 16
"""Pictures of a caption in one drawing."""


@dataclass(frozen=True)
class Way:
    """A way of sampling, which is a column of the page."""

    steps: int
    flow_matching: bool = False

    @property
    def method(self) -> str:
        return "Flow matching" if self.flow_matching else "EMF"

    @property
    def count(self) -> str:
        return f"{self.steps} step{'s' * (self.steps > 1)}"

    @property
    def name(self) -> str:
        return f"{self.method}, {self.count}"


@dataclass(frozen=True)
class Asked:
    """A caption, and how it shall be drawn. Raises ValueError on what cannot be."""

    caption: str
    steps: tuple[int, ...] = FEW
    """Of EMF, a column each."""
    euler: tuple[int, ...] = ()
    """Of flow matching, a column each."""
    guidance: float | None = None
    seed: int = 0
    n: int = 1
    """Pictures of the caption, a row each."""

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise ValueError("app: the caption is empty; write what the picture shall show")
        if not 1 <= self.n <= MOST:
            raise ValueError(f"app: {self.n} pictures; expected 1 to {MOST}")
        if not self.ways:
            raise ValueError("app: no number of steps is chosen; choose one at least")
        for way in self.ways:
            Settings(way.steps, self.guidance, self.seed)

    @property
    def ways(self) -> list[Way]:
        return [*(Way(n) for n in sorted({*self.steps})), *(Way(n, True) for n in sorted({*self.euler}))]


@dataclass(frozen=True)
class Column:
    """What a way of sampling gave."""

    way: Way
    files: list[Path]
    """PNG files, a row each, whose text says how they were drawn."""
    seconds: dict[str, float]
    """What each stage took of a picture: text, transformer, decoder; a share of what was computed together."""
    first: bool
    """So many pictures were drawn with this network for the first time: start-up counts in."""
    note: str
    """Whose velocity was sampled, where that is not plainly the run's."""


class Studio:
    """A run or an export, ready to draw. Flow matching's network is read when it is first asked for: of a trained run
    that of its start, which is another one."""

    def __init__(
        self,
        run: Path,
        vae: Path | None = None,
        dtype: str | None = None,
        device: str | None = None,
        *,
        text: Path | None = None,
        ar: str | None = None,
        scale: Scale | None = None,
    ) -> None:
        """See Sampler.load. Raises ValueError and NotFinite as it does."""
        self.run = run
        self._told: dict[str, Any] = {"vae": vae, "text": text, "scale": scale}
        self._told |= {"dtype": dtype, "device": device}
        self.sampler = Sampler.load(run, flow_matching=None, ar=ar, **self._told)
        self._engine = {"ar" if ar == "vllm" else "ar-server": ar}
        self._euler: Sampler | None = None if self.few_step else self.sampler
        self._seen: set[tuple[bool, int]] = set()

    @property
    def few_step(self) -> bool:
        """Trained for few steps; else for flow matching alone."""
        return self.sampler.settings.average

    @property
    def digits(self) -> bool:
        """Of the digits' world, whose captions are of few words."""
        return self.sampler.config.condition.kind == "small"

    @property
    def pixels(self) -> bool:
        """Of a small world, the digits' or one of named pictures, which is drawn as pixels, without an autoencoder."""
        return self.sampler.autoencoder is None

    @property
    def side(self) -> int:
        """Pixels along a picture's side."""
        return self.sampler.config.transformer.sample_size * self.sampler.scale

    def euler(self) -> Sampler:
        """What flow matching is sampled with. Raises ValueError where it cannot be read."""
        if self._euler is None:
            self._euler = Sampler.load(self.run, flow_matching=True, beside=self.sampler, **self._told)
        return self._euler

    def draw(self, asked: Asked, out: Path) -> Iterator[Column]:
        """The columns of a drawing, each when it is done, and its pictures in the folder `out`.

        Raises ValueError on a caption that the text encoder cannot read and on EMF's steps where the run was trained
        for flow matching alone; NotFinite on pictures that hold NaN or inf."""
        if asked.steps and not self.few_step:
            raise ValueError(f"app: {self.run} was trained for flow matching alone; choose steps of flow matching")
        self.sampler.check_captions([asked.caption])
        captions = [asked.caption] * asked.n
        guidance = self.sampler.guidance if asked.guidance is None else asked.guidance
        for way in asked.ways:
            sampler = self.euler() if way.flow_matching else self.sampler
            sampler.seconds.clear()
            images = sampler.images(captions, steps=way.steps, guidance=guidance, seed=asked.seed)
            each = {stage: took / asked.n for stage, took in sampler.seconds.items()}
            told: dict[str, Any] = dict(steps=way.steps, guidance=guidance, seed=asked.seed, run=str(self.run))
            told |= (
                sampler.told | dict(flow_matching=way.flow_matching) | ({"note": sampler.note} if sampler.note else {})
            )
            told |= {f"seconds_{stage}": round(took, 6) for stage, took in each.items()}
            files = write_images(images, captions, out, told, range(asked.n))
            kind = way.flow_matching, asked.n
            yield Column(way, files, each, kind not in self._seen, sampler.note)
            self._seen.add(kind)

    def command(self, asked: Asked, way: Way) -> str:
        """`emf generate` for the pictures of a column, the same bit for bit on the same machine."""
        guidance = self.sampler.guidance if asked.guidance is None else asked.guidance
        words = ["emf", "generate", asked.caption, "--run", str(self.run), "--out", "DIR", "--steps", str(way.steps)]
        words += ["--guidance", repr(float(guidance)), "--seed", str(asked.seed)]
        words += ["-n", str(asked.n)] * (asked.n > 1) + ["--flow-matching"] * way.flow_matching
        for name, value in (self._told | self._engine).items():
            words += [f"--{name}", str(value)] if value not in (None, "auto") else []
        return shlex.join(words)


def zipped(asked: Asked, folder: Path) -> Path:
    """A drawing's pictures and their manifest.jsonl as one file in its folder, which the caption names."""
    out = folder / f"{words_of(asked.caption) or 'pictures'}_seed_{asked.seed}.zip"
    with whole_file(out) as part, zipfile.ZipFile(part, "w") as packed:
        for file in sorted([*folder.glob("*.png"), *folder.glob("*.jsonl")]):
            packed.write(file, f"{out.stem}/{file.name}")
    return out
