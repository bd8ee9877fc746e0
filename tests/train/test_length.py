"""How long a run is: steps, epochs, and a warm-up that fits either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from image_files import pairs, write_folder

pytest.importorskip("deepspeed")

from emf.recipes import RECIPES
from emf.train.command import parse_train
from emf.train.objective import learning_rate
from emf.train.opening import in_steps


@pytest.mark.parametrize(
    ("recipe", "warmup"),
    [
        ("digits-base", 100),
        ("digits", 30),
        ("digits-full", 100),
        ("sana-1.5-1.6b", 1195),
        ("sana-1.5-1.6b-paper", 5976),
        ("blip3o-next-3b", 1195),
    ],
)
def test_the_recipes_warm_up_as_they_did(recipe: str, warmup: int) -> None:
    config = RECIPES[recipe]()
    assert config.warmup == warmup
    assert learning_rate(config, warmup - 2) < learning_rate(config, warmup - 1) == config.optim.lr


def test_a_short_run_leaves_its_warm_up() -> None:
    config = replace(RECIPES["sana-1.5-1.6b"](), steps=1000)
    assert config.warmup == 30 and learning_rate(config, 29) == config.optim.lr > learning_rate(config, 999) > 0
    assert replace(config, steps=1).warmup == 0
    with pytest.raises(ValueError, match="optim.warmup 1195 is longer than the run of 1000 steps; give a share"):
        replace(config, optim=replace(config.optim, warmup=1195.0))
    assert replace(config, optim=replace(config.optim, warmup=1000)).warmup == 1000
    with pytest.raises(ValueError, match="optim.warmup 1.5 must be a share"):
        replace(config.optim, warmup=1.5)


def test_epochs_are_steps_of_the_data(tmp_path: Path) -> None:
    config = RECIPES["sana-1.5-1.6b"]()
    config = replace(config, data=replace(config.data, sources=("x",)), epochs=30)
    assert in_steps(config, 170_000) == replace(config, steps=39_843, epochs=None)  # as the recipe has it
    assert in_steps(config, 3).steps == 1 and in_steps(replace(config, epochs=0.5), 2560).steps == 10
    with pytest.raises(ValueError, match="epochs 0 must be above 0"):
        replace(config, epochs=0)
    with pytest.raises(ValueError, match="epochs needs data.sources"):
        replace(RECIPES["digits"](), epochs=2)
    arguments = ["sana-1.5-1.6b", "--data.sources", str(write_folder(tmp_path / "a", pairs(2))), "--out", "x"]
    assert parse_train([*arguments, "--epochs", "2"])[0].epochs == 2
    for steps in (["--steps", "7"], ["--steps=7"]):
        with pytest.raises(ValueError, match="--epochs and --steps both"):
            parse_train([*arguments, "--epochs", "2", *steps])


def test_an_older_config_reads_as_it_was(tmp_path: Path) -> None:
    """Its warm-up is a whole number of steps."""
    from emf import config as configs

    tree = json.loads(configs.to_json(RECIPES["digits"]()))
    tree["optim"]["warmup"] = 30
    del tree["epochs"], tree["data"]["workers"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config, *_ = parse_train([str(tmp_path / "config.json"), "--out", "x"])
    assert config.warmup == 30 and config.epochs is None
