"""What a user's DeepSpeed JSON may say: nothing that would be overruled, or have no effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from emf.config import Config
from emf.recipes import digits
from emf.train.zero.settings import OWN_KEYS, engine_config


def with_json(folder: Path, tree: dict[str, Any]) -> Config:
    (folder / "own.json").write_text(json.dumps(tree))
    return replace(digits(), zero=replace(digits().zero, json=folder / "own.json"))


@pytest.mark.parametrize("key", OWN_KEYS)
def test_what_the_config_decides_is_refused(key: str, tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    *above, last = key.split(".")
    place = tree
    for name in above:
        place = place.setdefault(name, {})
    place[last] = 1
    with pytest.raises(ValueError) as told:
        engine_config(with_json(tmp_path, tree), 1)
    assert str(told.value) == f"config: zero.json {tmp_path}/own.json sets {key}; use {OWN_KEYS[key]} instead"


def test_what_is_the_optimizers_own_is_taken(tmp_path: Path) -> None:
    tree = {"optimizer": {"params": {"eps": 1e-6}}, "gradient_clipping": 0.5}
    made = engine_config(with_json(tmp_path, tree), 1)
    params = made["optimizer"]["params"]
    assert (params["eps"], params["lr"], made["gradient_clipping"]) == (1e-6, digits().optim.lr, 0.5)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optimizer": None}, "optimizer to None; expected an object"),
        ({"optimizer": "AdamW"}, "optimizer to 'AdamW'; expected an object"),
        ({"optimizer": {"params": 5}}, "optimizer.params to 5; expected an object"),
        ({"zero_optimization": True}, "zero_optimization to True; expected an object"),
        ({"bf16": True}, "bf16 to True; expected an object"),
        ({"gradient_clipping": "high"}, "gradient_clipping to 'high'; expected a number"),
    ],
)
def test_a_value_of_another_kind_is_one_line(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as told:
        engine_config(with_json(tmp_path, tree), 1)
    assert str(told.value) == f"config: zero.json {tmp_path}/own.json sets {message}"
