"""`emf evaluate`: what its commands do, one function each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from emf.evaluate.drawing import Drawing
from emf.sample.sampling_settings import GUIDANCE

RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
Images = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[IMAGES]")]
Draw = Annotated[Drawing, tyro.conf.arg(name="")]
NOTHING = Drawing()


def on_digits(run: RunFolder, per_tag: int = 50, guidance: float = GUIDANCE, seed: int = 0) -> None:
    """Score a run: scores.json and samples.png in its folder, few-step EMF beside flow matching by the base it
    started from.

    Args:
        run: a run's folder
        per_tag: how many prompts to draw of each of the six tasks
        guidance: classifier-free guidance of every sampler
        seed: seed of the noise
    """
    from emf.evaluate.small_world import evaluate_run

    evaluate_run(run, per_tag, guidance, seed)


def geneval(
    out: Path,
    images: Images = None,
    prompts: Path | None = None,
    *,
    draw: Draw = NOTHING,
    detections: Path | None = None,
    detector: str = "facebook/mask2former-swin-small-coco-instance",
    clip: str = "openai/clip-vit-large-patch14",
    device: str = "cpu",
    name: str = "",
) -> None:
    """GenEval's rules on a folder of images in its own layout, or on images drawn from --checkpoint first; goes on
    where it was stopped.

    Args:
        out: folder for scored.jsonl, results.json and results.md; of images drawn, a folder in it by number of steps
        images: folders 00000, 00001, ... with metadata.jsonl and samples/0000.png, ...
        prompts: evaluation_metadata.jsonl, to draw from
        detections: a jsonl of recorded detections, instead of a detector
        detector: folder or Hub name of a Mask2Former
        clip: folder or Hub name of a CLIP, for colours
        device: where to compute, cpu or cuda
        name: what the table calls the model that is scored
    """
    from emf.evaluate.geneval import run_geneval
    from emf.evaluate.pictures import geneval_items

    def score(folder: Path, here: Path, name: str, steps: int | None) -> Any:
        networks: Any = dict(detector=detector, clip=clip, detections=detections, device=device)
        return run_geneval(folder, here, **networks, name=name, steps=steps)

    _run(images, out, draw, score, device=device, name=name, items=lambda: geneval_items(prompts))


def dpg(
    out: Path,
    images: Images = None,
    prompts: Path | None = None,
    questions: Path | None = None,
    *,
    draw: Draw = NOTHING,
    answers: Path | None = None,
    vqa: str = "Salesforce/blip-vqa-base",
    resolution: int | None = None,
    skip_first_row: bool = True,
    last_crop_categories: bool = True,
    device: str = "cpu",
    name: str = "",
) -> None:
    """DPG-Bench on a folder of 2 x 2 grids, or on grids drawn from --checkpoint first; goes on where it was stopped.

    Args:
        out: folder for scored.jsonl, results.json and results.md; of images drawn, a folder in it by number of steps
        images: one ITEM.png a prompt, four images in a grid
        prompts: the folder of the benchmark's texts, ITEM.txt, to draw from
        questions: dpg_bench.csv, to score by
        answers: a jsonl of recorded answers, instead of a network
        vqa: folder or Hub name of a BLIP for visual question answering; not comparable to the official mPLUG
        resolution: pixels along a side of one of the four; default: half of the grid's
        skip_first_row: leave out the first row of the questions, as the official script does
        last_crop_categories: score categories from the last crop's answers alone, as the official tables do
        device: where to compute, cpu or cuda
        name: what the table calls the model that is scored
    """
    from emf.evaluate.dpg import Quirks, run_dpg
    from emf.evaluate.pictures import dpg_items

    quirks = Quirks(skip_first_row, last_crop_categories)
    if questions is None and not draw.images_only:
        raise ValueError("DPG-Bench: it is scored by --questions, dpg_bench.csv of its repository")

    def score(folder: Path, here: Path, name: str, steps: int | None) -> Any:
        assert questions is not None
        how: Any = dict(vqa=vqa, answers=answers, quirks=quirks, resolution=resolution, device=device)
        return run_dpg(folder, here, questions, **how, name=name, steps=steps)

    _run(images, out, draw, score, device=device, name=name, items=lambda: dpg_items(prompts))


def hps(
    out: Path,
    images: Images = None,
    prompts: Path | None = None,
    weights: Path | None = None,
    *,
    draw: Draw = NOTHING,
    tokenizer: str = "openai/clip-vit-large-patch14",
    half: bool = False,
    device: str = "cpu",
    name: str = "",
) -> None:
    """HPSv2.1 on a folder of images by style, or on images drawn from --checkpoint first; goes on where it was stopped.

    Args:
        out: folder for scored.jsonl, results.json and results.md; of images drawn, a folder in it by number of steps
        images: folders anime, concept-art, paintings, photo with 00000.jpg, ...
        prompts: the benchmark's folder with <style>.json; default: from the Hub, zhwang/HPDv2
        weights: HPS_v2.1_compressed.pt, to score by
        tokenizer: folder or Hub name of a CLIP tokenizer
        half: compute in float16, as the official script on a GPU
        device: where to compute, cpu or cuda
        name: what the table calls the model that is scored
    """
    from emf.evaluate.hps import check_styles, check_weights, run_hps
    from emf.evaluate.pictures import hps_items, hps_prompts

    if weights is None and not draw.images_only:
        raise ValueError("HPSv2.1: it is scored by --weights, HPS_v2.1_compressed.pt of xswu/HPSv2 on the Hub")
    if draw.limit is not None and not draw.images_only:
        raise ValueError("HPSv2.1: it is scored on all prompts; --limit needs --images-only")
    _check_source(images, draw)
    if images is not None:  # the user's own files, before the prompts are looked for on the Hub
        check_styles(images)
    if weights is not None:
        check_weights(weights)
    texts = hps_prompts(prompts)

    def score(folder: Path, here: Path, name: str, steps: int | None) -> Any:
        assert weights is not None
        return run_hps(
            folder, here, texts, weights, tokenizer=tokenizer, half=half, device=device, name=name, steps=steps
        )

    _run(images, out, draw, score, device=device, name=name, items=lambda: hps_items(texts))


def _check_source(images: Path | None, drawing: Drawing) -> None:
    """Raises ValueError where it is not said, or said twice, which images are to be scored."""
    if (images is None) == (drawing.checkpoint is None):
        raise ValueError("evaluate: give a folder of images, or --checkpoint to draw them from")


def _run(
    images: Path | None,
    out: Path,
    drawing: Drawing,
    score: Callable[[Path, Path, str, int | None], Any],
    *,
    device: str,
    name: str,
    items: Callable[[], tuple[Any, dict[str, str]]],
) -> None:
    """Score a folder of images, or draw them first."""
    _check_source(images, drawing)
    if images is not None:
        counts = drawing.counts
        results = [score(images, out, name, counts[0] if len(counts) == 1 else None)]
    else:
        from emf.evaluate.pictures import draw_and_score

        assert drawing.checkpoint is not None
        called = name or drawing.checkpoint.resolve().name
        results = draw_and_score(*items(), out, drawing, device=device, score=score, name=called)
    for r in results:
        told = "" if r.steps is None else f", steps {r.steps}"
        print(f"{r.label}{told}: {r.overall:.4g} over {r.images} images")
    if results:
        print(f"open {out / 'results.md'}")
