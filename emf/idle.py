"""Settings that were chosen and cannot act: a run is refused for them, in one line, before anything is made.

Chosen is what differs from the recipe's own value. A recipe may hold values that do nothing after another setting was
changed; nobody asked for those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from emf.config import Config
from emf.recipes import RECIPES


def _flow(config: Config) -> bool:
    return config.objective == "meanflow"


def _apart(config: Config) -> bool:
    """Whether some samples may have r < t."""
    return _flow(config) and max(config.flow.share) > 0


def _moves(config: Config) -> bool:
    """Whether a setting that is used changes with progress."""
    f = config.flow
    pairs = [f.mean, f.spread] if f.sampler == "logit_normal" else []
    pairs += [f.share] if _flow(config) else []
    pairs += [f.alpha] if _apart(config) and f.derivative == "alpha" else []
    return any(first != last for first, last in pairs)


def _scored(config: Config) -> bool:
    return config.condition.kind == "small" and config.run.eval_every > 0


NEEDS: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
    ("embedder_init", "objective meanflow, whose time embedders it makes", _flow),
    ("embedder_init", "--init, weights with the pretrained time embedder", lambda c: c.init is not None),
    ("freeze_encoder", "condition.kind small; other encoders are frozen", lambda c: c.condition.kind == "small"),
    ("freeze_encoder", "no `trained`, which says what is trained", lambda c: not c.trained),
    ("freeze_encoder", "lora.rank 0; beside adapters the encoder is frozen", lambda c: not c.lora.rank),
    # a folder to start from brings its own
    ("transformer.time_scale", "transformer.dual_time True", lambda c: c.transformer.dual_time or c.init is not None),
    ("lora.alpha", "lora.rank", lambda c: c.lora.rank > 0),
    ("lora.targets", "lora.rank", lambda c: c.lora.rank > 0),
    ("encoder.", "condition.kind small", lambda c: c.condition.kind == "small"),
    *(
        (f"encoder.{name}", "encoder.num_hidden_layers above 0", lambda c: c.encoder.num_hidden_layers > 0)
        for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    ),
    ("condition.folder", "another condition.kind than small", lambda c: c.condition.kind != "small"),
    ("condition.scale", "condition.kind blip3o", lambda c: c.condition.kind == "blip3o"),
    ("condition.window", "condition.kind blip3o", lambda c: c.condition.kind == "blip3o"),
    ("world.", "condition.kind small", lambda c: c.condition.kind == "small"),
    ("data.", "data.sources", lambda c: bool(c.data.sources)),
    ("data.ta_tok", "condition.kind blip3o", lambda c: c.condition.kind == "blip3o"),
    ("flow.mean", "flow.sampler logit_normal", lambda c: c.flow.sampler == "logit_normal"),
    ("flow.spread", "flow.sampler logit_normal", lambda c: c.flow.sampler == "logit_normal"),
    ("flow.schedule", "a pair such as flow.mean whose two values differ", _moves),
    ("flow.share", "objective meanflow", _flow),
    ("flow.weight_p", "objective meanflow", _flow),
    ("flow.weight_c", "objective meanflow", _flow),
    ("flow.weight_c", "flow.weight_p above 0", lambda c: c.flow.weight_p > 0),
    ("flow.guidance", "objective meanflow", _flow),
    ("flow.kappa", "objective meanflow", _flow),
    ("flow.guidance_interval", "objective meanflow", _flow),
    ("flow.guidance_interval", "flow.guidance or flow.kappa", lambda c: c.flow.guidance != 1 or c.flow.kappa != 0),
    ("flow.along", "objective meanflow and a flow.share above 0", _apart),
    ("flow.along", "flow.derivative jvp or difference", lambda c: c.flow.derivative != "alpha"),
    ("flow.derivative", "objective meanflow and a flow.share above 0", _apart),
    ("flow.difference_step", "objective meanflow and a flow.share above 0", _apart),
    ("flow.difference_step", "flow.derivative difference", lambda c: c.flow.derivative == "difference"),
    ("flow.alpha", "objective meanflow and a flow.share above 0", _apart),
    ("flow.alpha", "flow.derivative alpha", lambda c: c.flow.derivative == "alpha"),
    ("flow.zero_share", "objective meanflow and a flow.share above 0", _apart),
    ("match.weight", "objective meanflow", _flow),
    *(
        (f"match.{name}", "match.weight above 0", lambda c: c.match.weight > 0)
        for name in ("share", "steps", "guidance", "fake_lr", "begin")
    ),
    ("match.", "a step from match.begin on", lambda c: c.match.begin <= (c.steps - 1) / c.steps),
    ("optim.decay", "more steps than optim.warmup", lambda c: c.steps > c.warmup),
    ("optim.ema_cpu", "optim.ema above 0", lambda c: c.optim.ema > 0),
    (
        "run.eval_every",
        "run.prompts, or the digits, which are scored",
        lambda c: bool(c.run.prompts) or c.condition.kind == "small",
    ),
    ("run.eval_prompts", "run.eval_every and the digits, which are scored", _scored),
)
"""(a setting, or the beginning of a section's; what it needs in order to act; whether that is so)."""


def leaves(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a config by its whole name, as in optim.lr."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        inner = dataclasses.is_dataclass(value)
        found |= leaves(value, f"{prefix}{field.name}.") if inner else {prefix + field.name: value}
    return found


def chosen(config: Config) -> dict[str, Any]:
    """The settings, by name, that are not those of the config's recipe. Raises ValueError where it names no recipe."""
    if config.recipe not in RECIPES:
        raise ValueError(f"config: recipe is {config.recipe!r}; expected one of {', '.join(RECIPES)}")
    own = leaves(RECIPES[config.recipe]())
    return {name: value for name, value in leaves(config).items() if value != own[name]}


def check_idle(config: Config) -> None:
    """Raises ValueError, one line for all of them, where a setting was chosen that cannot act in this run."""
    idle = []
    for name, value in chosen(config).items():
        lacks = (what for start, what, holds in NEEDS if _is_of(name, start) and not holds(config))
        if what := next(lacks, None):
            idle.append(f"{name} {shown(value)} has no effect: it needs {what}")
    if idle:
        raise ValueError(f"config: {'; '.join(idle)}; leave {'it' if len(idle) == 1 else 'them'} out")
    if config.transformer.dual_time and not _flow(config):
        raise ValueError(
            "config: objective flow_matching leaves the embedders of transformer.dual_time True untrained, and what "
            "starts from the run would take them; say --transformer.dual-time False"
        )


def refuse_idle(who: str, given: Mapping[str, Any], why: str) -> None:
    """Raises ValueError where settings of a command were given that cannot act. given: by name, None or False where it
    was not given. why: what makes them idle."""
    idle = [name for name, value in given.items() if value is not None and value is not False]
    if idle:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        has, it = ("has", "it") if len(idle) == 1 else ("have", "them")
        raise ValueError(f"{who}: {flags} {has} no effect: {why}; leave {it} out")


def unless(value: Any, default: Any) -> Any:
    """The value, or None where it is the default."""
    return None if value == default else value


def _is_of(name: str, start: str) -> bool:
    return name == start or (start.endswith(".") and name.startswith(start))


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
