"""What a run needs is said before anything is read, and nothing is written before its first step is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training import TINY, train

pytest.importorskip("deepspeed")

from emf.config import ConditionConfig, Config
from emf.recipes import RECIPES, digits_base
from emf.train import loop

SOURCES = "--data.sources (a folder from emf cache; or tars or folders of images with captions, which need --data.vae"
TOKENS = f"{SOURCES} and --data.ta-tok too)"
INIT = "--init (the weights to adapt: a folder from emf convert)"
GEMMA = "--condition.folder (the gemma encoder)"


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        *((name, f"{INIT}, and {TOKENS}") for name in ("sana-1.5-1.6b", "sana-1.5-1.6b-paper", "blip3o-next-3b")),
        ("sana-1.5-gemma", f"{INIT}, and {GEMMA}, and {SOURCES} too)"),
    ],
)
def test_a_recipe_says_all_that_it_needs(recipe: str, needs: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as told:
        loop.train(RECIPES[recipe](), tmp_path / "run")
    assert str(told.value) == f"config: {recipe} needs {needs}" and not (tmp_path / "run").exists()
    first = (RECIPES[recipe].__doc__ or "").splitlines()[0]
    assert "needs --init" in first and "--data.sources" in first  # as `emf train --help` shows it


def test_what_is_given_is_not_asked_for() -> None:
    config = replace(RECIPES["sana-1.5-1.6b"](), init=Path("start"))
    given = replace(config, data=replace(config.data, sources=("cache",)))
    given.check_given()
    replace(
        given, objective="flow_matching", init=None, condition=ConditionConfig("blip3o", Path("start"))
    ).check_given()
    for recipe in ("digits-base", "digits", "digits-full"):
        RECIPES[recipe]().check_given()
    with pytest.raises(ValueError, match="sana-1.5-1.6b needs --data.sources"):
        config.check_given()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"in_channels": 4, "out_channels": 4}, "is not 3"), ({"out_channels": 4}, "make them equal")],
)
def test_sizes_that_no_digits_have_are_no_config(changed: dict[str, int], message: str) -> None:
    config: Config = digits_base()
    with pytest.raises(ValueError, match=f"^config: transformer.*{message}"):
        replace(config, transformer=replace(config.transformer, **changed))


def _no_step() -> None:
    def losses(*_: object) -> None:
        raise ValueError("train: the first step cannot be made")

    loop.losses = losses  # type: ignore[assignment]


def test_a_run_without_a_first_step_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["digits-base", *TINY, "--steps", "1", "--out", str(run)]
    result = train(tmp_path, *arguments, before=_no_step)
    assert result.code == 2 and "the first step cannot be made" in result.text, result.text
    assert not run.exists()
    result = train(tmp_path, *arguments)
    assert result.code == 0 and (run / "config.json").is_file(), result.text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a cat", "cat"), ("--help", "config: run.prompts '--help' begins with a dash, as a setting does")],
)
def test_prompts_of_validation_are_read_first(prompt: str, message: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "prompts.txt").write_text(f"{prompt}\n")
    prompts = ["--run.eval-every", "2", "--run.prompts", str(tmp_path / "prompts.txt")]
    result = train(tmp_path, "digits-base", *TINY, *prompts, "--out", str(run))
    assert result.code == 2 and message in result.text and not run.exists(), result.text
