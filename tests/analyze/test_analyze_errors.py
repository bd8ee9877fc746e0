"""What a user of `emf analyze` gets wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from analyzed import write_coco, write_models, write_run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def digit_runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    return [f"{n}={write_run(root / n, i)}" for i, n in enumerate(("one", "two"))]


def analyze(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """(exit code, stderr) of `emf analyze ...`."""
    from emf.cli.main import main

    monkeypatch.setattr("sys.argv", ["emf", "analyze", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("discriminability A=clip:{none} --data {coco} --out {out}", "names no folder; expected FOLDER of a text"),
        (
            "discriminability A={coco} --data {coco} --out {out}",
            "is no run, no export and no text encoder's folder (",
        ),
        ("discriminability A=clip:{m}/clip A=t5:{m}/t5 --data {coco} --out {out}", "two encoders are called A"),
        ("discriminability --data {coco} --out {out}", "no encoder"),
        ("discriminability A=t5:{m}/clip --data {coco} --out {out} --dino {m}/dinov2", "is no T5EncoderModel"),
        ("discriminability A=clip:{m}/clip --data {none} --out {out}", "does not exist; expected COCO's folder"),
        (
            "discriminability A=clip:{m}/clip --data {coco} --split val2017 --out {out}",
            "captions_val2017.json does not",
        ),
        ("discriminability A=clip:{m}/clip --data {m} --out {out}", "holds no image with a caption"),
        ("discriminability A=clip:{m}/clip --data {coco} --out {out} --dino {m}/t5", "its model_type is t5"),
        ("discriminability A=clip:{m}/clip --data {coco} --out {out} --dino {none}", "cannot be loaded as DINO"),
        (
            "discriminability A=clip:{m}/clip --data {coco} --out {full} --dino {m}/dinov2",
            "exists without settings.json, so it was made by something else",
        ),
        ("discriminability A=clip:{m}/clip --data {coco} --out {out} --k 0", "--k 0 must be at least 1"),
        ("disentanglement A=clip:{m}/clip --prompts {none} --out {out}", "does not exist; expected a folder of texts"),
        ("disentanglement A=clip:{m}/clip --prompts {p} --out {out} --unit sentence", "choose a smaller --unit"),
        ("disentanglement A=clip:{m}/clip --prompts {p} --out {out} --fraction 1", "above 0 and below 1"),
        ("encoders A=clip:{none} --out {out}", "names no folder; expected FOLDER of a text"),
        ("encoders digits:large --out {out}", "the digits' own encoders are trained, blurred, bag-of-words, random"),
        ("encoders {m}/clip --data {coco} --out {out}", "--data without --prompts; give both"),
        ("encoders {m}/clip --out {full}", "exists without settings.json, so it was made by something else"),
        ("encoders digits:random --prompts {p} --data {coco} --dino {m}/dinov2 --out {out}", "digits: word "),
        (
            "encoders A=clip:{m}/clip --data {coco} --prompts {p} --split val2017 --dino {m}/dinov2 --out {out}",
            "captions_val2017.json does not",
        ),
        ("steps a={one} --out {out}", "1 backbones; give two or more"),
        ("steps a={one} b={none} --out {out}", "no such folder"),
        ("steps a={one} b={mean} --out {out}", "was trained for MeanFlow"),
        ("steps a={one} b={one} --out {out} --steps 1", "expected two different numbers of steps"),
        ("steps a={one} b={m}/clip --out {out}", "it holds no run"),
        ("steps a={one} b={one} --out {out} --prompts {p}", "leave --prompts out"),
    ],
)
def test_wrong_arguments_are_one_line(
    models: Path,
    digit_runs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    said: str,
) -> None:
    (tmp_path / "p.txt").write_text("a prompt\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.md").write_text("mine")
    places = dict(m=models, none=tmp_path / "none", out=tmp_path / "out", p=tmp_path / "p.txt", full=tmp_path / "full")
    places |= dict(one=digit_runs[0].partition("=")[2], coco="")
    if "{coco}" in arguments:
        places["coco"] = write_coco(tmp_path / "coco", 3)
    if "{mean}" in arguments:
        places["mean"] = write_run(tmp_path / "mean", 0, "meanflow")
    code, printed = analyze(monkeypatch, capsys, *arguments.format(**places).split())
    line = printed.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and said in line
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert (tmp_path / "full" / "results.md").read_text() == "mine"
