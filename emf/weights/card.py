"""The model card of an export, its README.md, as the Hub shows it. It names no place on the exporter's machine."""

from __future__ import annotations

import math
import re
from pathlib import Path

from emf.config import Config
from emf.data.scores_file import CAPTIONS, SCORES, read_scores
from emf.files import copy_file, files_in, read_json, read_text, write_text
from emf.show.table import cell, markdown
from emf.weights.converted import is_base, read_converted
from emf.weights.hub import hub_name
from emf.weights.tensors import Weights

SHEET = "samples.png"
DRAWN = "*/images/drawing.json"
"""What tells of the images of a page by `emf evaluate`, by number of steps."""
HEAD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, few-step, flow-map, meanflow, emf]
{base}
# license: yours to fill in; those of the base model and of the training images bind it
---
# {name}
{what}
"""
NO_BASE = "# base_model: OWNER/NAME of what the training began with, where the Hub has it"
FLOW_MAP = """A flow map that draws a caption in one, two or four steps, trained by EMF, which is MeanFlow from captions
([arXiv 2604.18168](https://arxiv.org/abs/2604.18168)).

## Draw
```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name!r}, trust_remote_code=True)
images = pipe({asks}, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
```
It needs diffusers 0.42 or later and transformers. The code that it trusts is the `flow_map_*.py` in this folder. Where
the package `emf` is installed too, its fused kernels are used."""
FLOW_MATCHING = """A text-to-image model trained by flow matching, for
[EMF](https://arxiv.org/abs/2604.18168) to start from. `diffusers.SanaTransformer2DModel` reads its transformer."""


def write_card(run: Path, config: Config, folder: Path, name: str, *, step: int | None = None) -> None:
    """README.md of an export that is being written into `folder`, and the sheet of samples that it shows.

    run: what is exported. Scores and samples are shown of a run's own folder; of a checkpoint nobody knows them.
    name: of the folder when it is whole. step: after which the exported weights were saved, where that is known.
    """
    base, asks = base_model(config), '"a red cube on a blue sphere"'
    if config.condition.kind == "small":
        asks = '"two red sevens"'
    if not any((folder / part).is_dir() for part in ("text_encoder", "language_model")):
        asks = "prompt_embeds=states, negative_prompt_embeds=null"
    what = FLOW_MAP.format(name=name, asks=asks) if config.objective == "meanflow" else FLOW_MATCHING
    text = HEAD.format(base=f"base_model: {base}" if base else NO_BASE, name=cell(name), what=what)
    own = (run / "metrics.jsonl").is_file()
    text += "\n".join(["", "## Training", *markdown(["setting", "value"], facts(config, folder, step)), ""])
    text += "\n".join(["", "## Scores", *(own and scores(run, step) or ["Not evaluated."]), ""])
    if own and (found := newest_sheet(run, step)):
        sheet, of = found
        copy_file(sheet, folder / SHEET)
        text += f"\n## Samples\n![Captions by numbers of steps]({SHEET})\n"
        text += f"\n{earlier(of, step, 'The samples are of')}\n" if of != step else ""
    write_text(folder / "README.md", text)


ENCODERS = {"small": "the digits' own, of this world's words", "blip3o": "BLIP3o-NEXT", "gemma": "Gemma-2, as SANA's"}
ADAPTERS = """Low-rank adapters (rank {rank}, alpha {alpha}) of a flow map, in peft's and in diffusers' form, and beside
them `trained_in_full.safetensors`: its time embedders, and what else was trained in full.

- base: {base}
- text encoder: {encoder}

They belong to both, and hold neither.

```python
from emf import EMFPipeline

pipe = EMFPipeline.from_pretrained(BASE, adapters={name!r})
```
`BASE` is the folder, in diffusers' layout, of the base with its text encoder.
"""


def write_adapters_card(config: Config, folder: Path, name: str) -> None:
    """README.md of a folder of adapters that is being written: the base and the text encoder that they need."""
    c, base = config.condition, base_model(config)
    encoder = ENCODERS.get(c.kind, c.kind)
    encoder += f", window {c.window}, image tokens pooled {c.scale} x {c.scale}" if c.kind == "blip3o" else ""
    where = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(c.folder))
    told = base or (f"a folder named {config.init.name}" if config.init else "random weights")
    text = ADAPTERS.format(
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        base=told,
        encoder=encoder + (f", {where[1]}/{where[2]}" if where else ""),
        name=name,
    )
    write_text(
        folder / "README.md", HEAD.format(base=f"base_model: {base}" if base else NO_BASE, name=cell(name), what=text)
    )


def base_model(config: Config) -> str | None:
    """OWNER/NAME on the Hub of the weights that a run began with, where the cache of the Hub's client has them; None
    where they lie somewhere that tells no such name."""
    if config.init is None or not config.init.is_dir():
        return None
    path = str(read_converted(config.init).source.get("path", "")) if is_base(config.init) else str(config.init)
    found = hub_name(path)
    return found and found.partition("@")[0]


def facts(config: Config, folder: Path, step: int | None) -> list[list[str]]:
    """What a reader asks of a run, by name. step: after which the weights were saved, where that is known."""
    entries = Weights([folder / "transformer" / "diffusion_pytorch_model.safetensors"]).entries.values()
    numbers = sum(math.prod(entry.shape) for entry in entries)
    sizes, flow = config.transformer, config.flow
    done = str(config.steps) if step in (None, config.steps) else f"{step} of {config.steps}"
    told = {
        "recipe": config.recipe,
        "objective": {"meanflow": "EMF (MeanFlow)", "flow_matching": "flow matching"}[config.objective],
        "steps": f"{done}, of {config.batch_size} samples each",
        "learning rate": f"{config.optim.lr:g}, {config.optim.decay}, after {config.warmup} steps of warm-up",
        "weights": f"moving average, {config.optim.ema:g}" if config.optim.ema else "as trained",
        "transformer": f"{numbers / 1e6:.4g} million parameters, {sizes.num_layers} layers, {sizes.channels} channels",
        "text encoder": {"small": "a small one of this world's words", "blip3o": "BLIP3o-NEXT"}.get(
            config.condition.kind, config.condition.kind
        ),
        "guidance in the target": f"{flow.built_in:g}" if flow.built_in != 1 else "none",
        "adapters": f"low-rank, {config.lora.rank}, merged" if config.lora.rank else "none",
    }
    return [[key, value] for key, value in told.items()]


def earlier(of: int | None, step: int | None, what: str) -> str:
    """A sentence that says of which step something is, where that is not the weights' own."""
    whose = f"weights of step {of}" if of is not None else "weights of a step that is not known"
    return f"{what} {whose}; those here are of step {'unknown' if step is None else step}."


def scores(run: Path, step: int | None) -> list[str]:
    """Markdown of what was measured of a run, from the files that `emf evaluate` wrote into its folder: the digits'
    scores, and every benchmark's page. Of scores that are not of the weights of `step` it says of which they are.
    Raises ValueError where scores.json is of another form."""
    lines = []
    if tree := read_scores(run / SCORES, "export"):
        rows = [[r["model"].upper(), str(r["steps"]), f"{r['overall']:.3f}"] for r in tree["rows"]]
        said = f"Of {tree.get('captions', CAPTIONS)} captions"
        said += f", at guidance {tree['guidance']:g}" if "guidance" in tree else ""
        said += ". FM is the base, by flow matching."
        said += "" if tree.get("step") == step else " " + earlier(tree.get("step"), step, "The scores are of")
        lines += [*markdown(["model", "steps", "score"], rows), "", said, ""]
    for page in sorted({*run.glob("results.md"), *run.glob("*/results.md")}):
        lines += [re.sub(r"^#", "###", read_text(page), flags=re.MULTILINE)]
        drawn = [read_json(file) for file in sorted(page.parent.glob(DRAWN))]
        steps = {tree.get("step") if isinstance(tree, dict) else None for tree in drawn} or {None}
        lines += [earlier(of, step, "The images were drawn with") for of in steps if of != step]
    return lines


def newest_sheet(run: Path, step: int | None) -> tuple[Path, int | None] | None:
    """(the sheet of samples that says most of a run, the step that it is of): that of its evaluation or the last of its
    training, whichever is of the weights of `step`, else the later one."""
    found = list[tuple[Path, int | None]]()
    if (run / SHEET).is_file():
        found.append((run / SHEET, (read_scores(run / SCORES, "export") or {}).get("step")))
    trained = ((file, re.fullmatch(r"step_(\d+)\.png", file.name)) for file in files_in(run / "samples", "step_*.png"))
    found += [(file, int(number[1])) for file, number in trained if number]
    return next((f for f in found if f[1] == step), max(found, key=lambda f: f[1] or -1, default=None))
