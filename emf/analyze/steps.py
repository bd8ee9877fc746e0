"""Flow-matching backbones at few steps: does the one whose text encoder is worse lose more when steps are taken away?

The constrained-iteration comparison of EMF (arXiv 2604.18168): the same prompts and noise for two backbones at 1, 2, 4,
8 and 30 Euler steps. On the digits' world the score is GenEval's rules on its learned detector; elsewhere there is a
sheet to look at, and the mean similarity (PSNR; with a DINO the cosine of its features) of each k-step image to the
same backbone's own image of most steps, by default 30.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emf.analyze.bootstrap import Interval, bootstrap
from emf.analyze.dino import Dino
from emf.analyze.encoders import EncoderName, is_run
from emf.analyze.figures import plot_steps
from emf.analyze.outcome import RESULTS, TABLE, cell, check_out, claim, finite, note, write_whole
from emf.analyze.prompts import read_prompts
from emf.analyze.retrieval import cosine
from emf.config import read
from emf.evaluate.benchmark import open_image
from emf.evaluate.published import BENCHMARKS, FLOW_MATCHING, by_steps
from emf.sample.sampler import default_guidance, generate, to_uint8
from emf.show.progress import track
from emf.show.sheet import captioned, write_sheet

STEPS = (1, 2, 4, 8, 30)
PLOT, SHEET = "steps.png", "samples.png"
SHOWN = 6  # prompts on the sheet
LEAST = 1e-10  # mean squared error below which images count as equal: 100 dB

Picture = Callable[[str, int, int], Image.Image]
"""(backbone, steps, number of the prompt) -> its image."""


@dataclass(frozen=True)
class Sampling:
    """What is the same for every backbone. Raises ValueError on what cannot be."""

    steps: tuple[int, ...] = STEPS
    guidance: float | None = None
    """Classifier-free; None: 1.25 for the digits, else 2."""
    seed: int = 0
    per_tag: int = 50
    """Digits: prompts of each of the six tasks."""
    batch: int = 4

    def __post_init__(self) -> None:
        good = self.guidance is None or math.isfinite(self.guidance)
        if len({*self.steps}) < 2 or min(*self.steps, self.per_tag, self.batch) < 1 or self.seed < 0 or not good:
            raise ValueError(
                f"analyze: steps {self.steps}, guidance {self.guidance}, seed {self.seed}, per_tag {self.per_tag}, "
                f"batch {self.batch}; expected two different numbers of steps, a number, at least 0, 1 and 1"
            )


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


def parse_runs(texts: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER or FOLDER, two at least, of flow-matching runs or exports. Raises ValueError."""
    runs: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals and name else path.resolve().name
        if not path.is_dir() or not is_run(path) or name in runs or os.sep in name:
            problem = "there are two of this name" if name in runs else "no such folder, or no name for one"
            if path.is_dir() and not is_run(path):
                problem = "it holds no run"
            raise ValueError(f"analyze: {text!r}: {problem}; expected NAME=FOLDER, a flow-matching run or an export")
        runs[name] = path
    if len(runs) < 2:
        raise ValueError(f"analyze: {len(runs)} backbones; give two or more, each as NAME=FOLDER")
    return runs


def run_steps(
    runs: dict[str, Path],
    out: Path,
    sampling: Sampling | None = None,
    *,
    prompts: Path | None = None,
    vae: Path | None = None,
    dino: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, dict[str, dict[int, Interval]]]:
    """measure -> backbone -> steps -> its mean; results.json, results.md, a plot and a sheet in `out`.

    Stopped, it goes on: images are kept in images/NAME-DIGEST/ of `out`, the digits' as STEPS.npy, others as
    STEPS/00000.png.

    prompts: of the other worlds, see emf.analyze.prompts.read_prompts. dino: folder or Hub name of a DINO.
    Raises ValueError where something is missing, or `out` holds something else."""
    sampling = sampling or Sampling()
    check_out(out, (PLOT, SHEET))
    small = {name: _is_digits(folder) for name, folder in runs.items()}
    digits = all(small.values())
    if digits != any(small.values()):
        odd = next(name for name, is_small in small.items() if is_small)
        raise ValueError(f"analyze: {odd} draws the digits' world, another backbone does not; compare either kind")
    if digits != (prompts is None):
        need = (
            "the digits' prompts are fixed; leave --prompts out" if digits else "say what to draw with --prompts FILE"
        )
        raise ValueError(f"analyze: {need}")
    network = None if dino is None else Dino.load(dino, "cls", device)
    if prompts is None:
        from emf.data.digits import prompts as fixed

        specs = fixed(sampling.per_tag)
        texts = [s["prompt"] for s in specs]
    else:
        specs, texts = [], read_prompts(prompts)[0]
    settings: dict[str, Any] = {"analysis": "steps", "dino": dino, "vae": vae and str(vae), "dtype": dtype}
    settings |= asdict(sampling) | {"steps": sorted({*sampling.steps}), "prompts": texts}
    settings["runs"] = {name: f"{folder} {EncoderName('', 'run', folder).stamp()}" for name, folder in runs.items()}
    # images of other weights under the same name must not be taken for these
    places = {
        n: out / "images" / f"{n}-{hashlib.sha256(s.encode()).hexdigest()[:8]}" for n, s in settings["runs"].items()
    }
    del settings["batch"]
    claim(out, settings, "runs", (PLOT, SHEET))
    panels: dict[str, dict[str, dict[int, Interval]]] = {}
    if digits:
        picture, panels["score"] = _draw_digits(runs, sampling, texts, specs, places)
    else:
        picture = _draw(runs, sampling, texts, places, vae, dtype, device)
    for name in runs:
        for measure, line in similarity_to_last(picture, name, sampling.steps, len(texts), network).items():
            panels.setdefault(measure, {})[name] = line
    _write(out, settings, panels, len(texts))
    plot_steps(out / PLOT, _titled(panels, max(sampling.steps)))
    _write_sheet(out / SHEET, runs, sampling, texts, picture, specs)
    return panels


def _is_digits(folder: Path) -> bool:
    from emf.weights.folders import newest

    if (folder / "model_index.json").is_file():
        return False
    tree = read(newest(folder) / "config.json")
    check_flow_matching(folder, tree.get("objective"))
    return bool(tree.get("condition", {}).get("kind", "small") == "small")


def check_flow_matching(folder: Path, objective: str | None) -> None:
    if objective != "flow_matching":
        raise ValueError(
            f"analyze: {folder} was trained for MeanFlow; the comparison is of flow-matching backbones, before EMF"
        )


def _draw_digits(
    runs: dict[str, Path], sampling: Sampling, texts: list[str], specs: list[Any], places: dict[str, Path]
) -> tuple[Picture, dict[str, dict[int, Interval]]]:
    """(pictures, scores): the overall score is the mean of the tasks' shares of right images, its interval over
    images, task by task."""
    from emf.evaluate.digits_scorer import Scorer
    from emf.weights.folders import load_run

    scorer, kept = Scorer.fit(), {}
    scores: dict[str, dict[int, Interval]] = {name: {} for name in runs}
    networks: dict[str, Any] = {}
    jobs = [(name, n) for name in runs for n in sorted({*sampling.steps})]
    for name, n in track(jobs, "sampling"):
        file = places[name] / f"{n}.npy"
        if not file.exists():
            if name not in networks:
                networks[name] = load_run(runs[name])
            config, network = networks[name]
            guidance = default_guidance(config) if sampling.guidance is None else sampling.guidance
            drawn = generate(network, config, texts, n, average=False, guidance=guidance, seed=sampling.seed)
            _save(file, lambda part, drawn=drawn: np.save(part, drawn.numpy()))  # type: ignore[misc]
        images = np.load(file)
        rows = scorer.score(images, specs)["images"]
        scores[name][n] = bootstrap([float(row["correct"]) for row in rows], [row["tag"] for row in rows])
        kept[name, n] = to_uint8(images)
    return (lambda name, n, i: Image.fromarray(kept[name, n][i])), scores


def _draw(
    runs: dict[str, Path],
    sampling: Sampling,
    texts: list[str],
    places: dict[str, Path],
    vae: Path | None,
    dtype: str,
    device: str,
) -> Picture:
    """Every image as a PNG file, those that are not there yet."""
    from emf.sample.sampler import Sampler

    def path(name: str, n: int, i: int) -> Path:
        return places[name] / str(n) / f"{i:05d}.png"

    counts = sorted({*sampling.steps})
    for name, folder in runs.items():
        missing = [(n, i) for n in counts for i in range(len(texts)) if not path(name, n, i).exists()]
        if not missing:
            continue
        sampler = Sampler.load(folder, vae, dtype, device, flow_matching=True)
        check_flow_matching(folder, sampler.config.objective)
        guidance = sampler.guidance if sampling.guidance is None else sampling.guidance
        jobs = []
        for n in counts:
            left = [i for m, i in missing if m == n]
            jobs += [(n, left[j : j + sampling.batch]) for j in range(0, len(left), sampling.batch)]
        for n, part in track(jobs, f"sampling, {name}"):
            how = dict(guidance=guidance, seed=sampling.seed, numbers=part, batch=sampling.batch)
            for i, picture in zip(part, sampler.pictures([texts[i] for i in part], n, **how), strict=True):
                _save(path(name, n, i), lambda part, picture=picture: picture.save(part, "png"))  # type: ignore[misc]
    return lambda name, n, i: open_image(path(name, n, i))


def _save(file: Path, write: Callable[[Any], object]) -> None:
    """A file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with part.open("wb") as opened:
        write(opened)
    os.replace(part, file)


def steps_of(n: int) -> str:
    return f"{n} step" + "s" * (n > 1)


def _titled(panels: dict[str, Any], last: int) -> dict[str, Any]:
    return {m if m == "score" else f"{m}, to its own {last} steps": lines for m, lines in panels.items()}


def _write(out: Path, settings: dict[str, Any], panels: dict[str, dict[str, dict[int, Interval]]], n: int) -> None:
    measured = [
        {"measure": measure, "name": name, "steps": k, **asdict(x)}
        for measure, lines in panels.items()
        for name, line in lines.items()
        for k, x in line.items()
    ]
    paper = {name: [row for row in rows if row[0] == FLOW_MATCHING] for name, rows in BENCHMARKS.items()}
    tree = {"analysis": "steps", "rows": measured, "paper": paper, "settings": settings}
    write_whole(out / RESULTS, json.dumps(finite(tree), indent=1) + "\n")
    counts = settings["steps"]
    lines = ["# Flow matching at few steps"]
    for measure, table in _titled(panels, counts[-1]).items():
        digits = ".1f" if measure.startswith("PSNR") else ".3f"
        lines += ["", f"| {measure} | {' | '.join(steps_of(k) for k in counts)} |", "|--" * (1 + len(counts)) + "|"]
        for name, line in table.items():
            cells = [format(line[k], digits) if k in line else "" for k in counts]
            lines.append(f"| **{cell(name)}** | {' | '.join(cells)} |")
    lines += ["", "| the paper's BLIP3o-NEXT | 1 step | 4 | 30 |", "|--|--|--|--|"]
    for name in paper:
        theirs = by_steps(name, FLOW_MATCHING)
        lines.append(f"| {name} | {' | '.join(f'{theirs[k]:.2f}' for k in (1, 4, 30))} |")
    guidance = settings["guidance"]
    lines += [
        "",
        f"{n} prompts, the same prompts and noise (seed {settings['seed']}) for every backbone; in brackets the 95% "
        "bootstrap interval over prompts. Assumed, for the paper does not say:",
        f"- guidance {'by default: 1.25 for the digits, else 2' if guidance is None else guidance}, Euler steps of "
        "equal size, no time shift",
        "- a score is known for the digits' world alone; elsewhere the figures say how near an image of few steps "
        f"comes to the same backbone's image of {counts[-1]} steps, not whether it shows the prompt",
        "- BLIP3o-NEXT's image tokens are drawn once a prompt, by the same seed at every number of steps",
    ]
    write_whole(out / TABLE, "\n".join(lines) + "\n")
    note(out, settings)


def _write_sheet(
    path: Path, runs: dict[str, Path], sampling: Sampling, texts: list[str], picture: Picture, specs: list[Any]
) -> None:
    """Backbones down, prompt by prompt; steps across."""
    stride = sampling.per_tag if specs else 1
    shown = list(range(0, len(texts), stride))[:SHOWN]
    rows = [(name, i) for i in shown for name in runs]
    captions = [f"{name}: {texts[i]}" for name, i in rows]
    counts = sorted({*sampling.steps})
    columns = {steps_of(n): [np.asarray(picture(name, n, i)) for name, i in rows] for n in counts}
    write_sheet(path, captioned(captions, columns), ["", *columns], cell=120, lines=7)
