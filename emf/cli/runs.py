"""What the `emf` commands do, one function each: arguments as the command line has them, help from the docstrings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


def generate(
    captions: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CAPTIONS")],
    run: Path,
    out: Path,
    prompts: Path | None = None,
    steps: int = 1,
    guidance: float | None = None,
    seed: int = 0,
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1,
    flow_matching: bool = False,
    vae: Path | None = None,
    batch: int = 4,
    dtype: Literal["float32", "bfloat16"] | None = None,
    device: str | None = None,
) -> None:
    """Captions to images with a trained run or an exported folder.

    Args:
        captions: for example "a red seven" "two blue threes"
        run: a run's folder, one of its checkpoints, or a folder from emf export
        out: folder for the PNG files; files of the same name are not overwritten
        prompts: a text file of further captions, one a line
        steps: of the sampler; two network evaluations each, one where the run was trained at this guidance
        guidance: classifier-free guidance, 1 is none; default: 1.25 for the digits, else 2
        seed: of the noise
        n: images of each caption
        flow_matching: sample the instantaneous velocity with Euler's method instead
        vae: a diffusers folder with the autoencoder; default: that of the run's data, or of the export
        batch: images computed at once
        dtype: default: float32 on a CPU, bfloat16 on a GPU
        device: cpu or cuda; default: the GPU where there is one
    """
    from emf.sample.sampler import Sampler, write_images

    every = [c for c in (*captions, *read_prompts(prompts)) for _ in range(n)]
    if not every or n < 1 or batch < 1:
        raise ValueError(f"generate: {len(every)} images, batch {batch}; give captions or --prompts, and at least 1")
    sampler = Sampler.load(run, vae, dtype, device, flow_matching)
    guidance = sampler.guidance if guidance is None else guidance
    told = dict(steps=steps, guidance=guidance, seed=seed, run=str(run), flow_matching=flow_matching)
    for first in range(0, len(every), batch):
        here = every[first : first + batch]
        numbers = range(first, first + len(here))
        images = sampler.images(here, steps, guidance=guidance, seed=seed, numbers=numbers, batch=batch)
        for path in write_images(images, here, out, told):
            print(path, flush=True)
    each = ", ".join(f"{stage} {took / len(every) * 1e3:.0f} ms" for stage, took in sampler.seconds.items())
    print(f"{len(every)} images; each: {each}", file=sys.stderr)  # stdout is the files' names alone


def read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"generate: prompts {file} cannot be read: {error}") from None


def convert(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    out: Path,
    config: Path | None = None,
    embedder_init: Literal["duplicate", "preserve"] = "duplicate",
    time_scale: float = 1.0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    allow_missing: tuple[str, ...] = (),
    allow_extra: tuple[str, ...] = (),
    allow_misshaped: tuple[str, ...] = (),
    shard_gb: float = 5.0,
) -> None:
    """Published weights into a folder to start from (--init): SANA, BLIP3o-NEXT, or EMF's own.

    Args:
        source: a diffusers SANA folder, an original .pth, a BLIP3o-NEXT folder or a released EMF checkpoint
        out: the folder; must not exist
        config: diffusers' config.json of the transformer, where the source has none
        embedder_init: of EMF's two time embedders, where the source has none: a copy each, or the function kept
        time_scale: what they multiply t and t - r with
        dtype: default: each tensor's own
        allow_missing: patterns of the source's names that may be missing
        allow_extra: ... that may be there without a use
        allow_misshaped: ... that may have another shape, and are then missing
        shard_gb: largest file written, in 1e9 bytes
    """
    from emf.weights.convert import convert as run

    allowed: dict[str, Any] = dict(allow_missing=allow_missing, allow_extra=allow_extra)
    print(run(source, out, config, embedder_init, time_scale, dtype, **allowed, allow_misshaped=allow_misshaped))
    print(f"{out}: whole; train with --init {out}")


def export(
    run: RunFolder,
    out: Path,
    base: Path | None = None,
    text: Path | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
) -> None:
    """A run as a folder in diffusers' layout, for EMFPipeline.from_pretrained and `emf generate`.

    Args:
        run: a run's folder, or one of its checkpoints; low-rank adapters are merged
        out: the folder; must not exist
        base: a diffusers folder whose vae, text encoder and tokenizer go with it; default: that of the run's data
        text: a folder from emf convert whose language model goes with it; default: the run's condition
        dtype: of the transformer
    """
    import torch

    from emf.network.adapters import merged
    from emf.weights.export import export as run_export
    from emf.weights.folders import load_run
    from emf.weights.tensors import refuse_existing

    refuse_existing(out)
    config, network = load_run(run)
    if text is None and config.condition.kind == "blip3o":
        text = config.condition.folder or config.init
    state = {k: v.to(getattr(torch, dtype)) for k, v in merged(network.transformer).items()}
    small = config.condition.kind == "small"
    trained = network.encoder if network.own_encoder and not small else None
    how = {k: getattr(config.condition, k) for k in ("kind", "scale", "window")}
    run_export(state, config.transformer, out, base or config.data.vae, text, trained, how)
    if small:
        print(f"{out}: the transformer; diffusers has no place for the digits' text encoder, which stays with the run")
    else:
        print(f"{out}: whole; emf generate ... --run {out}")


def report(run: RunFolder) -> None:
    """A run's figures, curves and samples as one page: report.html in its folder.

    Args:
        run: a run's folder, evaluated
    """
    from emf.show.run_page import write_report

    print(f"open {write_report(run)}")


def release(run: RunFolder, out: Path) -> None:
    """A run's averaged weights in half precision as one safetensors file, to start other runs from (--init).

    Args:
        run: a run's folder, or one of its checkpoints
        out: the file; must not exist
    """
    from emf.evaluate.small_world import release_run

    print(f"{out}: {release_run(run, out) / 1e6:.2f} MB")


def plan(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    gpus: int = 8,
    memory: float = 80.0,
    gpu: str = "H100",
    resolution: int = 1024,
    micro_batch: int = 1,
    batch_size: int = 128,
    share: float = 0.5,
    mfu: float = 0.4,
    offload: bool = False,
) -> None:
    """Memory by ZeRO stage, operations and days of a run of a published model, before it is started.

    Args:
        model: sana-1.5-1.6b, sana-1.5-4.8b or blip3o-next-3b
        gpus: of them
        memory: GiB of each
        gpu: A100, H100, H200 or B200, for the expected time
        resolution: pixels along a side
        micro_batch: samples a GPU computes at once
        batch_size: samples an optimizer step
        share: of the samples with r < t, which carry a tangent
        mfu: share of the data sheet's operations a second that is assumed
        offload: optimizer states in the host's memory
    """
    from emf.train import plan as planning

    sizes: dict[str, Any] = dict(resolution=resolution, micro_batch=micro_batch, batch_size=batch_size, share=share)
    planning.show(planning.plan(model, gpus, memory, mfu=mfu, gpu=gpu, offload=offload, **sizes))


def paper(out: Path = Path("runs/paper"), quick: bool = False, jobs: int | None = None, seeds: int = 3) -> None:
    """The paper's tables and figures in miniature, on the digits: results.json and report-paper.html. Stopped, it goes
    on.

    Args:
        out: folder of its runs
        quick: minutes instead of hours, to try the machinery; the figures mean nothing
        jobs: runs at once, a core each; default: as many as there are cores
        seeds: of every run
    """
    import os
    from dataclasses import replace

    from emf.paper.parts import FULL, QUICK
    from emf.paper.results_page import write_paper
    from emf.paper.runs import run_all

    if seeds < 1 or (jobs is not None and jobs < 1):
        raise ValueError(f"paper: {seeds} seeds, {jobs} jobs; expected at least 1 of each")
    budget = QUICK if quick else replace(FULL, seeds=tuple(range(seeds)))
    run_all(out, budget, jobs or os.cpu_count() or 1)
    print(f"open {write_paper(out, budget)}")
