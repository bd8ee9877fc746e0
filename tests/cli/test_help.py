"""Help: it is there for every command, says what there is, and comes at once."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from emf.recipes import RECIPES

HEAVY = ("torch", "triton", "numpy", "transformers", "diffusers", "deepspeed", "sklearn", "matplotlib", "PIL")
COMMANDS = {
    "": ["train", "generate", "evaluate", "report", "release", "plan", "Score: digits", "fid"],
    "train": ["usage: emf train", *RECIPES, "--out", "--resume"],
    "train digits": ["--optim.lr", "--zero.stage {0,1,2,3}", "--transformer.time-scale", "Largest norm", "--out"],
    "train sana-1.5-1.6b": ["--condition.kind", "--data.sources", "--lora.rank", "default: blip3o"],
    "generate": ["a red seven", "--run", "--out", "--steps", "--guidance", "--flow-matching"],
    "app": ["a run's folder", "in a browser", "--port", "--host", "127.0.0.1", "--vae"],
    "evaluate": ["digits", "geneval", "dpg", "hps", "pick", "fid"],
    "evaluate digits": ["a run's folder", "--per-tag"],
    "evaluate geneval": ["metadata.jsonl", "--detections", "results.md", "--checkpoint", "--steps"],
    "evaluate dpg": ["dpg_bench.csv", "--questions", "--checkpoint"],
    "evaluate hps": ["HPS_v2.1_compressed.pt", "--weights", "--checkpoint"],
    "evaluate pick": ["emf generate", "--network", "--tokenizer"],
    "evaluate fid": ["--real", "inception-2015-12-05.pt", "--weights"],
    "analyze": ["encoders", "discriminability", "disentanglement", "steps"],
    "analyze encoders": ["[NAME=][KIND:]FOLDER", "digits:trained", "--data", "--prompts", "--pooling"],
    "analyze discriminability": ["[NAME=][KIND:]FOLDER", "--data", "--pooling", "--queries"],
    "analyze disentanglement": ["[NAME=][KIND:]FOLDER", "--unit", "--fraction"],
    "analyze steps": ["NAME=FOLDER", "--guidance", "--per-tag"],
    "report": ["a run's folder", "report.html"],
    "plan": ["usage: emf plan", *RECIPES, "--gpus", "--memory"],
    "plan digits": ["--gpus", "--memory", "--mfu", "--zero.stage {0,1,2,3}", "--transformer.time-scale", "--out"],
    "convert": ["SOURCE", "--allow-missing", "--shard-gb"],
    "data": ["inspect"],
    "data inspect": ["SOURCES", "--size", "--limit"],
    "cache": ["SOURCES", "--vae", "--ta-tok", "--parts"],
    "export": ["EMFPipeline.from_pretrained", "--base", "--text"],
    "release": ["a run's folder", "--out", "must not exist"],
    "paper": ["results.json", "--quick", "--jobs"],
    "openmoji": ["report-openmoji.html", "--quick", "--pictures", "--base-steps"],
}
LIST_HEAVY = f"print('imported', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
HELP = f"""
import sys
from emf.cli.main import main
try:
    main()
except SystemExit as end:
    {LIST_HEAVY}
    raise
"""


def python(*arguments: str) -> tuple[str, str, float]:
    """(stdout, stderr, seconds of a processor) of a Python that ends well."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | dict(PYTHONPATH=path, COLUMNS="200")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, done.stderr, took


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_at_once(command: str) -> None:
    """Without importing what computes, and in little of a processor's time: it takes a quarter of a second to one, and
    the list of commands, which is asked for most, may take less than the rest."""
    said, errors, took = python("-c", HELP, *command.split(), "--help")
    assert errors == "imported\n" and took < (2.5 if command else 1.5), (errors, took)
    text = " ".join(said.replace("│", " ").split())
    assert len(text.split()) > 15
    for word in COMMANDS[command]:
        assert word in text, word


HELPED = [*(ROOT / "emf" / "cli").glob("*.py")]
HELPED += [
    ROOT / "emf" / f"{name}.py" for name in ("config", "flow_config", "data/batches", "data/world", "model/sizes")
]
HELPED += [
    ROOT / "emf" / f"{name}.py" for name in ("analyze/choices", "evaluate/drawing", "train/command", "train/hardware")
]


@pytest.mark.parametrize("file", HELPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_flags_help_stands_alone(file: Path) -> None:
    """It says what the flag is: no bare "of the noise", which needs the name before it, and no single word."""
    told = re.findall(r'^    """(.+?)(?:"""|$)|^        \w+: (.+)$', file.read_text(), re.MULTILINE)
    for text in (field or argument for field, argument in told):
        assert not re.match(r"(of|its|their|them|as|default)\b|\.\.\.", text, re.IGNORECASE), text
        assert len(text.split()) > 2, text


@pytest.mark.parametrize("module", ["emf", "emf.cli"])
def test_without_arguments_it_is_help(module: str) -> None:
    assert "release" in python("-m", module)[0]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["digits", "--help"]], ids=str)
def test_the_module_of_training_answers_as_the_command(arguments: list[str]) -> None:
    """What `deepspeed --module emf.train` starts."""
    assert python("-m", "emf.train", *arguments)[0] == python("-m", "emf", "train", *arguments)[0]


def test_every_command_is_asked(tmp_path: Path) -> None:
    from emf.cli.main import COMMANDS as groups

    assert {name.split()[0] for name in COMMANDS if name} == set(groups)


def test_an_older_installation_still_finds_the_command() -> None:
    """Its script says `from emf.cli import main`, until it is installed again."""
    code = "import sys; from emf.cli import main; sys.argv = ['emf', '--help']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr
