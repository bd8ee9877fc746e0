"""The documentation: the README's bounds, links that lead somewhere, commands that exist, flags that commands have."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
from places import ROOT

from emf.recipes import RECIPES

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md"]
    + [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WIDTH = 120
page = pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


def pieces(file: Path) -> list[str]:
    """Every line of code of a page, in blocks and in backticks; a line that ends in a backslash goes on."""
    text = file.read_text()
    blocks = [body for language, body in FENCE.findall(text) if language != "python"]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    return [*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]


def calls(file: Path, program: str) -> list[list[str]]:
    """The words of every call of a program that a page names: `emf`, `make` and their like."""
    found = []
    for piece in pieces(file):
        for part in re.split(r"&&|;|\|", piece.split(" #")[0]):
            try:
                words = shlex.split(part)
            except ValueError:  # half a quotation: no command
                continue
            words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if words[:1] == [program] and len(words) > 1 and re.fullmatch(r"[a-z]\w*", words[1]):
                found.append(words[1:])
    return found


def test_the_readme_is_short_and_narrow() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > WIDTH] == []


@page
def test_prose_is_narrow(page: Path) -> None:
    """Tables and commands may be wider: neither can be broken."""
    prose = FENCE.sub("", page.read_text()).splitlines()
    assert [line for line in prose if len(line) > WIDTH and not line.startswith(("|", "![", "- ["))] == []


@page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@page
def test_every_file_in_backticks_is_there(page: Path) -> None:
    """A path that begins with a folder of the repository is one of its files or folders, a pattern matches one."""
    folders = "emf|kernels|bench|tests|profiles|docs|examples"
    named = [p for p in pieces(page) if re.fullmatch(rf"(?:{folders})/[\w./*-]*", p)]
    assert [name for name in named if not any(ROOT.glob(name.rstrip("/")))] == []


@page
def test_every_verb_of_emf_is_there(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`emf` and its groups are asked for their help, and must name the verb."""
    for words in calls(page, "emf"):
        verb, *rest = words
        assert verb in verbs("", capsys), words
        if verb in GROUPS and rest and re.fullmatch(r"[a-z]+", rest[0]):
            assert rest[0] in verbs(verb, capsys), words


GROUPS = ("evaluate", "analyze", "data")
HELP: dict[str, str] = {}


def help_of(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `emf ARGUMENTS --help` prints."""
    if arguments not in HELP:
        pytest.importorskip("tyro")
        from emf.cli.main import main

        with mock.patch.object(sys, "argv", ["emf", *arguments.split(), "--help"]), pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, arguments
        HELP[arguments] = capsys.readouterr().out
    return HELP[arguments]


def verbs(group: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The commands that a help page lists, in braces or one a line."""
    text = help_of(group, capsys)
    listed = re.findall(r"^[│•* ]+([a-z]+)(?:  .*)?$", text, re.MULTILINE)
    return {*listed, *(name for names in re.findall(r"\{([a-z,\s]+)\}", text) for name in re.split(r"[,\s]+", names))}


@page
def test_every_flag_is_one_of_its_commands(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of `emf VERB --flag`, and of `deepspeed --module emf.train RECIPE --flag`."""
    every = calls(page, "emf")
    for piece in pieces(page):
        launched = re.search(r"(?:--module|-m) (emf\.train|emf\.cli) (.*)", piece.split(" #")[0])
        if launched and "..." not in piece:
            every.append((["train"] if launched[1] == "emf.train" else []) + shlex.split(launched[2]))
    for words in every:
        flags = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        plain = [word for word in words[1:] if re.fullmatch(r"[a-z][\w.-]*", word)]
        if words[0] in ("train", "plan"):
            recipe = plain[0] if plain and plain[0] in RECIPES else "digits"
            command = f"{words[0]} {recipe}"
        else:
            command = " ".join([words[0], *plain[:1]]) if words[0] in GROUPS and plain else words[0]
        if command in GROUPS:
            continue
        text = help_of(command, capsys)
        assert [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)] == [], words


@page
def test_every_target_of_make_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[-1] if "=" not in words[-1] else words[0] for words in calls(page, "make")}
    assert named <= targets


def test_the_faq_names_every_reason_for_which_a_sample_is_dropped() -> None:
    """As a run and `emf data inspect` print it."""
    faq, reasons = (ROOT / "docs" / "faq.md").read_text(), set[str]()
    for name in ("data/sources.py", "data/images.py", "files/decoding.py"):
        text = (ROOT / "emf" / name).read_text()
        reasons |= set(re.findall(r'(?:drops\.add|BrokenImage)\(.*?"([a-z][a-z ]+)"', text))
        reasons |= set(re.findall(r'ValueError\(f?"((?!data)[a-z][a-zA-Z0-9 -]+):[ "]', text))
        reasons |= set(re.findall(r'"((?:no|second|neither) [a-z ]+)"', text))
    reasons.discard("reason")  # a docstring's
    assert len(reasons) == 19
    assert sorted(reason for reason in reasons if f"`{reason}`" not in faq) == []
