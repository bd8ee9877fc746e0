"""What a visitor sees of a drawing, without the browser: the pictures side by side, the files, what was refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from PIL import Image

from emf.app.studio import Asked, Column, Studio, Way, zipped
from emf.errors import no_memory
from emf.sample.sampling_settings import SEEDS
from emf.show import page
from emf.show.page import Html

KEPT = 60
"""Pictures of a visit that are shown below the newest; of older drawings the files go too."""
DRAWING = "drawing-"
"""A drawing's folder begins so."""

Drawings = list[list[str]]
"""A visit's drawings, the newest first: the files of each."""


@dataclass(frozen=True)
class Shown:
    """The page after another picture."""

    html: Html
    pack: Path | None = None
    """The pictures in one file, when all are drawn."""
    drawings: Drawings | None = None
    """All of the visit, when all are drawn."""


@dataclass(frozen=True)
class Desk:
    """Where a studio's drawings are asked for. folder: they are written in new folders in it."""

    studio: Studio
    folder: Path

    def draw(
        self,
        caption: str,
        steps: Sequence[int],
        euler: Sequence[int],
        numbers: Sequence[float | None],
        before: Drawings,
    ) -> Iterator[Shown]:
        """A drawing, column by column. numbers: guidance, seed, and how many pictures, as they stand in the fields;
        None in an empty one. What is wrong with them is shown, and not raised."""
        columns: list[Column] = []
        try:
            guidance, seed, n = numbers
            if seed is None or seed != int(seed):
                raise ValueError(f"app: seed {seed}; expected a whole number from 0 to {SEEDS - 1}")
            asked = Asked(caption, tuple(steps), tuple(euler), guidance, int(seed), int(n or 0))
            yield Shown(drawn(self.studio, asked, columns))
            out = Path(mkdtemp(prefix=DRAWING, dir=self.folder))
            for column in self.studio.draw(asked, out):
                columns.append(column)
                yield Shown(drawn(self.studio, asked, columns))
            files = [str(file) for column in columns for file in column.files]
            yield Shown(drawn(self.studio, asked, columns), zipped(asked, out), self.kept([files, *before]))
        except (ValueError, RuntimeError, MemoryError) as error:
            if not isinstance(error, ValueError) and not no_memory(error):
                raise
            yield Shown(refused(error))

    def kept(self, drawings: Drawings) -> Drawings:
        """The newest of the drawings, at most KEPT pictures and at least one drawing; the files of the others go."""
        total = 0
        for place, files in enumerate(drawings):
            total += len(files)
            if place and total > KEPT:
                self.forget(drawings[place:])
                return drawings[:place]
        return drawings

    def forget(self, drawings: Drawings) -> None:
        """The files of drawings go, with their folders: of those that a drawing made here, and of no other."""
        mine = {file.resolve() for file in self.folder.glob(f"{DRAWING}*") if file.is_dir() and not file.is_symlink()}
        for place in {Path(files[0]).parent.resolve() for files in drawings if files} & mine:
            shutil.rmtree(place, ignore_errors=True)


def name_of(studio: Studio) -> str:
    return studio.run.resolve().name


def header(studio: Studio) -> Html:
    """What is drawn with, as the head of a report."""
    config, dtype = studio.sampler.config, str(studio.sampler.dtype).removeprefix("torch.")
    told = {
        "Trained": f"recipe {config.recipe}, {'EMF (MeanFlow)' if studio.few_step else 'flow matching alone'}",
        "Draws": f"pictures of {studio.side} x {studio.side} on {studio.sampler.device}, the transformer in {dtype}",
    }
    lead = "One caption and one noise, drawn in few steps and in many, side by side."
    return Html(f'<h1>{page.words(name_of(studio))}</h1><p class="lead">{page.words(lead)}</p>{page.facts(told)}')


def took(column: Column, n: int) -> str:
    """A picture's latency by stage."""

    def time(seconds: float) -> str:
        return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"

    parts = ", ".join(f"{stage} {time(seconds)}" for stage, seconds in column.seconds.items())
    whole = f"{time(sum(column.seconds.values()))}{' each' * (n > 1)}: {parts}"
    return f"{whole}; with start-up" if column.first else whole


def drawn(studio: Studio, asked: Asked, columns: Sequence[Column]) -> Html:
    """Ways of sampling across, pictures down; those that are not drawn yet are places."""
    ready: dict[Way, Column] = {column.way: column for column in columns}
    made = []
    for row in range(asked.n):
        number = f", picture {row + 1}" if asked.n > 1 else ""
        for way in asked.ways:
            if column := ready.get(way):
                alt = f"{asked.caption}: {way.name}, seed {asked.seed}{number}"
                inside, below = page.picture(column.files[row].read_bytes(), alt), took(column, asked.n)
            else:
                inside, below = Html('<div class="waiting">drawing …</div>'), ""
            made.append(page.figure(way.method, way.count + number, inside, below))
    notes = [page.note(text) for text in dict.fromkeys(column.note for column in columns if column.note)]
    commands = "\n".join(studio.command(asked, way) for way in asked.ways)
    same = page.folded("The same pictures from the command line", Html(f"<pre>{page.words(commands)}</pre>"))
    kind = "drawn pixels" if studio.pixels else "drawn"
    title = f'<h2 dir="auto">{page.words(asked.caption)}</h2>'
    grid = f'<div style="--columns:{len(asked.ways)}">{page.figures(made)}</div>'
    return Html(f'<div class="{kind}">{title}{grid}{"".join(notes)}{same}</div>')


def refused(error: BaseException) -> Html:
    """Why nothing was drawn."""
    needed = no_memory(error)
    told = f"The memory is full ({needed}); draw fewer pictures at once." if needed else str(error)
    return Html(f'<p class="missing" role="alert">{page.words(told)}</p>')


def said(file: Path) -> str:
    """A picture's line in the gallery, of what its file says."""
    with Image.open(file) as image:
        told = getattr(image, "text", {})
    way = Way(int(told["steps"]), told["flow_matching"] == "True")
    return f"{way.name} · seed {told['seed']} · {told['prompt']}"
