"""`emf report`, `emf paper`, `emf openmoji` and `emf app`: what the commands do, one function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Annotated, Literal

import tyro

from emf.config import Counted, Scale
from emf.idle import refuse_idle, unless
from emf.limits import Within
from emf.sample.sampling_settings import Ar, one_engine

Jobs = Annotated[int | None, Within(1, 1024)]
Seeds = Annotated[int, Within(1, 1000)]
RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


def report(run: RunFolder) -> None:
    """A run's figures, curves and samples as one page: report.html in its folder.

    Args:
        run: a run's folder, after `emf evaluate digits`
    """
    from emf.evaluate.run_page import write_report

    print(f"open {write_report(run)}")


def paper(
    out: Path = Path("runs/paper"),
    quick: bool = False,
    jobs: Jobs = None,
    seeds: Seeds = 3,
) -> None:
    """The paper's tables and figures in miniature, on the digits: results.json and report-paper.html. Stopped, it goes
    on, and what stands in the folder's results.json is not made again.

    Args:
        out: folder for the runs and the page
        quick: take minutes instead of hours, to try the machinery; the figures mean nothing
        jobs: how many runs are trained at once, each on a core of its own; default: as many as there are cores
        seeds: how many seeds every run is trained with
    """
    import os
    from dataclasses import replace

    from emf.paper.parts import FULL, QUICK
    from emf.paper.results_page import write_paper
    from emf.paper.runs import run_all

    _check_quick(quick, dict(seeds=seeds), paper)
    budget = QUICK if quick else replace(FULL, seeds=tuple(range(seeds)))
    run_all(out, budget, jobs or os.cpu_count() or 1)
    print(f"open {write_paper(out, budget)}")


def _check_quick(quick: bool, given: Mapping[str, int], command: Callable[..., None]) -> None:
    """Raises ValueError where a size of a study was chosen beside --quick, which has its own."""
    defaults = signature(command).parameters
    if quick:
        chosen = {name: unless(value, defaults[name].default) for name, value in given.items()}
        refuse_idle(command.__name__, chosen, "--quick has sizes of its own")


def openmoji(
    out: Path = Path("runs/openmoji"),
    quick: bool = False,
    jobs: Jobs = None,
    *,
    seeds: Seeds = 1,
    pictures: Annotated[int, Within(1, 100_000)] = 64,
    base_steps: Counted = 1200,
    emf_steps: Counted = 250,
) -> None:
    """Text encoders, toys and real ones, on OpenMoji's pictures: does a better one lose less at few steps?
    results.json and report-openmoji.html. Stopped, it goes on, with more seeds too, and what stands in the folder's
    results.json is not made again.

    Args:
        out: folder for the pictures, the text encoders, the runs and the page
        quick: take a minute or two, to try the machinery; the figures mean nothing
        jobs: how many runs are trained at once, each on a core of its own; default: as many as there are cores
        seeds: how many seeds every run is trained with
        pictures: how many pictures are learned
        base_steps: how many steps of flow matching, on each text encoder
        emf_steps: how many steps of EMF after it
    """
    import os
    from dataclasses import replace

    from emf.conditioning.vocabulary import check_packages
    from emf.data.openmoji import openmoji as drawn
    from emf.paper.openmoji_page import write_openmoji
    from emf.paper.openmoji_parts import FULL, QUICK
    from emf.paper.openmoji_runs import run_openmoji

    steps = dict(pictures=pictures, base_steps=base_steps, emf_steps=emf_steps)
    _check_quick(quick, dict(steps, seeds=seeds), openmoji)
    budget = QUICK if quick else replace(FULL, seeds=tuple(range(seeds)), **steps)
    gallery = drawn(budget.pictures)
    check_packages()
    run_openmoji(out, gallery, budget, jobs or os.cpu_count() or 1)
    print(f"open {write_openmoji(out, gallery, budget)}")


def app(
    run: RunFolder,
    *,
    port: Annotated[int, Within(0, 65_535)] = 7860,
    host: str = "127.0.0.1",
    vae: Path | None = None,
    text: Path | None = None,
    ar: Ar = None,
    ar_server: str | None = None,
    scale: Scale | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    device: str = "auto",
) -> None:
    """Draw captions in a browser, few steps and many side by side: a page on this machine.

    Args:
        run: a run's folder, one of its checkpoints, or a folder from emf export or emf convert
        port: where the page is served; 0: any port that is free
        host: the address to listen on; another than 127.0.0.1, as 0.0.0.0, lets others in, and nobody is asked for a
            password
        vae: a diffusers folder, or a name on the Hub, with the autoencoder; default: that of the run's data, or of the
            export
        text: the folder of the text encoder, where it was moved; default: the run's
        ar: who draws BLIP3o-NEXT's image tokens, see emf generate: vllm, in this process
        ar_server: the same by a server's completions endpoint, for example http://127.0.0.1:8000
        scale: BLIP3o-NEXT's image tokens pooled s x s into one, see emf generate; default: the run's condition.scale
        dtype: number format that the transformer computes in; default: float32 on a CPU, bfloat16 on a GPU
        device: where to compute: cpu, cuda, cuda:1; auto: the GPU where there is one
    """
    from emf.app.serving import serve

    engine = one_engine(ar, ar_server)

    def studio() -> object:
        from emf.app.studio import Studio

        return Studio(run, vae, dtype, device, text=text, ar=engine, scale=scale)

    serve(studio, host, port)
