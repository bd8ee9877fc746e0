"""What the folder after --init knows need not be said again; what is said goes before it. Costs seconds: no weights of
the published sizes, and no step is made."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import exported
import pytest
import sana
from digits_run import small_config, small_run

from emf.config import Config
from emf.train.command import parse_train
from emf.weights.convert import convert
from emf.weights.export import write_export
from emf.weights.start import started


def parsed(line: str) -> Config:
    return parse_train([*line.split(), "--out", "x"])[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("sizes") / "run")


def test_of_a_run(run: Path) -> None:
    theirs = small_config()
    for spelling in (f"--init {run}", f"--init={run}", f"--init none --init {run}"):
        config = parsed(f"digits {spelling} --batch-size 8")
        assert config.transformer == theirs.transformer and config.encoder == theirs.encoder
        assert config.init == run and config.batch_size == 8
    started(config)  # and the weights fit
    assert parsed("digits").transformer.num_layers == 5
    assert parsed(f"digits --init {run / 'model.safetensors'}").transformer.num_layers == 5  # a file says no sizes


def test_what_is_said_goes_before_it(run: Path) -> None:
    config = parsed(f"digits --transformer.num-layers 2 --init {run} --transformer.checkpointing")
    assert config.transformer == replace(small_config().transformer, num_layers=2, checkpointing=True)
    with pytest.raises(ValueError, match=r"is of other sizes than the config's; say --transformer.num-layers 1$"):
        started(config)


def test_of_a_config_file(run: Path, tmp_path: Path) -> None:
    """Its own --init stays with its own sizes; another one on the command line brings its own."""
    file = tmp_path / "config.json"
    file.write_text((run / "config.json").read_text().replace('"num_layers": 1', '"num_layers": 3'))
    assert parsed(str(file)).transformer.num_layers == 3
    assert parsed(f"{file} --init {run}").transformer.num_layers == 1


def test_of_what_was_converted_or_exported(tmp_path: Path) -> None:
    sana.diffusers_model().save_pretrained(tmp_path / "source" / "transformer")
    convert(tmp_path / "source" / "transformer", tmp_path / "start", time_scale=3.0)
    write_export(exported.network().state_dict(), exported.CONFIG, tmp_path / "export", base=None, text=None)
    for folder, time_scale in (("start", 3.0), ("export", 10.0)):
        config = parsed(f"sana-1.5-1.6b --init {tmp_path / folder}")
        assert {k: v for k, v in asdict(config.transformer).items() if k in sana.OURS} == sana.OURS, folder
        assert config.transformer.dual_time and config.transformer.time_scale == time_scale
    single = parsed(
        f"sana-1.5-gemma --init {tmp_path / 'start'} --objective flow_matching --transformer.dual-time False"
    )
    assert not single.transformer.dual_time and single.transformer.num_layers == sana.OURS["num_layers"]


def test_a_base_without_time_embedders_leaves_their_scale_to_the_recipe(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    text = (run / "config.json").read_text().replace('"meanflow"', '"flow_matching"')
    (base / "config.json").write_text(
        text.replace('"dual_time": true', '"dual_time": false').replace('"time_scale": 10.0', '"time_scale": 1.0')
    )
    (base / "model.safetensors").touch()
    assert parsed(f"digits --init {base}").transformer == small_config().transformer


def test_a_folder_of_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a run with a checkpoint, nor from emf convert or emf export"):
        parsed(f"digits --init {tmp_path}")
    with pytest.raises(ValueError, match="no file"):
        started(parsed(f"digits --init {tmp_path / 'absent'}"))
