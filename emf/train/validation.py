"""Samples and scores while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emf.config import Config
from emf.data import digits
from emf.evaluate.digits_scorer import Scorer
from emf.model.autoencoder import load_dcae
from emf.model.text_to_image import TextToImage
from emf.network.build import build, load_weights
from emf.sample.sampler import GUIDANCE, default_guidance, generate, to_uint8
from emf.show.sheet import captioned, write_sheet


def validate(config: Config, engine: Any, step: int, out: Path, scorer: Scorer | None) -> dict[str, float] | None:
    """What the weights of this step give: with a scorer the overall score of the digits' prompts by number of steps;
    with config.run.prompts samples/step_N.png, few-step samples by the moving average and by the raw weights.

    Called on every rank; rank 0 builds the network once more from the weights of all, samples, and frees it.
    """
    meanflow, overall = config.objective == "meanflow", None
    steps = (1, 2, 4) if meanflow else (1, 4, 30)
    kinds = [("EMA", True), ("raw", False)] if engine.ema else [("raw", False)]
    columns: dict[str, Any] = {}
    for name, average in kinds if config.run.prompts else kinds[:1]:
        state = engine.weights(average)
        if engine.rank:
            continue
        network = network_of(config, state, engine)
        if scorer and overall is None:
            overall = {str(n): scored(network, config, scorer, n, meanflow) for n in steps}
        for n in steps if config.run.prompts else ():
            columns[f"{name} {n}"] = to_uint8(pictures(network, config, n, meanflow, engine.device))
    if columns:
        (out / "samples").mkdir(exist_ok=True)
        rows = captioned(config.run.prompts, columns)
        write_sheet(out / "samples" / f"step_{step:07d}.png", rows, ["", *columns])
    return overall


def network_of(config: Config, state: dict[str, Tensor], engine: Any) -> TextToImage:
    network = build(config)
    load_weights(network, state, "the run's weights", engine.saved)
    return network.to(engine.device, engine.dtype).eval()


def scored(network: TextToImage, config: Config, scorer: Scorer, steps: int, average: bool) -> float:
    specs = digits.prompts(config.run.eval_prompts)
    images = generate(network, config, [s["prompt"] for s in specs], steps, average=average, guidance=GUIDANCE)
    return float(scorer.score(images.numpy(), specs)["overall"])


def pictures(network: TextToImage, config: Config, steps: int, average: bool, device: torch.device) -> Tensor:
    """Samples of config.run.prompts [n, 3, H, W]."""
    prompts, guidance = list(config.run.prompts), default_guidance(config)
    latents = generate(network, config, prompts, steps, average=average, guidance=guidance, batch=4)
    if config.data.vae is None:
        return latents
    autoencoder = load_dcae(config.data.vae, device=device)
    return torch.cat([autoencoder.decode(z[None].to(device)).cpu() for z in latents])
