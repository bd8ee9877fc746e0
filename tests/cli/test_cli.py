"""The commands: help that can be read, files that come out, and one line for what a user gets wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from places import ROOT
from safetensors.torch import load_file, save_file

from emf import config as configs
from emf.cli.main import main
from emf.config import Config
from emf.network.build import build
from emf.recipes import RECIPES, from_file
from emf.weights.start import started


def emf(*arguments: str) -> int:
    """Exit code of `emf ...` in this process."""
    before, sys.argv = sys.argv, ["emf", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def one_line(text: str) -> str:
    """The message of a command that failed."""
    (line,) = text.strip().splitlines()
    assert line.startswith("error: ") and len(line) > 20
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network as a run leaves it."""
    base = RECIPES["digits"]()
    small = replace(base.transformer, num_layers=1, num_attention_heads=2, num_cross_attention_heads=1)
    config = replace(base, init=None, transformer=small)
    folder = tmp_path_factory.mktemp("run")
    checkpoint = folder / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(build(config).state_dict(), checkpoint / "model.safetensors")
    for where in (folder, checkpoint):
        (where / "config.json").write_text(configs.to_json(config))
    (folder / "checkpoints" / "step_0000002.part").mkdir()  # half-written, newer
    return folder


def test_as_a_program() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "emf.cli", "evaluate", "digits", "no/such/run"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and "no/such/run" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train nothing --out {}/x", "no recipe 'nothing'; recipes are digits-base, digits"),
        ("train {}/none.json --out {}/x", "no file"),
        ("train digits", "--out DIR"),
        ("generate --run {}/none --out {}/x -- a", "none holds no checkpoint, for there is no such folder; expected"),
        ("evaluate digits {}/none", "holds no checkpoint"),
        ("evaluate geneval {}/none --out {}/x", "no folder"),
        ("plan abacus", "no recipe 'abacus'; recipes are digits-base"),
        ("plan digits --batch-size 0", "batch_size 0 must be at least 1"),
        ("plan digits --batch-size -8", "batch_size -8 must be at least 1"),
        ("plan digits --gpus 0", "--gpus 0 must be at least 1"),
        ("plan digits --gpus 3", "no multiple of 3 ranks"),
        ("plan digits --mfu 0", "mfu 0.0"),
        ("plan digits --flow.share 2 2", "flow.share"),
        ("plan digits --gpu abacus", "--gpu"),
        ("plan digits --recipe digits-full", "--recipe digits-full has no effect"),
        ("train digits --recipe digits-full --out {}/x", "--recipe digits-full has no effect"),
        ("report {}/none", "none does not exist"),
        (
            "generate --run {}/none --out {}/x --seed 9223372036854775807 -- a",
            "--seed 9223372036854775807 must be",
        ),
        ("generate --run {}/none --out {}/x --steps 0 -- a", "generate: --steps 0 must be at least 1"),
        ("generate --run {}/none --out {}/x -n 0 -- a", "generate: --n 0 must be at least 1"),
        ("generate --run {}/none --out {}/x", "give captions, or --prompts"),
        ("release {}/none --out {}/x", "holds no checkpoint"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    assert emf(*arguments.format(tmp_path, tmp_path).split()) == 2
    assert message in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    ["fly", "generate", "evaluate digits", "evaluate fly", "release x --out y --speed 3", "train digits --stepz 3"],
)
def test_unknown_commands_and_options(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    assert emf(*arguments.split()) == 2
    one_line(capsys.readouterr().err)


def test_only_the_wrong_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emf("generate", "--run", str(tmp_path), "--out", str(tmp_path / "x"), "--steps", "0", "--", "a") == 2
    line = one_line(capsys.readouterr().err)
    assert not any(word in line for word in ("guidance", "seed", "batch")), line


def test_a_file_of_another_kind_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "empty.txt").write_text("\n")
    out = ["--out", str(tmp_path / "out")]
    assert emf("generate", "--run", str(tmp_path), *out, "--prompts", str(tmp_path / "empty.txt")) == 2
    assert f"{tmp_path / 'empty.txt'} holds no caption" in one_line(capsys.readouterr().err)
    (tmp_path / "bin.txt").write_bytes(bytes(99))
    assert emf("train", str(tmp_path / "bin.txt"), *out) == 2
    assert f"{tmp_path / 'bin.txt'} is a file, but no .json" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_benchmarks_look_at_the_images_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any network is loaded, or a file fetched from the Hub."""

    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("fetched, or loaded")

    for name in ("detector.HFDetector.load", "hps.load_clip", "dpg.BlipVQA.load", "pictures.hps_prompts"):
        monkeypatch.setattr(f"emf.evaluate.{name}", fetched)
    empty, weights, out = tmp_path / "empty", tmp_path / "hps.pt", ["--out", str(tmp_path / "out")]
    empty.mkdir()
    weights.touch()
    assert emf("evaluate", "geneval", str(empty), *out) == 2
    assert f"{empty} holds no prompts" in one_line(capsys.readouterr().err)
    assert emf("evaluate", "dpg", str(empty), *out, "--questions", str(tmp_path / "none.csv")) == 2
    assert f"{empty} holds no images" in one_line(capsys.readouterr().err)
    assert emf("evaluate", "hps", str(empty), *out, "--weights", str(weights)) == 2
    assert f"{empty / 'anime'} holds no images" in one_line(capsys.readouterr().err)
    assert emf("evaluate", "hps", *out, "--weights", str(weights)) == 2
    assert "give a folder of images" in one_line(capsys.readouterr().err)
    for style in ("anime", "concept-art", "paintings", "photo"):
        (empty / style).mkdir()
        (empty / style / "00000.jpg").touch()
    assert emf("evaluate", "hps", str(empty), *out, "--weights", str(tmp_path / "none.pt")) == 2
    assert "none.pt does not exist" in one_line(capsys.readouterr().err)


def test_generate_writes_and_never_overwrites(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, caption = tmp_path / "images", "a red seven"
    here = os.path.relpath(run)  # the manifest says the whole path
    call = ["generate", "--run", here, "--out", str(out), "--n", "2", "--steps", "2"]
    assert emf(*call, "--", caption) == 0
    first = sorted(out.iterdir())
    manifest = out / "manifest.jsonl"
    assert [str(p) for p in first] == [*capsys.readouterr().out.split(), str(manifest)]
    assert [p.name for p in first[:2]] == ["00000_a_red_seven.png", "00001_a_red_seven.png"]
    asked = {"prompt": caption, "steps": 2, "guidance": 1.25, "seed": 0, "run": str(run), "flow_matching": False}
    asked["size"] = "18x18"
    told = [{"file": p.name, "number": i, **asked} for i, p in enumerate(first[:2])]
    assert [json.loads(line) for line in manifest.read_text().splitlines()] == told
    first = first[:2]
    kept = [p.read_bytes() for p in first]
    assert kept[0] != kept[1]  # another noise
    assert Image.open(first[0]).text["prompt"] == caption
    assert emf(*call, "--", caption) == 0
    again = sorted(out.glob("*.png"))
    assert len(again) == 4 and [p.read_bytes() for p in first] == kept
    assert Image.open(again[2]).tobytes() == Image.open(first[0]).tobytes()
    capsys.readouterr()
    assert emf(*call, "--", "a red zebra") == 2
    assert "zebra" in one_line(capsys.readouterr().err)
    assert emf(*call, "--", *[caption] * 5, "a red zebra") == 2  # before the first is drawn, be it the last
    assert "zebra" in one_line(capsys.readouterr().err)
    assert emf(*call[:-1], "0", "--", caption) == 2
    assert "steps" in one_line(capsys.readouterr().err)
    assert emf(*call, "--size", "24", "--", caption) == 2
    assert "size '24'; expected WIDTHxHEIGHT" in one_line(capsys.readouterr().err)
    assert sorted(out.glob("*.png")) == again
    wide = tmp_path / "wide"
    assert emf(*call[:3], "--out", str(wide), "--size", "24x12", "--", caption) == 0
    assert [Image.open(p).size for p in wide.glob("*.png")] == [(8 * 24, 8 * 12)]  # small ones are enlarged
    assert json.loads((wide / "manifest.jsonl").read_text())["size"] == "24x12"


def test_release_is_half_precision_and_can_be_started_from(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sub" / "weights.safetensors"
    assert emf("release", str(run), "--out", str(file)) == 0
    assert str(file) in capsys.readouterr().out
    before = file.read_bytes()
    assert {w.dtype for w in load_file(file).values()} == {torch.float16}
    config = from_file(run / "config.json")
    assert isinstance(config, Config) and config.init is None
    want, got = (
        load_file(run / "checkpoints/step_0000001/model.safetensors"),
        started(replace(config, init=file)).state_dict(),
    )
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=1e-6)
        assert got[name].dtype == torch.float32
    assert emf("release", str(run), "--out", str(file)) == 2
    assert "exists" in one_line(capsys.readouterr().err)
    assert file.read_bytes() == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_config_file_is_its_config(recipe: str, tmp_path: Path) -> None:
    config = RECIPES[recipe]()
    file = tmp_path / "config.json"
    changed = replace(
        config,
        init=None if config.init and not config.match.weight else Path("other.safetensors"),
        freeze_encoder=not config.freeze_encoder,
        embedder_init="duplicate" if config.embedder_init == "preserve" else "preserve",
        optim=replace(config.optim, betas=(0.5, 0.75), lr=1.25e-7),
        zero=replace(config.zero, stage=3, json=Path("zero.json"), dtype="bfloat16"),
        transformer=replace(config.transformer, interpolation_scale=None),
    )
    for c in (config, changed):
        file.write_text(configs.to_json(c))
        assert from_file(file) == c
        assert set(json.loads(file.read_text())) == set(c.__dataclass_fields__)


def numbers_of(settings: Any) -> Iterator[tuple[str, Any]]:
    """(name, the settings with NaN, inf there) of every field, at any depth, that holds numbers that may be broken."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            yield from (
                (f"{f.name}.{name}", lambda x, f=f, make=make: replace(settings, **{f.name: make(x)}))
                for name, make in numbers_of(value)
            )
        elif isinstance(value, float):
            yield f.name, lambda x, f=f: replace(settings, **{f.name: x})
        elif isinstance(value, tuple) and value and isinstance(value[0], float):
            yield f.name, lambda x, f=f, value=value: replace(settings, **{f.name: (*value[:-1], x)})


def test_no_setting_takes_nan_or_infinity() -> None:
    found = dict(numbers_of(RECIPES["digits"]()))
    assert {"drop", "optim.clip", "flow.mean", "transformer.time_scale", "condition.ar_weight"} <= found.keys()
    for name, made_with in found.items():
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=name.rpartition(".")[2]):
                made_with(value)


def test_an_export_of_the_digits_draws(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emf("export", str(run), "--out", str(tmp_path / "out")) == 0
    assert f"{tmp_path / 'out'}: whole; its README.md says" in capsys.readouterr().out
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert folders == ["scheduler", "text_encoder", "transformer"]
    assert emf("generate", "a red seven", "--run", str(tmp_path / "out"), "--out", str(tmp_path / "pictures")) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
