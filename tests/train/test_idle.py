"""A setting that cannot act is refused: every field of the config is gone over, where it acts and where it cannot."""

from __future__ import annotations

import ast
from dataclasses import is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cached import cache_settings
from image_files import pairs, write_folder
from places import ROOT
from safetensors.torch import save_file
from tiny import tiny_sana

pytest.importorskip("deepspeed")

from emf.config import Config
from emf.data.drops import Drops
from emf.data.feed import check_sources
from emf.data.sources import Source, scan
from emf.idle import NEEDS, check_idle, chosen, leaves
from emf.recipes import RECIPES, digits
from emf.train import loop
from emf.train.zero.engine import parameter_groups
from emf.weights.branches import scales
from emf.weights.export import release
from emf.weights.start import started

IMAGES = {"data.sources": ("folder",)}
PLAIN = {"objective": "flow_matching", "transformer.dual_time": False}
"""Pure flow matching."""
ALPHA = {"flow.derivative": "alpha"}

Changes = dict[str, Any]
CASES: dict[str, tuple[Any, list[tuple[str, Changes]], list[tuple[str, Changes]]]] = {
    # field: (another value, (recipe, further settings) where it acts, where it cannot)
    "objective": ("flow_matching", [("digits", {"transformer.dual_time": False})], []),
    "init": (Path("weights"), [("digits", {}), ("digits-base", {})], []),
    "embedder_init": (
        "duplicate",
        [("digits", {})],
        [("digits", {"init": None}), ("digits", PLAIN | {"embedder_init": "duplicate"})],
    ),
    "freeze_encoder": (
        True,
        [("digits-base", {})],
        [
            ("digits-base", {"trained": ("transformer.",)}),
            ("digits-base", {"lora.rank": 2}),
            ("sana-1.5-gemma", IMAGES),
            ("sana-1.5-1.6b", IMAGES),
        ],
    ),
    "trained": (("transformer.",), [("digits", {}), ("sana-1.5-1.6b", IMAGES)], []),
    "seed": (1, [("digits", {})], []),
    "steps": (7, [("digits", {"optim.warmup": 2})], []),
    "epochs": (2.0, [("sana-1.5-1.6b", IMAGES)], []),  # without sources no config is made
    "batch_size": (8, [("digits", {})], []),
    "drop": (0.5, [("digits", {})], []),
    "compile": (True, [("digits", {})], []),
    "graphs": (True, [("digits", {})], []),
    "lora.rank": (2, [("digits", {}), ("sana-1.5-1.6b", IMAGES)], []),
    "lora.alpha": (2, [("digits", {"lora.rank": 2})], [("digits", {}), ("sana-1.5-1.6b", IMAGES)]),
    "lora.targets": (("to_q",), [("digits", {"lora.rank": 2})], [("digits", {}), ("sana-1.5-1.6b", IMAGES)]),
    "condition.kind": ("t5", [("sana-1.5-1.6b", IMAGES)], []),
    "condition.folder": (Path("encoder"), [("sana-1.5-gemma", IMAGES)], [("digits", {})]),
    "condition.scale": (3, [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-gemma", IMAGES)]),
    "condition.window": ("released", [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-gemma", IMAGES)]),
    "condition.ar_weight": (0.5, [("sana-1.5-1.6b", IMAGES)], []),  # elsewhere no config is made
    "data.sources": (("folder",), [("sana-1.5-1.6b", {})], []),
    "data.size": (512, [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-1.6b", {})]),
    "data.buckets": (True, [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-1.6b", {})]),
    "data.vae": (Path("vae"), [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-1.6b", {})]),
    "data.ta_tok": (Path("ta_tok.pth"), [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-gemma", IMAGES)]),
    "data.workers": (2, [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-1.6b", {})]),
    "data.listings": (Path("tars.json"), [("sana-1.5-1.6b", IMAGES)], [("digits", {}), ("sana-1.5-1.6b", {})]),
    "flow.sampler": ("uniform", [("digits", {}), ("digits-base", {})], []),
    "flow.schedule": (
        "cosine",
        [("digits", {}), ("digits", {"flow.sampler": "uniform"})],
        [("digits-base", {}), ("digits", PLAIN | {"flow.sampler": "uniform"})],
    ),
    "flow.mean": ((0.0, 0.0), [("digits", {}), ("digits-base", {})], [("digits", {"flow.sampler": "uniform"})]),
    "flow.spread": ((1.5, 1.5), [("digits", {}), ("digits-base", {})], [("digits", {"flow.sampler": "uniform"})]),
    "flow.share": ((0.5, 0.5), [("digits", {})], [("digits-base", {}), ("digits", PLAIN)]),
    "flow.weight_p": (0.5, [("digits", {})], [("digits-base", {}), ("digits", PLAIN)]),
    "flow.weight_c": (1e-2, [("digits", {})], [("digits-base", {}), ("digits", {"flow.weight_p": 0.0})]),
    "flow.guidance": (2.0, [("digits", {})], [("digits-base", {})]),
    "flow.kappa": (0.5, [("digits", {})], [("digits-base", {})]),
    "flow.guidance_interval": (
        (0.2, 0.8),
        [("digits", {"flow.guidance": 2.0}), ("digits", {"flow.kappa": 0.5})],
        [("digits", {}), ("digits-base", {"flow.guidance": 2.0})],
    ),
    "flow.along": (
        "network",
        [("digits", {}), ("digits", {"flow.derivative": "difference"})],
        [("digits-base", {}), ("digits", ALPHA), ("digits", {"flow.share": (0.0, 0.0)})],
    ),
    "flow.derivative": ("difference", [("digits", {})], [("digits-base", {}), ("digits", {"flow.share": (0.0, 0.0)})]),
    "flow.difference_step": (
        0.01,
        [("digits", {"flow.derivative": "difference"})],
        [("digits", {}), ("digits", ALPHA)],
    ),
    "flow.alpha": ((1.0, 0.5), [("digits", ALPHA)], [("digits", {}), ("digits-base", {})]),
    "flow.zero_share": (0.2, [("digits", {})], [("digits-base", {}), ("digits", {"flow.share": (0.0, 0.0)})]),
    "match.weight": (1.0, [("digits", {})], [("digits", PLAIN)]),
    **{
        f"match.{name}": (value, [("digits", {"match.weight": 1.0})], [("digits", {})])
        for name, value in (("share", 0.5), ("steps", (1, 2)), ("guidance", 2.0), ("fake_lr", 2.0), ("begin", 0.1))
    },
    "optim.lr": (1e-2, [("digits", {})], []),
    "optim.condition_lr": (0.5, [("digits", {}), ("blip3o-next-3b", IMAGES)], []),  # see below
    "optim.decay": ("constant", [("digits", {})], [("digits", {"steps": 20, "optim.warmup": 20})]),
    "optim.warmup": (5, [("digits", {})], []),
    "optim.betas": ((0.8, 0.9), [("digits", {})], []),
    "optim.weight_decay": (0.1, [("digits", {})], []),
    "optim.clip": (0.5, [("digits", {})], []),
    "optim.ema": (0.5, [("digits", {}), ("sana-1.5-1.6b", IMAGES)], []),
    "optim.ema_cpu": (True, [("digits", {})], [("digits", {"optim.ema": 0.0}), ("sana-1.5-1.6b", IMAGES)]),
    "zero.stage": (1, [("digits", {})], []),
    "zero.dtype": ("bfloat16", [("digits", {})], []),
    "zero.accumulation": (2, [("digits", {})], []),
    "zero.offload": (True, [("sana-1.5-1.6b", IMAGES)], []),  # without ZeRO no engine's config is made
    "zero.json": (Path("own.json"), [("digits", {})], []),
    "run.log_every": (5, [("digits", {})], []),
    "run.save_every": (5, [("digits", {})], []),
    "run.eval_every": (
        5,
        [("digits-base", {}), ("sana-1.5-1.6b", IMAGES | {"run.prompts": ("a cat",), "data.vae": Path("vae")})],
        [("sana-1.5-1.6b", IMAGES), ("sana-1.5-gemma", IMAGES)],
    ),
    "run.eval_prompts": (
        3,
        [("digits", {}), ("digits-base", {"run.eval_every": 5})],
        [
            ("digits", {"run.eval_every": 0}),
            ("sana-1.5-1.6b", IMAGES | {"run.prompts": ("a cat",), "run.eval_every": 5, "data.vae": Path("vae")}),
        ],
    ),
    "run.keep": (5, [("digits", {})], []),
    "run.skip": (5, [("digits", {})], []),
    "run.prompts": (("a red seven",), [("digits", {})], []),  # without run.eval_every no config is made
    "run.monitor": (("csv",), [("digits", {})], []),
    "transformer.dual_time": (True, [], [("digits-base", {})]),
    "transformer.time_scale": (2.0, [("digits", {})], [("digits-base", {})]),
    **{
        f"world.{name}": (
            value,
            [("digits", further)],
            [("sana-1.5-1.6b", IMAGES | further), ("sana-1.5-gemma", IMAGES | further)],
        )
        for name, value, further in (
            ("size", 20, {"transformer.sample_size": 20}),
            ("pitch", 9, {}),
            ("shift", 1, {"world.pitch": 9}),
            ("jitter", 1, {"world.pitch": 9}),
        )
    },
    **{
        f"encoder.{name}": (value, [("digits", further)], [("sana-1.5-1.6b", IMAGES), ("sana-1.5-gemma", IMAGES)])
        for name, value, further in (
            ("hidden_size", 64, {}),
            ("num_hidden_layers", 0, {}),
            ("out_channels", 64, {"transformer.caption_channels": 64}),
            ("blurred", True, {}),
        )
    },
    **{
        f"encoder.{name}": (
            value,
            [("digits", {})],
            [("sana-1.5-1.6b", IMAGES), ("sana-1.5-gemma", IMAGES), ("digits", {"encoder.num_hidden_layers": 0})],
        )
        for name, value in (
            ("intermediate_size", 64),
            ("num_attention_heads", 2),
            ("num_key_value_heads", 1),
            ("head_dim", 16),
        )
    },
}
"""A transformer's sizes are not here, but for those of its two embedders: a network has all of them."""
EVERY = leaves(digits())
SIZES = {name for name in EVERY if name.startswith("transformer.")} - CASES.keys()


def changed(config: Config, changes: Changes) -> Config:
    """The config with settings by their whole names."""
    sections: dict[str, Any] = {}
    for name, value in changes.items():
        section, _, leaf = name.rpartition(".")
        if section:
            sections.setdefault(section, {})[leaf] = value
        else:
            sections[leaf] = value
    made = {k: replace(getattr(config, k), **v) if is_dataclass(getattr(config, k)) else v for k, v in sections.items()}
    return replace(config, **made)


def test_every_field_is_gone_over() -> None:
    assert EVERY.keys() - {"recipe"} == CASES.keys() | SIZES
    assert all(is_read(name.rpartition(".")[2]) for name in EVERY)
    assert all(any(f == start or f.startswith(start) for f in EVERY) for start, _, _ in NEEDS)


@cache
def read_names() -> frozenset[str]:
    """Names that code of emf reads of something, in the files that do not only define settings."""
    defining = ("config.py", "recipes.py", "idle.py", "flow_config.py", "sizes.py", "batches.py")
    files = [f for f in (ROOT / "emf").rglob("*.py") if f.name not in defining]
    nodes = [n for f in files for n in ast.walk(ast.parse(f.read_text()))]
    return frozenset(n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))


def is_read(field: str) -> bool:
    """Whether a setting's name is read anywhere but where it is defined: one that is not does nothing."""
    return field in read_names()


@pytest.mark.parametrize("field", CASES)
def test_a_setting_acts_or_is_refused(field: str, tmp_path: Path) -> None:
    """Where it acts it is taken; where it cannot, the run is refused in one line before anything is written; and where
    nobody chose it, the recipe's own value is taken there."""
    value, acting, idle = CASES[field]
    assert acting or idle
    for recipe, further in acting:
        config = changed(RECIPES[recipe](), further | {field: value})
        assert field in chosen(config), "the case shows another value"
        check_idle(config)
    for recipe, further in idle:
        start = RECIPES[recipe]()
        given = {} if start.condition.kind == "small" else {"init": Path("start")}
        config = changed(start, given | further | {field: value})
        config = changed(
            config, {} if recipe != "sana-1.5-gemma" else {"condition.folder": config.condition.folder or Path("x")}
        )
        with pytest.raises(ValueError) as told:
            loop.train(config, tmp_path / "run")
        line = str(told.value)
        assert line.startswith("config: ") and "\n" not in line and not (tmp_path / "run").exists()
        assert f"{field} " in line or "needs --data.sources" in line, line


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_are_valid(recipe: str) -> None:
    """Of themselves, and for flow matching, where a value of theirs that nobody chose does nothing."""
    check_idle(RECIPES[recipe]())
    check_idle(changed(RECIPES[recipe](), PLAIN))


def test_one_line_names_all() -> None:
    config = changed(digits(), {"lora.alpha": 8, "optim.ema": 0.0, "optim.ema_cpu": True})
    with pytest.raises(ValueError) as told:
        check_idle(config)
    alpha, ema = (
        "lora.alpha 8 has no effect: it needs lora.rank",
        "optim.ema_cpu True has no effect: it needs optim.ema above 0",
    )
    assert str(told.value) == f"config: {alpha}; {ema}; leave them out"


def test_embedders_that_nothing_trains() -> None:
    """Flow matching would carry them along, and MeanFlow that starts from the run take them for trained."""
    with pytest.raises(ValueError, match="say --transformer.dual-time False$"):
        check_idle(changed(RECIPES["sana-1.5-1.6b"](), {"objective": "flow_matching"}))


def tiny(**changes: Any) -> Config:
    """The digits' recipe with a network of one layer."""
    sizes = tiny_sana(patch_size=2, sample_size=18, caption_channels=128, time_scale=10.0)
    return replace(digits(), transformer=sizes, **changes)


def test_a_factor_without_its_weights() -> None:
    config = tiny(init=None, trained=("transformer.transformer_blocks.",), embedder_init="preserve")
    with pytest.raises(ValueError, match="^config: optim.condition_lr 0.5 has no effect: .*leave it out$"):
        parameter_groups(started(config), changed(config, {"optim.condition_lr": 0.5}))
    parameter_groups(started(config), config)
    path = changed(config, {"trained": ("transformer.caption_",), "optim.condition_lr": 0.5})
    assert [factor for _, factor in parameter_groups(started(path), path)] == [0.5]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of a run at time scale 10, as it lies in the run's folder."""
    from emf import config as configs

    checkpoint = tmp_path / "done" / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    config = tiny(init=None)
    save_file(started(config).state_dict(), checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(configs.to_json(config))
    (checkpoint / "checkpoint.json").write_text('{"step": 1, "world": 1, "stage": 0}')
    return tmp_path / "done"


def test_a_start_has_its_embedders_already(run: Path) -> None:
    weights = run / "checkpoints" / "step_0000001" / "model.safetensors"
    for init in (run, weights):
        started(tiny(init=init))
        with pytest.raises(ValueError, match=f"embedder_init duplicate has no effect: init {init} has .*leave it out$"):
            started(tiny(init=init, embedder_init="duplicate"))


def test_a_file_of_another_time_scale(run: Path, tmp_path: Path) -> None:
    """A checkpoint's file lies beside its config; a released one says it in its header."""
    released = tmp_path / "released.safetensors"
    release(run, released)
    for init in (run, run / "checkpoints" / "step_0000001" / "model.safetensors", released):
        config = tiny(init=init)
        started(config)
        other = replace(config, transformer=replace(config.transformer, time_scale=1.0))
        with pytest.raises(ValueError, match="--transformer.time-scale 10.0"):
            started(other)
    assert scales(replace(tiny().transformer, dual_time=False)) == {}


def test_a_cache_has_decided(tmp_path: Path) -> None:
    """The size of crops, and that no image is read: nothing of it is asked for again."""
    cache = cache_settings(tmp_path / "cache")
    config = changed(RECIPES["sana-1.5-1.6b"](), {"init": tmp_path, "data.sources": (str(cache),)})
    check_sources(config.batches)
    check_sources(changed(config, {"data.size": 512}).batches)
    for name, value in (("size", 256), ("ta_tok", Path("ta_tok.pth")), ("listings", Path("tars.json"))):
        with pytest.raises(ValueError, match=f"^config: data.{name} {value} has no effect"):
            check_sources(changed(config, {f"data.{name}": value}).batches)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"data.vae": None}, "give --data.vae"),
        ({"data.ta_tok": None}, "give --data.ta-tok or a cache"),
        ({"data.ta_tok": Path("none.pth")}, r"no file .*/none\.pth"),
        ({"data.vae": Path("none")}, "no folder .*/none, where the autoencoder should lie; name it with --data.vae"),
        ({"data.sources": ("none.tar",)}, "none.tar: no such file or folder"),
    ],
)
def test_what_the_data_need_is_said_first(
    further: Changes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a network is built."""

    def built(*_: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(loop, "started", built)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderDC", "scaling_factor": 0.4}')
    (tmp_path / "ta_tok.pth").touch()
    given = {"init": tmp_path, "condition.folder": tmp_path, "data.sources": (str(tmp_path),)}
    given |= {"data.vae": tmp_path / "vae", "data.ta_tok": tmp_path / "ta_tok.pth"}
    with pytest.raises(ValueError, match=message) as told:
        loop.train(changed(RECIPES["sana-1.5-1.6b"](), given | further), tmp_path / "run")
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


def test_listings_of_no_tar(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "pictures", pairs(1))
    with pytest.raises(ValueError, match="no source is of tars; leave it out$"):
        scan([Source(str(pictures))], Drops(), tmp_path / "tars.json")
    assert not (tmp_path / "tars.json").exists()
