"""Every number that a user may set has a range, and what is out of it is refused in one line that names it.

Takes about 5 seconds: what no range refuses is built and computed a loss of.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from digits_run import small_config

from emf.analyze.choices import Computing, Protocol, Sampling, Shortening
from emf.cli.main import COMMANDS, GROUPS, main
from emf.config import Config, OptimConfig
from emf.data.feed import Digits
from emf.evaluate.drawing import Drawing
from emf.idle import leaves
from emf.limits import LARGEST, Within, check_limits, limits_of
from emf.model.sizes import EncoderConfig, TransformerConfig
from emf.network.build import build
from emf.sample.sampling_settings import Settings
from emf.train.batch import make_batch
from emf.train.hardware import Hardware
from emf.train.objective import learning_rate, losses

SETTINGS = (Config, Computing, Drawing, Hardware, Protocol, Sampling, Settings, Shortening)
ODD = (math.nan, math.inf, -math.inf, -1, 1e300, 10**12, 0)


def is_number(hint: Any) -> bool:
    """Whether a setting of this type is a number, several of them, or perhaps one."""
    return hint in (int, float) or any(map(is_number, get_args(hint)))


def numbers(kind: Any) -> Iterator[tuple[Any, str]]:
    """(class or function, name) of every number that a dataclass, at any depth, or a command has."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from numbers(hint)
        elif is_number(hint):
            yield kind, name


def test_every_number_declares_its_range() -> None:
    commands = [*COMMANDS.values(), *(command for group in GROUPS.values() for command in group.values())]
    found = [number for kind in (*SETTINGS, *commands) for number in numbers(kind)]
    assert len(found) > 90
    assert [f"{kind.__name__}.{name}" for kind, name in found if name not in limits_of(kind)] == []


def with_value(config: Config, name: str, value: Any) -> Config:
    """The config with one setting changed; its name as in optim.lr."""
    section, _, last = name.rpartition(".")
    if section:
        return replace(config, **{section: replace(getattr(config, section), **{last: value})})
    return replace(config, **{last: value})


def compute(config: Config) -> None:
    """What a step of the run would compute before any weight moves."""
    network = build(replace(config, init=None))
    batch = make_batch(config, Digits(config.batches), 0, 0, 1)
    losses(config, network, batch, 0.5).loss.mean().backward()
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad, rate = torch.ones(1), learning_rate(config, 0) * config.optim.condition_lr
    torch.optim.AdamW([weight], rate, config.optim.betas, weight_decay=config.optim.weight_decay).step()


def in_one_line(act: Callable[[], Any], *words: str) -> None:
    """Whatever it does, it raises nothing but a ValueError of one line with these words."""
    try:
        act()
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and all(word in str(error) for word in words), error


CONFIG = replace(small_config(), batch_size=4, steps=2)


def limit_of(name: str) -> Within | None:
    """The range of a setting of CONFIG by its whole name."""
    section, _, last = name.rpartition(".")
    kind: Any = type(getattr(CONFIG, section) if section else CONFIG)
    return limits_of(kind).get(last)


NUMBERS = {name: value for name, value in leaves(CONFIG).items() if limit_of(name)}


def like(value: Any, x: float) -> Any:
    """As many of the number as a setting with this value has."""
    return (x,) * len(value) if isinstance(value, tuple) else x


@pytest.mark.parametrize("name", NUMBERS)
def test_odd_numbers_of_a_config(name: str) -> None:
    """Each is refused by a line that names the setting, or lies between two that the next test computes with."""
    for odd in ODD:
        try:
            with_value(CONFIG, name, like(NUMBERS[name], odd))
        except ValueError as error:
            line = str(error)
            assert len(line.splitlines()) == 1 and line.startswith("config: "), line
            assert name.rpartition(".")[2] in line, line
            continue
        limit = limit_of(name)
        assert math.isfinite(odd) and limit and not limit.fault(odd), f"{name} {odd} is accepted"


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_compute(name: str) -> None:
    limit = limit_of(name)
    assert limit is not None
    for end in (limit.least, limit.most):
        if limit.fault(end) or (abs(end) > 1e3 and isinstance(like(NUMBERS[name], end), int)):
            continue  # a size, which would fill the memory
        in_one_line(lambda end=end: compute(with_value(CONFIG, name, like(NUMBERS[name], end))))  # type: ignore[misc]


def test_what_a_range_says() -> None:
    for limit, x, said in (
        (Within(0), -5, "must be at least 0"),
        (Within(above=0), 0.0, "must be above 0"),
        (Within(above=0), 1e300, "must be at most 1e+30"),
        (Within(0, below=1), 1.0, "must be at least 0 and below 1"),
        (Within(1, 1024), 0, "must be at least 1 and at most 1024"),
        (Within(), math.nan, "must be finite"),
        (Within(), LARGEST, ""),
        (Within(0, below=1), 0, ""),
    ):
        assert limit.fault(x) == said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: OptimConfig(condition_lr=-5.0), "config: optim.condition_lr -5.0 must be at least 0 and"),
        (lambda: OptimConfig(betas=(2.0, 3.0)), "config: optim.betas 2.0 3.0 must be at least 0 and below 1"),
        (lambda: OptimConfig(weight_decay=-0.1), "config: optim.weight_decay -0.1 must be at least 0"),
        (lambda: OptimConfig(lr=1e300), "config: optim.lr 1e+300 must be at most 1e+30"),
        (lambda: replace(CONFIG, trained=("",)), "config: trained holds an empty text; leave it out"),
        (lambda: EncoderConfig(hidden_size=-5), "config: encoder.hidden_size -5 must be at least 1"),
        (lambda: EncoderConfig(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        (lambda: EncoderConfig(head_dim=3), "config: encoder.head_dim 3 must be even"),
        (lambda: TransformerConfig(norm_eps=math.nan), "config: transformer.norm_eps nan must be finite"),
        (lambda: Settings(steps=9_999_999_999), "sample: steps 9999999999 must be at least 1 and at most 10000"),
        (lambda: Drawing(steps=(1, 0)), "evaluate: --steps 1 0 must be at least 1"),
    ],
)
def test_what_is_said_of_a_number(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate a --run none --out none --steps 9999999999", "generate: --steps 9999999999 must be at least 1 and"),
        ("convert none --out none --time-scale nan", "convert: --time-scale nan must be finite"),
        ("paper --seeds 0", "paper: --seeds 0 must be at least 1"),
        ("plan digits --steps 9999999999", "config: steps 9999999999 must be at least 1 and at most 9999999"),
        ("train digits --out none --steps 9999999999", "config: steps 9999999999 must be at least 1 and at most 999"),
        ("train digits --out none --trained=", "config: trained holds an empty text"),
        ("train digits --out none --optim.betas 2 3", "config: optim.betas 2.0 3.0 must be"),
    ],
)
def test_a_command_says_it(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["emf", *words.split()])
    with pytest.raises(SystemExit) as end:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and said in line, line


WORDS = [[name] for name, command in COMMANDS.items() if name not in GROUPS and limits_of(command)]
WORDS += [[group, name] for group, commands in GROUPS.items() for name in commands]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_command_is_named_as_it_is_typed(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One number of the command's own, and one of each dataclass whose fields are its flags."""
    command = (GROUPS[words[0]] if len(words) > 1 else COMMANDS)[words[-1]]
    needed = []
    for name, argument in inspect.signature(command).parameters.items():
        if argument.default is inspect.Parameter.empty:
            told = "Positional" in repr(get_type_hints(command, include_extras=True)[name])
            needed += ["none"] if told else [f"--{name.replace('_', '-')}", "none"]
    for kind, name in dict(numbers(command)).items():
        odd = int(limits_of(kind)[name].least) - 1 if limits_of(kind)[name].above is None else -1
        said = f"--{name.replace('_', '-')}"
        monkeypatch.setattr("sys.argv", ["emf", *words, *needed, f"{said}={odd}"])
        with pytest.raises(SystemExit) as end:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith(f"error: {words[0]}: {said} {odd}"), line
        assert "must be" in line


def test_arguments_of_commands_are_looked_at_by_their_types() -> None:
    """As those of dataclasses are: a command that gets a number without a range fails the first test here."""
    assert limits_of(COMMANDS["generate"])["seed"] == Within(0, below=2**43)
    assert "captions" not in limits_of(COMMANDS["generate"])
    assert "seed" in inspect.signature(COMMANDS["generate"]).parameters
    check_limits(Sampling(), "analyze: --")
