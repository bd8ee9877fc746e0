"""Flow-matching backbones at few steps: does the one whose text encoder is worse lose more when steps are taken away?

The constrained-iteration comparison of EMF (arXiv 2604.18168): the same prompts and noise for two backbones at 1, 2, 4,
8 and 30 Euler steps. On the digits' world the score is GenEval's rules on its learned detector; elsewhere there is a
sheet to look at, and the mean similarity (PSNR; with a DINO the cosine of its features) of each k-step image to the
same backbone's own image of most steps, by default 30.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from emf.analyze.backbones import Backbones, Picture, draws_digits
from emf.analyze.bootstrap import LEVEL, Interval, bootstrap
from emf.analyze.choices import DType, Sampling
from emf.analyze.dino import Dino
from emf.analyze.figures import plot_steps
from emf.analyze.names import EncoderName, folder_stamp
from emf.analyze.outcome import RESULTS, TABLE, check_out, claimed
from emf.analyze.prompts import read_prompts
from emf.analyze.retrieval import cosine
from emf.data.digits import prompts as digits_prompts
from emf.device import device as checked
from emf.evaluate.published import BENCHMARKS, FLOW_MATCHING, by_steps
from emf.files import place_or_name, whole_path, write_json, write_settings, write_text
from emf.idle import refuse_idle, unless
from emf.sample.sampling_settings import GUIDANCE, GUIDANCE_PRETRAINED
from emf.show.progress import track
from emf.show.sheet import captioned, write_sheet
from emf.show.table import Markdown, bold, markdown
from emf.weights.hub import AUTOENCODER, ENCODER, named

Panels = dict[str, dict[str, dict[int, Interval]]]
"""measure -> backbone -> steps -> its mean."""
PLOT, SHEET = "steps.png", "samples.png"
SHOWN = 6  # prompts on the sheet
LEAST = 1e-10  # mean squared error below which images count as equal: 100 dB


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of images [H, W, 3] uint8 in dB, at most 100."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean()) / 255**2
    return -10 * math.log10(max(error, LEAST))


def similarity_to_last(
    picture: Picture, name: str, steps: Sequence[int], prompts: int, dino: Dino | None = None, batch: int = 16
) -> dict[str, dict[int, Interval]]:
    """How near a backbone's images of k steps come to its own of most steps: by measure and k, the mean over the
    prompts. Measures: PSNR in dB; with a network the cosine of DINO features."""
    last, counts = max(steps), sorted({*steps})
    close: dict[str, dict[int, Interval]] = {"PSNR, dB": {}}
    ends = [np.asarray(picture(name, last, i)) for i in range(prompts)] if prompts <= 64 else None
    for n in counts[:-1]:
        values = []
        for i in range(prompts):
            end = ends[i] if ends is not None else np.asarray(picture(name, last, i))
            values.append(psnr(np.asarray(picture(name, n, i)), end))
        close["PSNR, dB"][n] = bootstrap(values)
    if dino is None:
        return close
    features = {}
    for n in track(counts, f"image features, {name}"):
        parts = [range(i, min(i + batch, prompts)) for i in range(0, prompts, batch)]
        features[n] = np.concatenate([dino.features([picture(name, n, i) for i in part]).numpy() for part in parts])
    close["cosine of DINO features"] = {n: bootstrap(cosine(features[n], features[last])) for n in counts[:-1]}
    return close


def run_steps(
    runs: dict[str, Path],
    out: Path,
    sampling: Sampling | None = None,
    *,
    prompts: Path | None = None,
    vae: Path | None = None,
    text: Path | None = None,
    dino: str | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
) -> Panels:
    """measure -> backbone -> steps -> its mean; results.json, results.md, a plot and a sheet in `out`.

    Stopped, it goes on: images are kept in images/NAME-DIGEST/ of `out`, the digits' as STEPS.npy, others as
    STEPS/00000.png.

    prompts: of the other worlds, see emf.analyze.prompts.read_prompts. dino: folder or Hub name of a DINO.
    Raises ValueError where something is missing, or `out` holds something else."""
    sampling, device = sampling or Sampling(), str(checked(device))
    check_out(out, (PLOT, SHEET))
    small = {name: draws_digits(folder) for name, folder in runs.items()}
    digits = all(small.values())
    if digits != any(small.values()):
        odd = next(name for name, is_small in small.items() if is_small)
        raise ValueError(f"analyze: {odd} draws the digits' world, another backbone does not; compare either kind")
    if digits != (prompts is None):
        need = (
            "the digits' prompts are fixed; leave --prompts out" if digits else "say what to draw with --prompts FILE"
        )
        raise ValueError(f"analyze: {need}")
    if digits:
        unused = {"vae": vae, "text": text, "dtype": unless(dtype, "float32")}
        refuse_idle("analyze", unused, "the digits are drawn by their own encoder, as pixels, in float32")
    else:
        per_tag = unless(sampling.per_tag, Sampling().per_tag)
        refuse_idle("analyze", {"per_tag": per_tag}, "it is of the digits' tasks")
    network = None if dino is None else Dino.load(dino, "cls", device)
    specs: list[Any] = digits_prompts(sampling.per_tag) if prompts is None else []
    texts = [s["prompt"] for s in specs] if prompts is None else read_prompts(prompts)[0]
    stamps = {name: f"{whole_path(folder)} {EncoderName('', 'run', folder).stamp()}" for name, folder in runs.items()}
    vae = named(vae, AUTOENCODER, "analyze") if vae else None
    text = named(text, ENCODER, "analyze") if text else None
    settings: dict[str, Any] = {"analysis": "steps", "dino": dino and place_or_name(dino), "dtype": dtype}
    settings |= {k: f and f"{whole_path(f)} {folder_stamp(f)}" for k, f in (("vae", vae), ("text", text))}
    settings |= asdict(sampling) | {"steps": sorted({*sampling.steps}), "prompts": texts, "runs": stamps}
    del settings["batch"]
    with claimed(out, settings, "runs", (PLOT, SHEET)):
        backbones, panels = Backbones(runs, stamps, sampling, texts, out), Panels()
        if digits:
            picture, panels["score"] = backbones.draw_digits(specs)
        else:
            picture = backbones.draw(vae, text, dtype, device)
        for name in runs:
            for measure, line in similarity_to_last(picture, name, sampling.steps, len(texts), network).items():
                panels.setdefault(measure, {})[name] = line
        _write(out, settings, panels, len(texts))
        plot_steps(out / PLOT, _titled(panels, max(sampling.steps)))
        _write_sheet(out / SHEET, backbones, picture, sampling.per_tag if digits else 1)
        return panels


def steps_of(n: int) -> str:
    """A number of steps in words."""
    return f"{n} step" + "s" * (n > 1)


def _titled(panels: Panels, last: int) -> Panels:
    return {m if m == "score" else f"{m}, to its own {last} steps": lines for m, lines in panels.items()}


def _write(out: Path, settings: dict[str, Any], panels: Panels, n: int) -> None:
    measured = [
        {"measure": measure, "name": name, "steps": k, **asdict(x)}
        for measure, lines in panels.items()
        for name, line in lines.items()
        for k, x in line.items()
    ]
    paper = {name: [row for row in rows if row[0] == FLOW_MATCHING] for name, rows in BENCHMARKS.items()}
    write_json(out / RESULTS, {"analysis": "steps", "rows": measured, "paper": paper, "settings": settings})
    counts = settings["steps"]
    lines = ["# Flow matching at few steps"]
    for measure, by_name in _titled(panels, counts[-1]).items():
        digits = ".1f" if measure.startswith("PSNR") else ".3f"
        rows = [
            [bold(name), *(Markdown(format(line[k], digits)) if k in line else "" for k in counts)]
            for name, line in by_name.items()
        ]
        lines += ["", *markdown([measure, *map(steps_of, counts)], rows)]
    theirs = {name: by_steps(name, FLOW_MATCHING) for name in paper}
    rows = [[name, *(f"{scores[k]:.2f}" for k in (1, 4, 30))] for name, scores in theirs.items()]
    lines += ["", *markdown([f"the paper's {FLOW_MATCHING}", "1 step", "4", "30"], rows)]
    guidance = settings["guidance"]
    by_default = f"by default: {GUIDANCE:g} for the digits, else {GUIDANCE_PRETRAINED:g}"
    lines += [
        "",
        f"{n} prompts, the same prompts and noise (seed {settings['seed']}) for every backbone; in brackets the "
        f"{LEVEL:.0%} bootstrap interval over prompts. Assumed, for the paper does not say:",
        f"- guidance {by_default if guidance is None else guidance}, Euler steps of equal size, no time shift",
        "- a score is known for the digits' world alone; elsewhere the figures say how near an image of few steps "
        f"comes to the same backbone's image of {counts[-1]} steps, not whether it shows the prompt",
        "- BLIP3o-NEXT's image tokens are drawn once a prompt, by the same seed at every number of steps",
    ]
    write_text(out / TABLE, "\n".join(lines) + "\n")
    write_settings(out, settings)


def _write_sheet(path: Path, backbones: Backbones, picture: Picture, stride: int) -> None:
    """Backbones down, prompt by prompt; steps across."""
    texts = backbones.texts
    rows = [(name, i) for i in range(0, len(texts), stride)[:SHOWN] for name in backbones.runs]
    captions = [f"{name}: {texts[i]}" for name, i in rows]
    columns = {steps_of(n): [picture(name, n, i) for name, i in rows] for n in backbones.counts}
    write_sheet(path, captioned(captions, columns), ["", *columns], cell=126, lines=7)
