"""What a user's DeepSpeed JSON may say: nothing that would be overruled, or have no effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from training import metrics, train

from emf.config import Config
from emf.recipes import digits
from emf.train.zero.settings import OVERRULED, OWN_KEYS, engine_config, known_keys, overruled


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


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"zero_stage": 2}, "zero_stage, which DeepSpeed does not know"),
        ({"gradient_cliping": 1.0}, "gradient_cliping, which DeepSpeed does not know; did you mean gradient_clipping?"),
        ({"qqq": {}}, "qqq, which DeepSpeed does not know"),
        ({"enabled": True}, "enabled, which DeepSpeed does not know"),
        (
            {"optimizer": {"parameters": {}}},
            "optimizer.parameters, which DeepSpeed does not know; did you mean optimizer.",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled; use --zero.dtype bfloat16 instead"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as told:
        engine_config(with_json(tmp_path, tree), 1)
    assert str(told.value).startswith(f"config: zero.json {tmp_path}/own.json sets {message}")


def test_what_deepspeed_reads_is_known() -> None:
    ours = engine_config(replace(digits(), run=replace(digits().run, monitor=("csv", "wandb", "tensorboard"))), 1)
    assert ours.keys() <= known_keys()
    more = {"fp16", "flops_profiler", "comms_logger", "wall_clock_breakdown", "communication_data_type", "aio"}
    assert more <= known_keys() and "enabled" not in known_keys()


def test_what_overrules_the_config_is_said(tmp_path: Path) -> None:
    """In one line at the start; what agrees with it is not, and what was chosen on both sides is refused."""
    tree = {
        "gradient_clipping": 0.5,
        "optimizer": {"params": {"betas": [0.8, 0.9], "weight_decay": 0.0}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    config = with_json(tmp_path, tree)
    assert overruled(config) == [
        "gradient_clipping 0.5 (not optim.clip 1.0)",
        "optimizer.params.betas [0.8, 0.9] (not optim.betas 0.9 0.99)",
        "bf16.enabled True (not zero.dtype float32)",
        "zero_optimization.stage 2 (not zero.stage 0)",
        "zero_optimization.offload_optimizer.device cpu (not zero.offload False)",
    ]
    both = replace(config, optim=replace(config.optim, clip=2.0))
    with pytest.raises(ValueError) as told:
        engine_config(both, 1)
    line = f"config: zero.json {tmp_path}/own.json sets gradient_clipping 0.5, and optim.clip is 2.0; say it once"
    assert str(told.value) == line
    assert overruled(replace(config, optim=replace(config.optim, clip=0.5)))[0].startswith("optimizer.params.betas")
    assert {name.split(".")[0] for name in OVERRULED.values()} == {"optim", "zero"}


@pytest.mark.parametrize(
    "parts",
    [
        ["--freeze-encoder", "False", "--flow.guidance", "1.5", "--flow.along", "network"],
        ["--match.weight", "1", "--match.begin", "0.4", "--match.share", "0.5"],
    ],
    ids=["a trained encoder", "distribution matching"],
)
def test_deepspeeds_timers_take_a_step_of_several_parts(recipe: list[str], parts: list[str], tmp_path: Path) -> None:
    """They expect one forward with gradient a micro-batch. The steps are the same at stage 3 on two ranks."""
    (tmp_path / "own.json").write_text(json.dumps({"wall_clock_breakdown": True}))
    flags, rows = [*recipe, *parts, "--zero.json", str(tmp_path / "own.json")], []
    for stage, ranks in ((0, 1), (3, 2)):
        run = tmp_path / f"stage {stage}"
        result = train(tmp_path, *flags, "--out", str(run), "--zero.stage", str(stage), ranks=ranks)
        assert result.code == 0, result.text
        rows.append([(row["loss"], row["error"], row["grad_norm"]) for row in metrics(run)])
    for one, two in zip(*rows, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
