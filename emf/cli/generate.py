"""`emf generate`: what the command does; its arguments as the command line has them, its help from the docstring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from emf.config import Scale
from emf.limits import Within
from emf.sample.sampling_settings import Ar, AtOnce, Guidance, Seed, Steps, one_engine


def generate(
    captions: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CAPTIONS")],
    run: Path,
    out: Path,
    prompts: Path | None = None,
    *,
    steps: Steps = 1,
    guidance: Guidance | None = None,
    seed: Seed = 0,
    n: Annotated[int, tyro.conf.arg(aliases=["-n"]), Within(1, 1_000_000)] = 1,
    size: str | None = None,
    flow_matching: bool = False,
    vae: Path | None = None,
    text: Path | None = None,
    ar: Ar = None,
    ar_server: str | None = None,
    scale: Scale | None = None,
    batch: AtOnce = 4,
    dtype: Literal["float32", "bfloat16"] | None = None,
    device: str = "auto",
) -> None:
    """Captions to images with a trained run or an exported folder.

    Args:
        captions: for example "a red seven" "two blue threes"
        run: a run's folder, one of its checkpoints, or a folder from emf export or emf convert
        out: folder for the PNG files, whose names say their captions, and manifest.jsonl, which lists them with their
            settings; nothing in it is overwritten
        prompts: a text file of further captions, one a line
        steps: how many steps to sample in; each costs two network evaluations, or one where the run was trained at
            this guidance
        guidance: classifier-free guidance, 1 is none; default: 1.25 for the digits, else 2
        seed: seed of the noise
        n: how many images to draw of each caption
        size: WIDTHxHEIGHT of the pictures in pixels, as 1152x896, in multiples of a patch of the autoencoder's latents;
            default: the square that the transformer was made for
        flow_matching: sample the instantaneous velocity with Euler's method instead: of a trained run that of its
            start, where it is there
        vae: a diffusers folder with the autoencoder, or its OWNER/NAME on the Hugging Face Hub; default: that of the
            run's data, or of the export
        text: the folder or Hub name of the text encoder, where it was moved; default: the run's
        ar: who draws BLIP3o-NEXT's image tokens, instead of its language model here: vllm, in this process; its
            random numbers are its own, so a seed gives another picture
        ar_server: the same by a server's completions endpoint, as vLLM and SGLang have one, for example
            http://127.0.0.1:8000; it serves the language_model folder of the export
        scale: BLIP3o-NEXT: image tokens pooled s x s into one, so 729, 169 or 81 of them are drawn; default: the
            run's condition.scale
        batch: how many images are computed at once
        dtype: number format that the transformer computes in; default: float32 on a CPU, bfloat16 on a GPU
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
    """
    import time
    from dataclasses import replace

    from torch import Tensor

    from emf.files import read_lines, whole_path
    from emf.sample.image_batches import Batch, batches_of
    from emf.sample.picture_files import check_pictures_folder, write_images
    from emf.sample.sampler import Sampler
    from emf.sample.sampling_settings import read_size

    pixels = None if size is None else read_size(size)
    engine = one_engine(ar, ar_server)
    read = [] if prompts is None else read_lines(prompts)
    every = [c for c in (*captions, *read) for _ in range(n)]
    if not every:
        raise ValueError(
            "generate: give captions, or --prompts with a file of them"
            if prompts is None
            else f"generate: {prompts} holds no caption; expected one a line"
        )
    check_pictures_folder(out)
    sampler = Sampler.load(run, vae, dtype, device, flow_matching, text=text, ar=engine, scale=scale)
    _, rows, columns = sampler.shape_of(pixels)
    sampler.check_captions(every)
    guidance = sampler.guidance if guidance is None else guidance
    how = replace(sampler.settings, steps=steps, guidance=guidance, seed=seed, batch=batch, size=pixels)
    told = dict(steps=steps, guidance=guidance, seed=seed, run=str(whole_path(run)), flow_matching=flow_matching)
    told["size"] = f"{columns * sampler.scale}x{rows * sampler.scale}"
    told |= sampler.told
    if sampler.note:
        print(sampler.note, file=sys.stderr)
        told["note"] = sampler.note
    start = time.perf_counter()

    def written(batch: Batch, images: Tensor) -> None:
        for path in write_images(images, batch.captions, out, told, batch.numbers):
            print(path, flush=True)

    for _ in sampler.draw(batches_of(every, how), written):
        pass
    each = {stage: took / len(every) * 1e3 for stage, took in sampler.seconds.items()}
    tokens = getattr(sampler.network.encoder, "image_tokens", None)
    per = {"text": f" ({tokens} image tokens, {each['text'] / tokens:.3g} ms a token)"} if tokens else {}
    stages = ", ".join(f"{stage} {took:.0f} ms{per.get(stage, '')}" for stage, took in each.items())
    whole = f"; {(time.perf_counter() - start) / len(every) * 1e3:.0f} ms in all" * sampler.overlaps
    print(f"{len(every)} images; each: {stages}{whole}", file=sys.stderr)  # stdout is the files' names alone
