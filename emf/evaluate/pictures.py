"""Images of a benchmark's prompts from a checkpoint, in the layout that its scorer reads.

OUT/<steps>/images holds them, and drawing.json, which says how they were made. Each image depends on the checkpoint,
the settings and its number alone, up to the rounding that Sampler names: a run that was stopped goes on, and ranks
share the work without a word (RANK and WORLD_SIZE, as torchrun and the deepspeed launcher set them). What is there is
never drawn again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from emf.device import device as find_device
from emf.device import launched
from emf.evaluate.benchmark import ELSEWHERE, Benchmark, Result, check_outs, has_row, write_comparison
from emf.evaluate.drawing import Drawing
from emf.evaluate.hps import STYLES, read_prompts
from emf.evaluate.rules import check_metadata
from emf.files import (
    check_claim,
    check_writable,
    claim,
    files_in,
    numbered_jsonl,
    read_text,
    whole_file,
    whole_path,
    write_text,
)
from emf.sample.image_batches import Batch, batches_of
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import Settings
from emf.sample.token_engine import find_engine
from emf.show.progress import bars, say
from emf.weights.folders import weights_folder
from emf.weights.hub import named

IMAGES, SETTINGS = "images", "drawing.json"
PATIENCE = 1800  # seconds without a new image, after which rank 0 no longer waits for the others


@dataclass(frozen=True)
class Item:
    """A file to draw."""

    file: str
    """Relative to the folder of images."""
    prompt: str
    number: int
    """Of its first image, which seeds its noise."""
    grid: bool = False
    """Four images, 2 x 2, instead of one."""


def geneval_items(prompts: Path | None, classes: Sequence[str] = ()) -> tuple[list[Item], dict[str, str]]:
    """(four images of each prompt, files of text to write beside them) of evaluation_metadata.jsonl. classes: those
    that the images will be scored by; none: they will not be scored."""
    if prompts is None or not prompts.is_file():
        raise ValueError(
            f"GenEval: --prompts {prompts} is no file; expected evaluation_metadata.jsonl of its repository "
            "(djghosh13/geneval, prompts/)"
        )
    items, texts = [], {}
    for i, (number, row) in enumerate(numbered_jsonl(prompts)):
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"{prompts}:{number} has no prompt; expected GenEval's metadata")
        if classes:
            check_metadata(row, classes, f"{prompts}:{number}")
        texts[f"{i:05d}/metadata.jsonl"] = json.dumps(row) + "\n"
        items += [Item(f"{i:05d}/samples/{j:04d}.png", row["prompt"], 4 * i + j) for j in range(4)]
    if not items:
        raise ValueError(f"{prompts} holds no prompt; expected GenEval's metadata, one JSON object a line")
    return items, texts


def dpg_items(prompts: Path | None) -> tuple[list[Item], dict[str, str]]:
    """A grid for each text of DPG-Bench's prompts/."""
    files = [] if prompts is None else files_in(prompts, "*.txt")
    if not files:
        raise ValueError(
            f"DPG-Bench: --prompts {prompts} holds no texts; expected the folder dpg_bench/prompts of its repository "
            "(TencentQQGYLab/ELLA)"
        )
    texts = [read_text(file).strip() for file in files]
    if not all(texts):
        raise ValueError(f"DPG-Bench: {files[texts.index('')]} holds no prompt; expected a text")
    pairs = enumerate(zip(files, texts, strict=True))
    return [Item(f"{f.stem}.png", text, 4 * i, grid=True) for i, (f, text) in pairs], {}


def hps_items(prompts: Path | None) -> tuple[list[Item], dict[str, str]]:
    """An image for each prompt of the four styles; prompts: a folder with <style>.json."""
    items: list[Item] = []
    for style in STYLES:
        texts = read_prompts(prompts or Path(), style)
        items += [Item(f"{style}/{i:05d}.jpg", text, len(items) + i) for i, text in enumerate(texts)]
    return items, {}


def hps_prompts(prompts: Path | None) -> Path:
    """The folder with HPSv2's prompts: the one given, or from the Hub. Raises ValueError where that cannot be."""
    if prompts is not None:
        return prompts
    files = [f"benchmark/{style}.json" for style in STYLES]
    return named("zhwang/HPDv2", files, "HPSv2.1: --prompts (benchmark/ in it)", kind="dataset") / "benchmark"


def digest_of(items: Sequence[Item]) -> str:
    """Of the files of a benchmark with their prompts and numbers: other prompts have another one."""
    told = [(item.file, item.prompt, item.number, item.grid) for item in items]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def draw_pictures(
    items: Sequence[Item],
    texts: dict[str, str],
    out: Path,
    drawing: Drawing,
    device: str,
    *,
    prompts: str = "",
    beside: Sequence[int] = (),
) -> None:
    """This rank's share of what is missing, at every number of steps. prompts: digest of all of the benchmark's, where
    these items are not all. beside: the other numbers of steps that stand in the same table. Raises ValueError where
    `out` holds images of other settings or other prompts, and where those of a row beside were drawn so, or cannot be
    told."""
    assert drawing.checkpoint is not None
    rank, world = launched()
    todo: list[tuple[int, list[Item]]] = []
    for steps in drawing.counts:
        folder = out / str(steps) / IMAGES
        each = max(1, drawing.batch // 4) if items[0].grid else drawing.batch
        groups = [list(items[i : i + each]) for i in range(0, len(items), each)][rank::world]
        left = [[item for item in group if not (folder / item.file).is_file()] for group in groups]
        todo += [(steps, group) for group in left if group]
    d = drawing
    further: dict[str, Any] = dict(text=d.text, ar=d.engine, scale=d.scale)
    sampler = Sampler.load(drawing.checkpoint, d.vae, d.dtype, device, d.flow_matching, **further)
    sampler.check_captions([item.prompt for item in items])
    guidance = sampler.guidance if drawing.guidance is None else drawing.guidance
    told: dict[str, Any] = dict(checkpoint=str(whole_path(drawing.checkpoint)), prompts=prompts or digest_of(items))
    told |= sampler.stamps | {"step": sampler.step}
    told |= dict(dtype=str(sampler.dtype), flow_matching=d.flow_matching, seed=d.seed, guidance=guidance)
    told |= sampler.told
    if sampler.note and rank == 0:
        print(sampler.note, file=sys.stderr)
    how = replace(sampler.settings, guidance=guidance, seed=drawing.seed, batch=drawing.batch)
    for steps in beside:
        folder, who = out / str(steps) / IMAGES, f"{has_row(out, steps)}: "
        if not check_claim(folder, {**told, "steps": steps}, (), name=SETTINGS, who=who, advice=ELSEWHERE):
            raise ValueError(f"{who}{folder / SETTINGS} is not there, which says how it was drawn; {ELSEWHERE}")
    for steps in drawing.counts:
        folder = out / str(steps) / IMAGES
        own = [items[0].file, items[-1].file]
        claim(folder, {**told, "steps": steps}, own, name=SETTINGS, advice=ELSEWHERE, writer=rank)
        for name, text in texts.items():
            write_text(folder / name, text, rank)
    batches = [b for steps, group in todo for b in group_batches(group, replace(how, steps=steps))]
    left_over: list[Image.Image] = []
    files = iter([(steps, item) for steps, group in todo for item in group])

    def write(batch: Batch, images: Tensor) -> int:
        """Save the files that are whole with these images, without a wait for the next text stage; how many."""
        left_over.extend(Image.fromarray(x) for x in to_uint8(images))
        each = 4 if items[0].grid else 1
        whole = len(left_over) // each
        for _ in range(whole):
            steps, item = next(files)
            pictures = [left_over.pop(0) for _ in range(each)]
            save(out / str(steps) / IMAGES / item.file, grid(pictures) if item.grid else pictures[0], rank)
        return whole

    with bars() as progress:
        task = progress.add_task("drawing", total=sum(len(group) for _, group in todo))
        for written in sampler.draw(batches, write):
            progress.advance(task, written)
    if rank == 0:
        wait_for([out / str(steps) / IMAGES / item.file for steps in drawing.counts for item in items])


def group_batches(group: Sequence[Item], how: Settings) -> list[Batch]:
    """The batches that give the images of a group of files."""
    each = 4 if group[0].grid else 1
    captions = [item.prompt for item in group for _ in range(each)]
    return batches_of(captions, how, [item.number + j for item in group for j in range(each)])


def grid(four: Sequence[Image.Image]) -> Image.Image:
    """2 x 2, in reading order."""
    w, h = four[0].size
    whole = Image.new("RGB", (2 * w, 2 * h))
    for i, picture in enumerate(four):
        whole.paste(picture, (i % 2 * w, i // 2 * h))
    return whole


def save(file: Path, picture: Image.Image, rank: int) -> None:
    """A file that is there whole or not at all."""
    with whole_file(file, rank) as part:
        if file.suffix == ".jpg":
            picture.save(part, "jpeg", quality=95)
        else:
            picture.save(part, "png")


def wait_for(files: Sequence[Path]) -> None:
    """Until the other ranks have drawn their share. Raises ValueError where nothing comes for half an hour."""
    missing, last = [f for f in files if not f.is_file()], time.monotonic()
    if not missing:
        return
    with bars() as progress:
        task = progress.add_task("waiting for the other ranks", total=len(files))
        while missing:
            progress.update(task, completed=len(files) - len(missing))
            time.sleep(1)
            left = [f for f in missing if not f.is_file()]
            last = last if len(left) == len(missing) else time.monotonic()
            missing = left
            if time.monotonic() - last > PATIENCE:
                raise ValueError(f"evaluate: {len(missing)} images are missing, {missing[0]} the first; call it again")


def limited(items: Sequence[Item], texts: dict[str, str], limit: int | None) -> tuple[Sequence[Item], dict[str, str]]:
    """Those of the first so many prompts."""
    if limit is None:
        return items, texts
    kept = {*list(dict.fromkeys(item.prompt for item in items))[:limit]}
    items = [item for item in items if item.prompt in kept]
    folders = {item.file.split("/")[0] for item in items}
    return items, {file: text for file, text in texts.items() if file.split("/")[0] in folders}


def draw_and_score(
    items: Sequence[Item],
    texts: dict[str, str],
    out: Path,
    drawing: Drawing,
    *,
    device: str,
    load: Callable[[], Benchmark],
    name: str,
) -> list[Result]:
    """Draw, then on rank 0 score what `load` gives at every number of steps; results.json and results.md of all in
    `out`, and of those that stood there. None on the other ranks, and with images_only.

    Raises ValueError, before the first picture is drawn, where something that is needed for any of it is missing."""
    assert drawing.checkpoint is not None
    scores = launched()[0] == 0 and not drawing.images_only
    prompts = digest_of(items)
    items, texts = limited(items, texts, drawing.limit)
    weights_folder(drawing.checkpoint)
    place = find_device(device)
    check_writable(out)
    if drawing.engine is not None:
        find_engine(drawing.engine, place)
    counted = f"{len(items)} files of images in steps of {', '.join(map(str, drawing.counts))}"
    benchmark, beside = None, list[int]()
    if scores:
        say("evaluate: loading what scores the images")
        benchmark = load()
        benchmark.check([item.file for item in items])
        beside = check_outs(out, benchmark, name, {n: out / str(n) / IMAGES for n in drawing.counts})
    say(f"evaluate: drawing {counted} with {drawing.checkpoint}")
    draw_pictures(items, texts, out, drawing, device, prompts=prompts, beside=beside)
    if benchmark is None:
        return []
    results = []
    for n in drawing.counts:
        say(f"evaluate: scoring the images of {n} step{'s' * (n > 1)}")
        results.append(benchmark.score(out / str(n) / IMAGES, out / str(n), name=name, steps=n))
    write_comparison(out, results)
    return results
