"""A converted folder is used as a run is: sampled, exported, compared; and runs and exports can be started from."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
import sana
from exported import write_published, write_start
from same_pictures import assert_same_pictures

from emf.analyze.choices import Sampling
from emf.analyze.names import parse_runs
from emf.analyze.steps import run_steps
from emf.cli.generate import generate
from emf.cli.weights import export
from emf.config import ConditionConfig, Config, to_json
from emf.data.batches import DataConfig
from emf.evaluate.drawing import Drawing
from emf.evaluate.pictures import draw_pictures, geneval_items
from emf.model.sizes import TransformerConfig
from emf.network.build import build
from emf.recipes import RECIPES, digits, digits_base, from_file
from emf.sample.sampler import Sampler
from emf.weights.convert import convert
from emf.weights.folders import load
from emf.weights.start import started, with_encoder
from emf.weights.tensors import items, write_file

CAPTIONS = ("a red cat", "two dogs")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder as SANA's are, with a T5."""
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def start(published: Path) -> Path:
    convert(published, published.parent / "start")
    return published.parent / "start"


def test_a_base_draws_what_was_published(published: Path, start: Path, tmp_path: Path) -> None:
    """Before and after conversion, and out of an export: how a user checks a conversion."""
    for name, folder in (("before", published), ("after", start)):
        generate(CAPTIONS, folder, tmp_path / name, steps=2, flow_matching=True)
    assert_same_pictures(tmp_path / "before", tmp_path / "after")
    first, second = (np.asarray(Image.open(file)).astype(float) for file in sorted((tmp_path / "after").glob("*.png")))
    assert abs(first - second).max() > 1
    export(start, tmp_path / "out", dtype="float32")
    generate(CAPTIONS, tmp_path / "out", tmp_path / "exported", steps=2, flow_matching=True)
    assert_same_pictures(tmp_path / "before", tmp_path / "exported")
    with pytest.raises(ValueError, match="say --flow-matching"):  # its time embedders were made, not trained
        generate(CAPTIONS, start, tmp_path / "none")


def test_a_base_is_evaluated_and_compared(published: Path, start: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    runs = parse_runs([f"published={published}", f"start={start}"])
    panels = run_steps(runs, tmp_path / "few", Sampling(steps=(1, 2)), prompts=tmp_path / "prompts.txt")
    psnr = {name: line[1].mean for name, line in panels["PSNR, dB"].items()}
    assert psnr["start"] == pytest.approx(psnr["published"], abs=0.1)
    (tmp_path / "metadata.jsonl").write_text('{"prompt": "a red cat", "tag": "x", "include": []}\n')
    found, texts = geneval_items(tmp_path / "metadata.jsonl")
    drawing = Drawing(start, steps=(1,), flow_matching=True, images_only=True)
    draw_pictures(found, texts, tmp_path / "drawn", drawing, "cpu")
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4


def test_a_base_without_its_text_encoder_says_so(published: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone"
    sana.diffusers_model().save_pretrained(source)
    convert(source, tmp_path / "start")
    with pytest.raises(ValueError, match=f"{tmp_path}/start holds no text encoder, and neither does {source}"):
        load(tmp_path / "start")


@pytest.mark.parametrize("released", [False, True])
def test_a_blip3o_base_has_its_own_text_parts(tmp_path: Path, released: bool) -> None:
    embed = sana.diffusers_model().time_embed.state_dict()
    more = {f"time_embed_{b}.{k}": v + 1 for b in "tr" for k, v in embed.items()} if released else {}
    write_start(tmp_path / "start", tmp_path / "a", more, shard_gb=1e-5)
    assert len(list((tmp_path / "start").rglob("*-of-*.safetensors"))) > 20  # and read below, the connector whole
    config, network = load(tmp_path / "start")
    assert config.condition == ConditionConfig("blip3o", tmp_path / "start")
    assert config.objective == ("meanflow" if released else "flow_matching")
    assert config.transformer.dual_time == released == hasattr(network.transformer, "time_embed_t")


def run_of(config: Config, folder: Path, seed: int) -> dict[str, Any]:
    """A run's folder with one checkpoint; its weights."""
    torch.manual_seed(seed)
    checkpoint = folder / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    state = {k: v.clone() for k, v in build(config).state_dict().items()}
    write_file(checkpoint / "model.safetensors", items(state))
    for place in (checkpoint, folder):
        (place / "config.json").write_text(to_json(config))
    return state


def small(config: Config, **changes: Any) -> Config:
    sizes = dict(num_layers=1, num_attention_heads=2, num_cross_attention_heads=1, **changes)
    return replace(config, transformer=replace(config.transformer, **sizes))


def test_a_run_starts_from_a_run(tmp_path: Path) -> None:
    state = run_of(small(digits_base()), tmp_path / "base", 1)
    for source in (tmp_path / "base", tmp_path / "base" / "checkpoints" / "step_0000001"):
        got = started(replace(small(digits()), init=source)).state_dict()
        assert all(torch.equal(got[k], v) for k, v in state.items())
    trained = run_of(small(digits()), tmp_path / "trained", 2)
    got = started(replace(small(digits()), init=tmp_path / "trained")).state_dict()
    assert got.keys() == trained.keys() and all(torch.equal(got[k], v) for k, v in trained.items())
    with pytest.raises(ValueError, match="say --transformer.time-scale 10.0$"):
        started(replace(small(digits(), time_scale=1.0), init=tmp_path / "trained"))
    with pytest.raises(ValueError, match="say --transformer.num-layers 1$"):
        started(
            replace(
                small(digits()),
                init=tmp_path / "trained",
                transformer=replace(small(digits()).transformer, num_layers=2),
            )
        )
    (tmp_path / "nothing").mkdir()
    with pytest.raises(
        ValueError, match="nothing is neither a run with a checkpoint, nor from emf convert or emf export"
    ):
        started(replace(small(digits()), init=tmp_path / "nothing"))


def test_a_run_starts_from_a_base_or_its_export(published: Path, start: Path, tmp_path: Path) -> None:
    sizes = TransformerConfig(**sana.OURS, dual_time=True)
    gemma = replace(RECIPES["sana-1.5-gemma"](), transformer=sizes, trained=())
    config = replace(gemma, condition=ConditionConfig("t5", published), init=start)
    want = started(config).transformer.state_dict()
    export(start, tmp_path / "out", dtype="float32")
    exported = replace(config, init=tmp_path / "out", condition=ConditionConfig("t5"))
    assert with_encoder(exported).condition.folder == tmp_path / "out"
    got = started(with_encoder(exported)).transformer.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], v) for k, v in want.items())
    # a run that was begun there, which says where its encoder lies
    checkpoint = tmp_path / "run"
    checkpoint.mkdir()
    write_file(checkpoint / "model.safetensors", items({f"transformer.{k}": v for k, v in want.items()}))
    (checkpoint / "config.json").write_text(to_json(config))
    again = with_encoder(replace(config, init=checkpoint, condition=ConditionConfig("t5")))
    assert again.condition.folder == published
    assert torch.equal(started(again).transformer.state_dict()["proj_out.weight"], want["proj_out.weight"])


def test_how_the_time_embedders_were_made_is_not_said_in_vain(start: Path, published: Path) -> None:
    sizes = TransformerConfig(**sana.OURS, dual_time=True)
    config = replace(RECIPES["sana-1.5-gemma"](), transformer=sizes, trained=(), init=start, embedder_init="preserve")
    with pytest.raises(ValueError, match="say --embedder-init duplicate, or convert with --embedder-init preserve$"):
        started(replace(config, condition=ConditionConfig("t5", published)))


def moved(config: Config, folder: Path) -> Path:
    """A run's folder whose weights are those of its start, all of them moved."""
    network = started(config)
    with torch.no_grad():
        for p in network.transformer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    own = {k: v for k, v in network.state_dict().items() if not (config.condition.folder and k.startswith("encoder."))}
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", items(own))
    (folder / "config.json").write_text(to_json(config))
    return folder


def test_flow_matching_of_a_trained_run_is_its_starts(
    start: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base's own velocity, which the run's weights no longer give; and what was drawn is said."""
    sizes = TransformerConfig(**sana.OURS, dual_time=True)
    config = replace(RECIPES["sana-1.5-gemma"](), transformer=sizes, init=start, data=DataConfig(vae=published))
    run = moved(replace(config, condition=ConditionConfig("t5", published)), tmp_path / "run")
    further = moved(replace(config, condition=ConditionConfig("t5", published), init=run), tmp_path / "further")
    export(run, tmp_path / "exported", dtype="float32")
    generate(CAPTIONS, start, tmp_path / "base", steps=2, flow_matching=True)
    assert "flow matching samples" not in capsys.readouterr().err  # it is plainly the base's
    for trained in (run, further):
        generate(CAPTIONS, trained, tmp_path / trained.name / "pictures", steps=2, flow_matching=True)
        assert_same_pictures(tmp_path / "base", tmp_path / trained.name / "pictures", levels=0)
        said = f"flow matching samples the start of {run}, {start}"
        assert said in capsys.readouterr().err
        for picture in (tmp_path / trained.name / "pictures").glob("*.png"):
            assert Image.open(picture).info["note"] == said
    assert Sampler.load(run, flow_matching=True).stamp == Sampler.load(start, flow_matching=True).stamp
    gone = replace(from_file(run / "config.json"), init=tmp_path / "gone")
    (run / "config.json").write_text(to_json(gone))
    for trained, reason in (
        (run, "its start cannot be had: .*gone"),
        (tmp_path / "exported", "its start is not known"),
    ):
        generate(CAPTIONS, trained, tmp_path / "own" / trained.name, steps=2, flow_matching=True)
        said = capsys.readouterr().err
        assert re.search(f"samples {trained}'s own velocity, which training for few steps has moved; {reason}", said), (
            said
        )
    assert_same_pictures(tmp_path / "own" / "run", tmp_path / "own" / "exported", levels=0)
    with pytest.raises(AssertionError):
        assert_same_pictures(tmp_path / "own" / "run", tmp_path / "base", levels=4)


def test_flow_matching_of_a_digits_run_is_its_bases(tmp_path: Path) -> None:
    config = small(digits_base())
    run_of(config, tmp_path / "base", 1)
    run = moved(replace(small(digits()), init=tmp_path / "base"), tmp_path / "run")
    base, trained = (Sampler.load(folder, flow_matching=True) for folder in (tmp_path / "base", run))
    assert torch.equal(base.images(["a red seven"], steps=2), trained.images(["a red seven"], steps=2))
    assert base.stamp == trained.stamp and not base.note and trained.note
    run_of(replace(small(digits()), init=None), tmp_path / "alone", 2)
    assert Sampler.load(tmp_path / "alone", flow_matching=True).note.endswith("so there is no base to compare with")
