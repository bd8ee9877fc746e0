"""Lists and switches are written in one way in every command, and the other usual ways are understood in one place."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import pytest
import tyro

from emf.arguments import options_of, parse, to_arguments
from emf.cli.main import COMMANDS, GROUPS
from emf.config import Config
from emf.recipes import RECIPES
from emf.train.command import parse_train


@dataclass(frozen=True)
class Part:
    on: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    kinds: tuple[Literal["a", "b"], ...] = ()


@dataclass(frozen=True)
class Told:
    words: tyro.conf.Positional[tuple[str, ...]] = ()
    steps: tuple[int, ...] = (1,)
    two_words: bool = True
    names: tuple[str, ...] = ()
    name: str = ""
    file: Path | None = None
    part: Part = field(default_factory=Part)
    flat: Annotated[Part, tyro.conf.arg(name="")] = field(default_factory=Part)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--steps 1 2 4", Told(steps=(1, 2, 4))),
        ("--steps 1,2,4", Told(steps=(1, 2, 4))),
        ("--steps=1,2,4", Told(steps=(1, 2, 4))),
        ("--steps 1, 2, 4", Told(steps=(1, 2, 4))),
        ("--steps 1 2 x y", Told(("x", "y"), steps=(1, 2))),  # what follows a list is not swallowed
        ("--part.pair -0.5,2", Told(part=Part(pair=(-0.5, 2.0)))),
        ("--pair -0.5 2 x", Told(("x",), flat=Part(pair=(-0.5, 2.0)))),
        ("--part.kinds a,b", Told(part=Part(kinds=("a", "b")))),
        ("--names a,b c --name 1,2", Told(names=("a,b", "c"), name="1,2")),  # a comma may be part of a text
        ("--file x --name=", Told(file=Path("x"))),
        ("--on", Told(flat=Part(True))),
        ("--on x", Told(("x",), flat=Part(True))),
        ("--on True x", Told(("x",), flat=Part(True))),
        ("--on=false", Told()),
        ("--two-words False", Told(two_words=False)),
        ("--no-two-words", Told(two_words=False)),
        ("--two_words false --part.on TRUE", Told(two_words=False, part=Part(True))),
        ("--part.on --part.no-on", Told()),
        ("--name True --on", Told(name="True", flat=Part(True))),
        ("--on -- --on True", Told(("--on", "True"), flat=Part(True))),
    ],
)
def test_a_line_is_read(line: str, told: Told) -> None:
    assert parse(Told, line.split(), "it", default=Told()) == told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--on=2", "--on is a switch, '2' neither on nor off; say --on, or --on False"),
        ("--two-words=", "--two-words is a switch, '' neither on nor off"),
        ("--steps 1,x", "--steps"),
        ("--pair 1", "Expected 2 values"),
        ("--kinds a,c", "invalid choice"),
        ("--no-steps", "Unrecognized options: --no-steps"),
        ("--file=", "--file is empty; give a path"),
    ],
)
def test_what_cannot_be_read_is_one_line(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        parse(Told, line.split(), "it", default=Told())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_line_has_no_frame(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tyro draws other ones where stdout has no letters for its own."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(ValueError, match=".") as error:
        parse(Config, ["--stepz", "1"], "emf train digits", default=RECIPES["digits"]())
    assert not any(letter in str(error.value) for letter in ("─", "│", "╭", "|", "+-", "---")), error.value
    assert str(error.value).endswith("; see emf train digits --help")


def switches(what: Any) -> list[str]:
    """Names of the fields or arguments, at any depth, that are on or off."""
    found = []
    for name, hint in get_type_hints(what).items():
        found += switches(hint) if is_dataclass(hint) else [name.replace("_", "-")] * (hint is bool)
    return found


EVERY = {**COMMANDS, **{f"{group} {name}": f for group, some in GROUPS.items() for name, f in some.items()}}


@pytest.mark.parametrize("command", [*EVERY, "train"])
def test_every_switch_of_every_command_is_known(command: str) -> None:
    what: Any = Config if command == "train" else EVERY[command]
    told = options_of(what)
    for name in switches(what):
        assert any(option.endswith(name) and value is True for option, value in told.items()), name
    assert not any(hint == "bool | None" for hint in what.__annotations__.values())  # would be no switch here


def test_no_list_is_written_as_one_text() -> None:
    """Numbers in a text, as --steps had them once, would be a spelling of their own."""
    for what in EVERY.values():
        for name, hint in get_type_hints(what).items():
            sections = fields(hint) if is_dataclass(hint) else ()
            assert not (name in ("steps", "counts") and hint is str)
            assert not any(f.name in ("steps", "counts") and f.type == "str" for f in sections)


def test_a_run_is_resumed_in_either_spelling() -> None:
    for spelling in ("--resume", "--resume True", "--resume=true"):
        assert parse_train(f"digits --out x {spelling}".split())[2]
    for spelling in ("", "--no-resume", "--resume False"):
        assert not parse_train(f"digits --out x {spelling}".split())[2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_config_is_its_own_arguments(recipe: str) -> None:
    import json

    from emf.config import to_json

    config = RECIPES[recipe]()
    assert parse(Config, to_arguments(json.loads(to_json(config))), "it", default=RECIPES["digits"]()) == config
