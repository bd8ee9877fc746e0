"""What the settings of low-rank adapters, peft's adapter_config.json, ask for, and what of it can be done here; by what
adapters are known again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

UNREAD = (
    "fan_in_fan_out",
    "use_dora",
    "alpha_pattern",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
)
"""Settings of peft with which W + alpha / rank B A is not all there is."""
STAMP = "adapters"
"""The name under which a file's metadata says which adapters it is of, or which ones are merged in its weights."""
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
"""How peft names the factors in a network."""
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of init_lora_weights that take something from the base, so that the products belong to what is left."""


def scale_of(settings: Mapping[str, Any], rank: int, where: object, alpha: int | None = None) -> float:
    """What the products B A of adapters of this rank are multiplied by: alpha / rank, or with rslora the root of it.

    where: the folder, for errors. alpha: where the settings do not say it. A setting of null is as if it were not
    there. Raises ValueError where they ask for anything else than W + scale B A.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(f"lora: {where} {what}")

    if (kind := settings.get("peft_type") or "LORA") != "LORA":
        raise wrong(f"holds adapters of the kind {kind!r}; expected LORA")
    made = [name for name in UNREAD if settings.get(name)]
    start = str(settings.get("init_lora_weights")).lower()
    made += [f"init_lora_weights {start}"] * start.startswith(MOVED)
    made += [f"bias {bias!r}" for bias in [settings.get("bias") or "none"] if bias != "none"]
    if made:
        raise wrong(f"was made with {made[0]}, which is not read here; merge it where it was made")
    said = settings.get("r")
    if said is not None and said != rank and not settings.get("rank_pattern"):
        raise wrong(f"says r {said!r}, and holds adapters of rank {rank}")
    said = alpha if settings.get("lora_alpha") is None else settings["lora_alpha"]
    if not isinstance(said, int | float) or isinstance(said, bool) or not math.isfinite(said) or not said:
        raise wrong(f"has lora_alpha {said!r}; expected a number other than 0")
    root = settings.get("use_rslora") or False
    if not isinstance(root, bool):
        raise wrong(f"has use_rslora {root!r}; expected true or false")
    return float(said / (rank**0.5 if root else rank))


def stamp_of(factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> str:
    """A digest of adapters in float32, by which they are known again where they are merged in a transformer."""
    digest = hashlib.sha256(str(scale).encode())
    for name in sorted(factors):
        digest.update(name.encode())
        for x in factors[name]:
            digest.update(x.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict without adapters, their products B A, times the scale, added to the weights: what the network loads
    that has none. One without adapters is as it was."""
    whole = dict[str, Tensor]()
    for name, value in state.items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer + A in state:
            product = state[layer + B].float() @ state[layer + A].float() * scale
            value = (value.float() + product).to(value.dtype)
        whole[name.replace(".base_layer.", ".")] = value
    return whole


def stamp_in(transformer: nn.Module, scale: float) -> str:
    """The stamp of the adapters that a transformer was trained with."""
    state = transformer.state_dict()
    layers = [name.removesuffix(A) for name in state if name.endswith(A)]
    return stamp_of({f"{layer}.weight": (state[layer + A], state[layer + B]) for layer in layers}, scale)
