"""Where a run's files lie: it works and resumes from any folder, however its paths are spelled, and after a move."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from training import metrics, train

pytest.importorskip("deepspeed")

from emf import config as configs
from emf.config import ConditionConfig, Config
from emf.network.build import encoder
from emf.recipes import BASE, digits, sana_1600m
from emf.sample.sampler import Sampler
from emf.train.paths import located, whole_source
from emf.train.takeover import check_same_run
from emf.weights.start import with_encoder


def with_files(config: Config, **data: Any) -> Config:
    return replace(config, data=replace(config.data, **data))


def test_every_path_of_a_config_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "below")
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog")
    config = replace(sana_1600m(), init=Path("link/../start"))
    config = with_files(config, sources=("a.tar", "b@2", "c@2@text"), vae=Path("vae"), ta_tok=Path("/t/ta_tok.pth"))
    config = replace(config, zero=replace(config.zero, json=Path("ds.json")))
    config = replace(config, run=replace(config.run, prompts=("a cow", "prompts.txt"), eval_every=1))
    got = located(config)
    assert got.init == tmp_path / "real" / "start"  # as the system takes .. behind a link
    assert got.data.sources == (f"{tmp_path}/a.tar", f"{tmp_path}/b@2", f"{tmp_path}/c@2@text")
    assert (got.data.vae, got.data.ta_tok) == (tmp_path / "vae", Path("/t/ta_tok.pth"))
    assert got.zero.json == tmp_path / "ds.json" and got.run.prompts == ("a cow", "a cat", "a dog")
    assert located(got) == got
    assert located(digits()).init == BASE  # shipped, by name
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        located(replace(config, run=replace(config.run, prompts=("none.txt",))))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("x/{0..3}.tar", "HERE/x/{0..3}.tar"),
        ("*.tar@0.5", "HERE/*.tar@0.5"),
        ("/abs/a.tar@2", "/abs/a.tar@2"),
        ("https://host/a.tar", "https://host/a.tar"),
        (".", "HERE@1.0"),  # the folder's own name ends in an @ and a number
    ],
)
def test_sources_keep_their_weights(text: str, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "set@3"
    here.mkdir()
    monkeypatch.chdir(here)
    assert whole_source(text) == want.replace("HERE", str(here))


def saved(folder: Path, config: Config, **changes: str) -> Path:
    """A checkpoint's folder whose config.json is the config's; changes: texts in it to be replaced."""
    folder.mkdir()
    text = configs.to_json(config)
    for old, new in changes.items():
        text = text.replace(f'"{old}', f'"{new}')
    (folder / "config.json").write_text(text)
    return folder


def asked(config: Config) -> Config:
    """As a run takes it."""
    return located(with_encoder(config))


def test_the_same_place_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("start", "other", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("start")
    (tmp_path / "start" / "config.json").write_text('{"source": {}, "transformer": {}}')  # as emf convert writes it
    config = located(with_files(replace(sana_1600m(), init=Path("start")), sources=("cache@2",)))
    old = saved(tmp_path / "old", config)
    for spelled in ("link", "./start/", "other/../start", str(tmp_path / "start")):
        check_same_run(asked(replace(config, init=Path(spelled))), old)
    check_same_run(asked(with_files(config, workers=7, listings=Path("/x"))), old)
    further = with_files(asked(config), sources=(f"{tmp_path}/cache@3",))
    for other in (replace(asked(config), init=tmp_path / "other"), further):
        with pytest.raises(ValueError, match="another run"):
            check_same_run(other, old)
    # what was moved may be named anew: the encoder too, which lay in the folder of init
    for name in ("start", "cache"):
        (tmp_path / name).rename(tmp_path / f"moved {name}")
    moved = with_files(config, sources=(f"{tmp_path}/moved cache@2",))
    check_same_run(asked(replace(moved, init=tmp_path / "moved start")), old)
    check_same_run(replace(moved, condition=replace(config.condition, folder=tmp_path / "moved start")), old)
    with pytest.raises(ValueError, match="another run"):
        check_same_run(with_files(config, sources=(f"{tmp_path}/moved cache@1",)), old)


def test_a_moved_encoder_or_autoencoder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(ValueError, match=r"no folder .*gone.*--condition.folder for emf train, --text"):
        encoder(replace(sana_1600m(), condition=ConditionConfig("gemma", gone)))
    from emf.sample import sampler

    config = with_files(digits(), vae=gone)
    network = encoder(config)
    monkeypatch.setattr(sampler, "at_weights", lambda run, read: (config, network, run))
    with pytest.raises(ValueError, match=r"no folder .*gone, .*autoencoder.* --vae"):
        Sampler.load(tmp_path)


def test_a_run_goes_on_from_another_folder(recipe: list[str], straight: Path, base: Path, tmp_path: Path) -> None:
    """Started with relative paths, resumed from elsewhere by its own config.json."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "base.safetensors").write_bytes(base.read_bytes())
    flags = [*recipe, "--init", "base.safetensors", "--out", "run"]
    result = train(tmp_path, *flags, "--run.save-every", "4", "--steps", "6", before=partial(os.chdir, here))
    assert result.code == 0, result.text
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["init"] == str(here / "base.safetensors") and metrics(here / "run") == metrics(straight)
    again = [str(here / "run" / "config.json"), "--out", "../here/run", "--resume", "True", "--steps", "8"]
    result = train(tmp_path, *again, before=partial(os.chdir, there))
    assert result.code == 0 and "step 7/8" in result.text and "step 6/8" not in result.text, result.text
