"""Samples and scores while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from emf.config import Config
from emf.data import digits
from emf.errors import NotFinite
from emf.evaluate.digits_scorer import Scorer
from emf.model.autoencoder import load_dcae
from emf.network.build import build
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import GUIDANCE, SMALL_AT_ONCE, Settings
from emf.show.sheet import captioned, write_sheet
from emf.weights.tensors import load_weights


def validate(config: Config, engine: Any, step: int, out: Path, scorer: Scorer | None) -> dict[str, float] | None:
    """What the weights of this step give: with a scorer the overall score of the digits' prompts by number of steps;
    with config.run.prompts samples/step_N.png, few-step samples by the moving average and by the raw weights.

    Called on every rank; rank 0 builds the network once more from the weights of all, samples, and frees it. Samples
    that are not finite are told in a line and left out.
    """
    meanflow, overall = config.objective == "meanflow", None
    prompts, counts = list(config.run.prompts), (1, 2, 4) if meanflow else (1, 4, 30)
    kinds = [("EMA", True), ("raw", False)] if engine.ema else [("raw", False)]
    columns: dict[str, Any] = {}
    for name, average in kinds if prompts else kinds[:1]:
        state = engine.weights(average)
        if engine.rank:
            continue
        sampler = sampler_of(config, state, engine, f"the {name} weights")
        try:
            if scorer and name == kinds[0][0]:
                overall = {str(n): scored(sampler, scorer, config.run.eval_prompts, n) for n in counts}
            for n in counts if prompts else ():
                columns[f"{name} {n}"] = to_uint8(sampler.images(prompts, steps=n))
        except NotFinite as error:
            # the other ranks wait for the next weights, and whether the run goes on is for its loss and weights to say
            print(f"step {step}: no validation of the {name} weights: {error}", flush=True)
    if columns:
        (out / "samples").mkdir(exist_ok=True)
        rows = captioned(prompts, columns)
        write_sheet(out / "samples" / f"step_{step:07d}.png", rows, ["", *columns])
    return overall


def sampler_of(config: Config, state: dict[str, Tensor], engine: Any, source: str) -> Sampler:
    """What samples from a run's weights, which `source` names in errors, on the engine's device."""
    network = build(config)
    load_weights(network, state, "the run's weights", engine.saved)
    network = network.to(engine.device, engine.dtype).eval()
    vae = config.data.vae if config.run.prompts else None
    autoencoder = None if vae is None else load_dcae(vae, device=engine.device)
    return Sampler(config, network, autoencoder, Settings(average=config.objective == "meanflow"), source=source)


def scored(sampler: Sampler, scorer: Scorer, per_tag: int, steps: int) -> float:
    """The overall score of the digits' prompts, `per_tag` of each task."""
    specs = digits.prompts(per_tag)
    images = sampler.images([s["prompt"] for s in specs], steps=steps, guidance=GUIDANCE, batch=SMALL_AT_ONCE)
    return float(scorer.score(images.numpy(), specs)["overall"])
