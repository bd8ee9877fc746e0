"""Samples and scores while training goes on, by the network that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emf.config import Config
from emf.data import digits
from emf.errors import NotFinite
from emf.evaluate.digits_scorer import Scorer
from emf.model.autoencoder import load_dcae
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import GUIDANCE, SMALL_AT_ONCE, Settings
from emf.show.sheet import captioned, write_sheet


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """A network in eval mode until the end of the block, every module of it then as it was."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Validation:
    """What the weights of a step give. Called on every rank, and the ranks share the pictures."""

    config: Config
    engine: Any
    """emf.train.zero.Engine."""
    out: Path
    scorer: Scorer | None = None
    """Of the digits' prompts; rank 0 alone has it."""
    latent: Any = None
    """The autoencoder that training holds already."""

    def __call__(self, step: int) -> dict[str, float] | None:
        """The overall score of the digits' prompts by number of steps, on rank 0; and with config.run.prompts
        samples/step_N.png, few-step samples by the moving average and by the raw weights, which the monitors get too.

        Samples that are not finite are told in a line and left out.
        """
        config, engine = self.config, self.engine
        prompts, counts = list(config.run.prompts), (1, 2, 4) if config.objective == "meanflow" else (1, 4, 30)
        if config.data.sources and not prompts:
            return None
        kinds = ["EMA", "raw"] if engine.ema else ["raw"]
        columns: dict[str, np.ndarray] = {}
        overall: dict[str, float] | None = None
        autoencoder = self.autoencoder() if prompts else None
        network = engine.engine.module
        for kind in kinds if prompts else kinds[:1]:
            with engine.averaged() if kind == "EMA" else nullcontext(), at_rest(network):
                how = Settings(average=config.objective == "meanflow")
                sampler = Sampler(config, network, autoencoder, how, source=f"the {kind} weights")
                try:
                    if not config.data.sources and kind == kinds[0]:
                        scores = {str(n): self.scored(sampler, n) for n in counts}
                        overall = scores if self.scorer else None
                    for n in counts if prompts else ():
                        columns[f"{kind} {n}"] = self.drawn(sampler, prompts, to_uint8, steps=n)
                except NotFinite as error:
                    # the same on every rank; whether the run goes on is for its loss and weights to say
                    if engine.rank == 0:
                        print(f"step {step}: no validation of the {kind} weights: {error}", flush=True)
        if engine.rank == 0 and columns:
            (self.out / "samples").mkdir(exist_ok=True)
            rows = captioned(prompts, columns)
            write_sheet(self.out / "samples" / f"step_{step:07d}.png", rows, ["", *columns])
            for name, pictures in columns.items():
                engine.show(name, pictures, prompts, step)
        return overall

    def autoencoder(self) -> Any:
        """What makes images of latents: what training holds, or else read anew, for it would lie idle on the device."""
        folder = self.config.data.vae
        if folder is None:
            return None
        return self.latent if self.latent is not None else load_dcae(folder, device=self.engine.device)

    def scored(self, sampler: Sampler, steps: int) -> float:
        """The overall score of the digits' prompts, run.eval_prompts of each task; nan but on rank 0."""
        specs = digits.prompts(self.config.run.eval_prompts)
        how: dict[str, Any] = dict(steps=steps, guidance=GUIDANCE, batch=SMALL_AT_ONCE)
        images = self.drawn(sampler, [s["prompt"] for s in specs], Tensor.numpy, **how)
        return float(self.scorer.score(images, specs)["overall"]) if self.scorer else float("nan")

    @torch.no_grad()
    def drawn(
        self, sampler: Sampler, captions: Sequence[str], made: Callable[[Tensor], np.ndarray], **how: Any
    ) -> np.ndarray:
        """made(images) of all captions, of which every rank draws a share; on every rank.

        Under ZeRO 3 the ranks must go through the network together: each draws as many, the last caption again where
        they do not divide, and none stops before the others. Raises NotFinite on every rank.
        """
        engine, n = self.engine, len(captions)
        mine = [min(place, n - 1) for place in range(engine.rank, -(-n // engine.world) * engine.world, engine.world)]
        batch, done, bad = how.get("batch", sampler.settings.batch), dict[int, np.ndarray](), list[int]()
        fault = ""
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            try:
                images = sampler.images([captions[i] for i in part], numbers=part, **how)
                done |= dict(zip(part, made(images), strict=True))
            except NotFinite as error:
                bad += error.places
                fault = error.fault if engine.stage < 3 else ""  # there the weights are not whole to be looked at
        every = engine.gather((done, bad, fault))
        if wrong := sorted({place for _, places, _ in every for place in places}):
            raise NotFinite(wrong, max(fault for *_, fault in every))
        whole = {place: image for images, *_ in every for place, image in images.items()}
        return np.stack([whole[i] for i in range(n)])
