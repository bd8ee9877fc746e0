"""The settings of the method (emf.flow), without what computes: a config and its help need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from emf.limits import Within, check_limits

Pair = tuple[float, float]


@dataclass(frozen=True)
class MatchConfig:
    """A distribution-matching term beside MeanFlow's loss (emf.matching): pictures of few steps are moved to where the
    frozen base would have them. Holds the base and a trained copy of it beside the network that is trained."""

    weight: Annotated[float, Within(0)] = 0.0
    """Weight of the term; 0: none."""
    share: Annotated[float, Within(above=0, most=1)] = 0.25
    """How many samples it has a step, for each of MeanFlow's."""
    steps: Annotated[tuple[int, ...], Within(1, 100)] = (1,)
    """In how many steps the pictures are made: these take turns, one a step of training. The gradient goes through all
    steps of a picture, so a turn of n costs n forwards and backwards of it."""
    guidance: Annotated[float, Within(above=0)] = 1.25
    """Guidance of the frozen base, to whose pictures those of few steps are moved."""
    fake_lr: Annotated[float, Within(above=0, most=1e6)] = 1.0
    """Factor on the learning rate of the copy, which learns the flow of the pictures of few steps."""
    begin: Annotated[float, Within(0, below=1)] = 0.5
    """Training progress at which it begins; its weight grows from 0 over the next twentieth of the run."""

    def __post_init__(self) -> None:
        check_limits(self, "config: match.")
        if not self.steps:
            raise ValueError("config: match.steps is empty; say in how many steps pictures are made, as in 1 2 4")

    def weight_at(self, progress: float) -> float:
        """Of the term, at a training progress in [0, 1]."""
        return self.weight * min(1.0, max(0.0, (progress - self.begin) / 0.05))


@dataclass(frozen=True)
class FlowConfig:
    sampler: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the two draws whose larger is t and whose smaller is r."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How mean, spread and share move from their first to their second value with training progress."""
    mean: Annotated[Pair, Within(-50, 50)] = (-0.5, 0.5)
    """Logit-normal location at progress 0 and 1."""
    spread: Annotated[Pair, Within(0, 50)] = (1.0, 2.0)
    """Logit-normal scale at progress 0 and 1."""
    share: Annotated[Pair, Within(0, 1)] = (0.25, 0.75)
    """Probability of r < t at progress 0 and 1."""
    weight_p: Annotated[float, Within(0, 10)] = 1.0
    """Adaptive weight 1 / (L + c)^p of a sample with summed squared error L; 0 switches it off."""
    weight_c: Annotated[float, Within(above=0)] = 1e-3
    """The small number c in the adaptive weight."""
    guidance: Annotated[float, Within(above=0)] = 1.0
    """Guidance omega inside the target, so that a step of the sampler needs one evaluation and no extrapolation: v
    becomes omega v + kappa u(z, t, t) + (1 - omega - kappa) u(z, t, t | no condition), at one or two more forwards
    without gradient a step (MeanFlow, arXiv 2505.13447, eq. 13, 19 and 21). 1: none, as in EMF."""
    kappa: Annotated[float, Within(0, below=1)] = 0.0
    """Share kappa of the network's own conditional velocity in the guided target; the guidance that results is
    omega / (1 - kappa)."""
    guidance_interval: Annotated[Pair, Within(0, 1)] = (0.0, 1.0)
    """Times t at which there is guidance inside the target."""
    along: Literal["data", "network"] = "data"
    """What the tangent runs along: e - x (MeanFlow, EMF; with guidance inside the target, the guided velocity), or the
    network's own u(z, t, t), at one more forward without gradient (improved MeanFlow's v-loss, arXiv 2512.02012:
    || u + (t - r) stopgrad(du/dt) - v ||^2)."""
    derivative: Literal["jvp", "difference", "alpha"] = "jvp"
    """du/dt by one dual pass; by a central difference along the path, with guidance too (TiM, arXiv 2509.04394), for
    networks that know no Duals, at two more forwards; or alpha-Flow's target without a derivative (arXiv 2510.20771),
    at one, until its alpha is 0, which is by one dual pass."""
    difference_step: Annotated[float, Within(above=0, below=0.5)] = 0.005
    """Distance in t of the central difference to either side."""
    alpha: Annotated[Pair, Within(0, 1)] = (1.0, 0.0)
    """alpha-Flow's alpha at progress 0 and 1, between them along a sigmoid: 1 is trajectory flow matching, 0 MeanFlow,
    exactly so below 0.005."""
    zero_share: Annotated[float, Within(0, 1)] = 0.0
    """Share of the samples with r < t whose r is 0 (TiM: 0.2, a tenth of all): pairs for the one-step sampler."""

    def __post_init__(self) -> None:
        check_limits(self, "config: flow.")
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"config: flow.guidance_interval {low} {high} must have the smaller time first")

    @property
    def built_in(self) -> float:
        """The guidance that a network trained so has already."""
        return self.guidance / (1 - self.kappa)
