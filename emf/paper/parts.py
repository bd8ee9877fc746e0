"""What is trained for the paper in miniature: bases by flow matching on four text encoders, EMF on each, ablations of
it.

A base has the shipped base's transformer, which has learned to draw with another encoder, and a text encoder from
scratch: as the paper's backbones are SANA's transformer on other encoders than its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from emf.config import Config, RunConfig
from emf.recipes import digits, digits_base
from emf.sample.sampling_settings import GUIDANCE

FM_STEPS, EMF_STEPS = (1, 2, 4, 8, 30), (1, 2, 4, 8)


@dataclass(frozen=True)
class Budget:
    """How much is trained and scored, which decides how long it takes."""

    base_steps: int = 400
    emf_steps: int = 200
    batch_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    per_tag: int = 20
    """Prompts of each of the six tasks in a score."""
    curve_prompts: int = 6
    """Prompts of each task in a score during training."""
    curve_points: int = 5
    texts: int = 600
    """Captions of the two analyses of text encoders."""


FULL = Budget()
QUICK = Budget(4, 2, batch_size=8, seeds=(0,), per_tag=1, curve_prompts=1, curve_points=2, texts=40)

ENCODERS = {
    "trained": "a small Qwen3, trained with the transformer",
    "random": "the same Qwen3, its weights random and frozen; connector and transformer trained",
    "bag of words": "its word embeddings alone, trained: neither order nor context",
    "blurred": "as trained, but it cannot tell colours two by two, left from right, above from below",
}
ABLATIONS = {
    "embedders copied": "both time embedders start as the pretrained one (the paper's); else the function is kept",
    "times x 1": "times reach the embedders as they are (the released code's scale); else times 10",
    "share fixed": "half of the samples have r < t throughout; else from 25 to 75 %",
    "times fixed": "logit-normal times do not move with progress; else location -0.5 to 0.5, scale 1 to 2",
    "no adaptive weight": "p = 0, the plain squared error; else p = 1",
    "guidance in the target": f"omega {GUIDANCE:g} inside the target, one evaluation a step; else at the sampler",
}


@dataclass(frozen=True)
class Part:
    """One run: trained, then scored."""

    name: str
    """Its folder: base/<encoder>/<seed>, emf/<encoder>/<seed>, ablation/<name>/<seed>."""
    config: Config
    base: str | None = None
    """The part whose weights it starts from."""


def base(encoder: str, seed: int, budget: Budget) -> Part:
    """Flow matching: the shipped transformer on a new encoder."""
    config = digits_base()
    sizes = replace(config.encoder, blurred=encoder == "blurred")
    if encoder == "bag of words":
        sizes = replace(sizes, num_hidden_layers=0)
    config = replace(
        config,
        seed=seed,
        steps=budget.base_steps,
        batch_size=budget.batch_size,
        encoder=sizes,
        trained=("transformer.", "encoder.connector.") if encoder == "random" else (),
        optim=replace(config.optim, lr=1e-3, condition_lr=1.0, warmup=min(30, budget.base_steps // 4), ema=0.99),
        run=replace(config.run, save_every=200),
    )
    return Part(f"base/{encoder}/{seed}", config)


def emf(start: Part, name: str, budget: Budget) -> Part:
    """The paper's adaptation of a base, its encoder frozen."""
    config = digits()
    config = replace(
        config,
        seed=start.config.seed,
        steps=budget.emf_steps,
        batch_size=budget.batch_size,
        encoder=start.config.encoder,
        optim=replace(config.optim, warmup=min(30, budget.emf_steps // 4)),
        run=replace(
            config.run,
            save_every=100,
            eval_every=max(1, budget.emf_steps // budget.curve_points),
            eval_prompts=budget.curve_prompts,
            log_every=max(1, budget.emf_steps // 40),
        ),
    )
    return Part(f"{name}/{start.config.seed}", config, start.name)


def ablated(part: Part, name: str) -> Part:
    """EMF with one setting changed, and not scored on the way."""
    run = replace(part.config.run, eval_every=0, eval_prompts=RunConfig().eval_prompts)
    c = replace(part.config, run=run)
    changed = {
        "embedders copied": replace(c, embedder_init="duplicate"),
        "times x 1": replace(c, transformer=replace(c.transformer, time_scale=1.0)),
        "share fixed": replace(c, flow=replace(c.flow, share=(0.5, 0.5))),
        "times fixed": replace(c, flow=replace(c.flow, mean=(0.0, 0.0), spread=(1.5, 1.5))),
        "no adaptive weight": replace(c, flow=replace(c.flow, weight_p=0.0)),
        "guidance in the target": replace(c, flow=replace(c.flow, guidance=GUIDANCE)),
    }
    return replace(part, name=f"ablation/{name}/{c.seed}", config=changed[name])


def parts(budget: Budget) -> list[Part]:
    """All runs, seed by seed; a base before what starts from it."""
    every: list[Part] = []
    for seed in budget.seeds:
        starts = [base(encoder, seed, budget) for encoder in ENCODERS]
        mains = [emf(start, f"emf/{encoder}", budget) for start, encoder in zip(starts, ENCODERS, strict=True)]
        every += [part for pair in zip(starts, mains, strict=True) for part in pair]
        every += [ablated(mains[0], name) for name in ABLATIONS]
    return every
