"""Where a run starts: weights that do not fit its network are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emf.config import Config
from emf.network.build import build
from emf.recipes import digits_base
from emf.weights.start import started


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    small = dict(num_layers=1, num_attention_heads=2, num_cross_attention_heads=1)
    single = replace(digits_base(), transformer=replace(digits_base().transformer, **small))
    state = {k: v.clone() for k, v in build(single).state_dict().items()}
    twice = replace(single.transformer, dual_time=True)
    file = tmp_path / "weights.safetensors"

    def load(weights: dict[str, Tensor], config: Config) -> None:
        save_file(weights, file)
        started(replace(config, init=file))

    load(state, single)
    load(state, replace(single, objective="meanflow", transformer=twice))
    name = "transformer.proj_out.weight"
    with pytest.raises(ValueError, match=f"1 missing, 0 extra, 0 misshaped keys; missing {name}"):
        load({k: v for k, v in state.items() if k != name}, single)
    with pytest.raises(ValueError, match="0 missing, 1 extra, 0 misshaped keys; unexpected transformer.other"):
        load(state | {"transformer.other": torch.zeros(1)}, single)
    with pytest.raises(ValueError, match=f"0 missing, 0 extra, 1 misshaped keys; shape of {name}"):
        load(state | {name: state[name][:-1].contiguous()}, single)
    with pytest.raises(ValueError, match="no file"):
        started(replace(single, init=tmp_path / "none.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a safetensors file"):
        started(replace(single, init=file))
