"""Low-rank adapters (LoRA, arXiv 2106.09685) in the transformer. They are peft's, with a forward that takes Duals."""

from __future__ import annotations

from functools import partial
from operator import mul
from typing import Any

import peft
from peft.tuners import lora

from emf.config import LoraConfig
from emf.model.layers import Linear, Value
from emf.model.transformer import Transformer
from emf_kernels import each, gated_residual


class LoraLinear(lora.Linear):  # type: ignore[misc]
    """W x + alpha / rank B A x, of a Tensor or a Dual [B, ..., K]."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        for factors in (self.lora_A, self.lora_B):
            made: Any = factors[adapter_name]
            own = Linear(made.in_features, made.out_features, bias=False)
            own.weight = made.weight
            factors[adapter_name] = own

    def forward(self, x: Value, *args: Any, **kwargs: Any) -> Any:
        y = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            scale: float = self.scaling[name]
            low = each(partial(mul, scale), self.lora_A[name](x))
            y = gated_residual(y, None, self.lora_B[name](low))
        return y


def peft_settings(config: LoraConfig) -> peft.LoraConfig:
    """The adapters of a config, as peft has them."""
    return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))


def add_lora(transformer: Transformer, config: LoraConfig) -> None:
    """Put adapters in place; they have no effect until they are trained. Raises ValueError where a target names no
    linear layer."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, Linear)]
    if idle := [t for t in config.targets if not any(n == t or n.endswith(f".{t}") for n in names)]:
        raise ValueError(f"config: lora.targets {idle[0]} names no linear layer; one is {names[-1]}")
    settings = peft_settings(config)
    settings._register_custom_module({Linear: LoraLinear})
    peft.inject_adapter_in_model(settings, transformer)
