"""`emf`: the commands. What a user got wrong is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
except ImportError:
    raise SystemExit(
        "error: the emf commands need more than the kernels do: pip install 'emf-meanflow[train]'"
    ) from None

from emf.config import Config, one_line
from emf.generate import GUIDANCE
from emf.recipes import RECIPES, from_file

# every field takes a value (`--resume True`), as config.json's fields do
_STYLE = (tyro.conf.FlagConversionOff,)


class Diverged(RuntimeError):
    """A run's loss is NaN or inf."""


RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


@contextmanager
def report_errors() -> Iterator[None]:
    """A ValueError is the user's: its line, exit code 2. A diverged run ends with 3, an interrupted one with 130."""
    try:
        yield
    except (ValueError, Diverged) as error:
        if os.environ.get("RANK", "0") == "0":  # every rank sees the same
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 3) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; --resume True continues from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass(frozen=True)
class _Run:
    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Folder to write: config.json, metrics.jsonl, checkpoints."""
    resume: bool = False
    """Continue from the newest checkpoint in it; without one, start."""


def parse_train(arguments: list[str]) -> tuple[Config, Path, bool]:
    """(config, out, resume) from `<recipe | config.json> --out DIR [--resume True] [--field value ...]`."""
    names = ", ".join(RECIPES)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print("usage: emf train RECIPE|CONFIG.json --out DIR [--resume True] [--field value ...]\n")
        print(
            "Trains in this process; `deepspeed --module emf.train ...` takes the same arguments, for several ranks.\n"
        )
        for name, recipe in RECIPES.items():
            print(f"  {name:14} {(recipe.__doc__ or '').splitlines()[0]}")
        print("\n`emf train RECIPE --help` lists every field with its default.")
        raise SystemExit(0)
    if first in RECIPES:
        config = RECIPES[first]()
    elif first.endswith(".json"):
        config = from_file(Path(first))
    else:
        raise ValueError(f"train: no recipe {first!r}; recipes are {names}, or give a config.json")
    parsed = one_line(
        tyro.cli, _Run, args=arguments[1:], default=_Run(config), prog=f"emf train {first}", config=_STYLE
    )
    if parsed.out is None:
        raise ValueError("train: say where to write: --out DIR")
    return parsed.config, parsed.out, parsed.resume


def generate(
    captions: Annotated[tyro.conf.Positional[list[str]], tyro.conf.arg(metavar="CAPTIONS")],
    run: Path,
    out: Path,
    steps: int = 1,
    guidance: float = GUIDANCE,
    seed: int = 0,
    n: int = 1,
    flow_matching: bool = False,
) -> None:
    """Captions to images with a trained run.

    Args:
        captions: for example "a red seven" "two blue threes"
        run: a run's folder, or one of its checkpoints
        out: folder for the PNG files; files of the same name are not overwritten
        steps: of the sampler; two network evaluations each, one where the run was trained at this guidance
        guidance: classifier-free guidance; 1 is none
        seed: of the noise
        n: images of each caption
        flow_matching: sample the instantaneous velocity with Euler's method instead
    """
    from emf.evaluate.run import load_run
    from emf.generate import generate as to_images
    from emf.generate import write_images

    config, network = load_run(run)
    average = config.objective == "meanflow" and not flow_matching
    every = [c for c in captions for _ in range(n)]
    images = to_images(network, config, every, steps, average=average, guidance=guidance, seed=seed)
    for path in write_images(images, every, out, dict(steps=steps, guidance=guidance, seed=seed, run=str(run))):
        print(path)


def evaluate(run: RunFolder, per_tag: int = 50, guidance: float = GUIDANCE, seed: int = 0) -> None:
    """Score a run: scores.json and samples.png in its folder, few-step EMF beside flow matching by the base it
    started from.

    Args:
        run: a run's folder
        per_tag: prompts of each of the six tasks
        guidance: classifier-free guidance of every sampler
        seed: of the noise
    """
    from emf.evaluate.run import evaluate_run

    evaluate_run(run, per_tag, guidance, seed)


def report(run: RunFolder) -> None:
    """A run's figures, curves and samples as one page: report.html in its folder.

    Args:
        run: a run's folder, evaluated
    """
    from emf.report import write_report

    print(f"open {write_report(run)}")


def release(run: RunFolder, out: Path) -> None:
    """A run's averaged weights in half precision as one safetensors file, to start other runs from (--init).

    Args:
        run: a run's folder, or one of its checkpoints
        out: the file; must not exist
    """
    from emf.evaluate.run import release_run

    print(f"{out}: {release_run(run, out) / 1e6:.2f} MB")


def _deferred(command: Callable[..., None]) -> Callable[..., Any]:
    """A command that is parsed now and called afterwards, its errors being its own."""

    @wraps(command)
    def later(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return partial(command, *args, **kwargs)

    return later


def main() -> None:
    """Entry of `emf`."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"]:
        from emf.train import main as train

        return train(arguments[1:])

    def train_help() -> None:
        """Train a recipe, or a config.json again (`emf train --help`)."""

    commands: dict[str, Any] = {
        "train": train_help,
        "generate": generate,
        "evaluate": evaluate,
        "report": report,
        "release": release,
    }
    with report_errors():
        parser = tyro.extras.subcommand_cli_from_dict
        later = {name: _deferred(command) for name, command in commands.items()}
        one_line(parser, later, args=arguments or ["--help"], prog="emf", config=_STYLE)()


if __name__ == "__main__":
    main()
