"""`emf evaluate`: what its commands do, one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from emf.evaluate.drawing import Drawing
from emf.evaluate.network_names import BLIP, CLIP, MASK2FORMER, PICK, PICK_TOKENIZER
from emf.idle import refuse_idle, unless
from emf.limits import Within
from emf.sample.sampling_settings import GUIDANCE, Guidance, PerTag, Seed, Steps

RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
Images = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[IMAGES]")]
Draw = Annotated[Drawing, tyro.conf.arg(name="")]
NOTHING = Drawing()


def on_digits(run: RunFolder, per_tag: PerTag = 50, guidance: Guidance = GUIDANCE, seed: Seed = 0) -> None:
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
    detector: str = MASK2FORMER,
    clip: str = CLIP,
    device: str = "auto",
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
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
        name: what the table calls the model that is scored
    """
    from emf.evaluate.detector import CLASSES
    from emf.evaluate.geneval import GenEval, run_geneval
    from emf.evaluate.pictures import geneval_items

    _check(images, out, draw, device, ["prompts"] * (prompts is not None))
    networks = {"detector": unless(detector, MASK2FORMER), "clip": unless(clip, CLIP)}
    _check_scoring(draw, {"detections": detections, **networks})
    if detections is not None:
        refuse_idle("GenEval", networks, "--detections says what is in the images, and their colours")
    how: Any = dict(detector=detector, clip=clip, detections=detections, device=device)
    if images is not None:
        return _show([run_geneval(images, out, **how, name=name, steps=draw.step)], out)
    items = geneval_items(prompts, () if draw.images_only else CLASSES)
    _draw(items, out, draw, lambda: GenEval.load(**how), device=device, name=name)


def dpg(
    out: Path,
    images: Images = None,
    prompts: Path | None = None,
    questions: Path | None = None,
    *,
    draw: Draw = NOTHING,
    answers: Path | None = None,
    vqa: str = BLIP,
    resolution: Annotated[int | None, Within(1, 65_536)] = None,
    skip_first_row: bool = True,
    last_crop_categories: bool = True,
    device: str = "auto",
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
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
        name: what the table calls the model that is scored
    """
    from emf.evaluate.dpg import DPG, Quirks, run_dpg
    from emf.evaluate.pictures import dpg_items

    _check(images, out, draw, device, ["prompts"] * (prompts is not None))
    official = {"skip_first_row": skip_first_row, "last_crop_categories": last_crop_categories}
    quirks = {name: None if value else "False" for name, value in official.items()}
    _check_scoring(draw, {"questions": questions, "answers": answers, "vqa": unless(vqa, BLIP), **quirks})
    if answers is not None:
        refuse_idle("DPG-Bench", {"vqa": unless(vqa, BLIP)}, "--answers says what it would answer")
    if questions is None and not draw.images_only:
        raise ValueError("DPG-Bench: it is scored by --questions, dpg_bench.csv of its repository")
    if resolution is not None and images is None:
        raise ValueError("DPG-Bench: --resolution is of a folder of images; what is drawn has the checkpoint's own")
    how: Any = dict(vqa=vqa, answers=answers, quirks=Quirks(skip_first_row, last_crop_categories), device=device)
    how |= dict(resolution=resolution)
    asked = questions or Path()
    if images is not None:
        return _show([run_dpg(images, out, asked, **how, name=name, steps=draw.step)], out)
    _draw(dpg_items(prompts), out, draw, lambda: DPG.load(asked, **how), device=device, name=name)


def hps(
    out: Path,
    images: Images = None,
    prompts: Path | None = None,
    weights: Path | None = None,
    *,
    draw: Draw = NOTHING,
    tokenizer: str = CLIP,
    half: bool = False,
    device: str = "auto",
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
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
        name: what the table calls the model that is scored
    """
    from emf.evaluate.hps import HPS, check_styles, check_weights, run_hps
    from emf.evaluate.pictures import hps_items, hps_prompts

    _check(images, out, draw, device)
    _check_scoring(draw, {"weights": weights, "tokenizer": unless(tokenizer, CLIP), "half": half})
    if weights is None and not draw.images_only:
        raise ValueError("HPSv2.1: it is scored by --weights, HPS_v2.1_compressed.pt of xswu/HPSv2 on the Hub")
    if draw.limit is not None and not draw.images_only:
        raise ValueError("HPSv2.1: it is scored on all prompts; --limit needs --images-only")
    if images is not None:  # the user's own files, before the prompts are looked for on the Hub
        check_styles(images)
    if weights is not None:
        check_weights(weights)
    texts, file = hps_prompts(prompts), weights or Path()
    how: Any = dict(tokenizer=tokenizer, half=half, device=device)
    if images is not None:
        return _show([run_hps(images, out, texts, file, **how, name=name, steps=draw.step)], out)
    _draw(hps_items(texts), out, draw, lambda: HPS.load(texts, file, **how), device=device, name=name)


def pick(
    out: Path,
    images: Images = None,
    *,
    network: str = PICK,
    tokenizer: str = PICK_TOKENIZER,
    device: str = "auto",
    name: str = "",
    steps: Steps | None = None,
) -> None:
    """PickScore on a folder of pictures by their own prompts, as emf generate leaves them; goes on where it was
    stopped.

    Args:
        out: folder for scored.jsonl, results.json and results.md
        images: pictures with manifest.jsonl, or with a NAME.txt beside each
        network: folder or Hub name of PickScore's CLIP
        tokenizer: folder or Hub name of its tokenizer
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
        name: what the table calls the model that is scored
        steps: how many steps the pictures were drawn in; of a folder with others too, those that were
    """
    from emf.evaluate.pick import run_pick

    if images is None:
        raise ValueError("PickScore: give a folder of pictures, as emf generate writes one")
    _check(images, out, NOTHING, device)
    how: Any = dict(network=network, tokenizer=tokenizer, device=device)
    _show([run_pick(images, out, **how, name=name, steps=steps)], out)


def fid(
    out: Path,
    images: Images = None,
    real: Path | None = None,
    weights: Path | None = None,
    *,
    device: str = "auto",
    name: str = "",
    steps: Steps | None = None,
) -> None:
    """FID of a folder of pictures, as emf generate leaves them, to a folder of real ones; goes on where it was stopped.

    Args:
        out: folder for the features, results.json and results.md
        images: pictures, with manifest.jsonl or without; .png, .jpg, .jpeg and .webp are read, subfolders are not
        real: folder of real pictures, read as files alone, whatever a manifest.jsonl in it lists
        weights: inception-2015-12-05.pt, the network
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
        name: what the table calls the model that is scored
        steps: how many steps the pictures were drawn in; of a folder with others too, those that were
    """
    from emf.evaluate.fid import FILE, run_fid

    if images is None or real is None:
        raise ValueError("FID: give a folder of pictures, as emf generate writes one, and --real another")
    if weights is None:
        raise ValueError(f"FID: it is scored by --weights, {FILE}")
    _check(images, out, NOTHING, device)
    result = run_fid(images, real, out, weights, device=device, name=name, steps=steps)
    _show([result], out)
    print(result.deviations[0])


def _check(images: Path | None, out: Path, drawing: Drawing, device: str, further: Sequence[str] = ()) -> None:
    """Raises ValueError where it is not said, or said twice, which images are to be scored; where there is no such
    device; and where results cannot be written. Asked before anything is read. further: see Drawing.refuse."""
    from emf.device import device as find_device
    from emf.files import check_writable

    if (images is None) == (drawing.checkpoint is None):
        raise ValueError("evaluate: give a folder of images, or --checkpoint to draw them from")
    if images is not None:
        drawing.refuse(further)
    find_device(device)
    check_writable(out / "results.json")


def _check_scoring(drawing: Drawing, given: Mapping[str, Any]) -> None:
    """Raises ValueError where settings of scoring were given, and nothing is to be scored. given: see refuse_idle."""
    if drawing.images_only:
        refuse_idle("evaluate", given, "--images-only scores nothing")


def _draw(
    items: tuple[Any, dict[str, str]],
    out: Path,
    drawing: Drawing,
    load: Callable[[], Any],
    *,
    device: str,
    name: str,
) -> None:
    """Draw images, then score them by the benchmark that `load` gives, unless images are all that is asked for."""
    from emf.evaluate.pictures import draw_and_score

    assert drawing.checkpoint is not None
    called = name or drawing.checkpoint.resolve().name
    _show(draw_and_score(*items, out, drawing, device=device, load=load, name=called), out)


def _show(results: Sequence[Any], out: Path) -> None:
    """The overall scores on the terminal."""
    for r in results:
        told = "" if r.steps is None else f", steps {r.steps}"
        print(f"{r.label}{told}: {r.overall:.4g} over {r.images} images")
    if results:
        print(f"open {out / 'results.md'}")
