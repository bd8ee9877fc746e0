"""Low-rank adapters: what is trained beside them, and their folder as peft, diffusers and EMFPipeline read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers")
import diffusers
import peft
import sana
from exported import CONFIG

from emf import config as configs
from emf.config import Config, LoraConfig
from emf.model.text_to_image import TextToImage
from emf.model.transformer import Transformer
from emf.network.adapters import add_lora
from emf.network.build import choose_trained
from emf.recipes import RECIPES, digits, sana_1600m
from emf.sample.emf_pipeline import EMFPipeline
from emf.weights import lora
from emf.weights.lora import export_adapters, put_on, read_adapters
from emf.weights.tensors import read_metadata

LORA = LoraConfig(rank=3, alpha=6)
TABLES = {"scale_shift_table", *(f"transformer_blocks.{i}.scale_shift_table" for i in range(2))}
BRANCHES = ("time_embed_t.", "time_embed_r.")


def adapted(config: Config) -> TextToImage:
    """A tiny network of a recipe with adapters, around an encoder of one layer."""
    torch.manual_seed(0)
    transformer = Transformer(replace(CONFIG, dual_time=config.transformer.dual_time))
    add_lora(transformer, config.lora)
    network = TextToImage(nn.Linear(2, 2), transformer)
    choose_trained(network, config)
    return network


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_trained_beside_adapters(recipe: str) -> None:
    """Embedders and tables, with every recipe; a language model that the recipe tunes; and no weight of a layer of a
    block."""
    config = replace(RECIPES[recipe](), lora=LORA)
    network = adapted(config)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 8  # two factors, two blocks, eight layers
    transformer = {name for name, _ in network.transformer.named_parameters()}
    want = TABLES | {name for name in transformer if name.startswith(BRANCHES)}
    want = {f"transformer.{name}" for name in want}
    if recipe == "blip3o-next-3b":
        want |= {"encoder.weight", "encoder.bias"}
    assert trained - adapters == want


def test_what_is_named_is_trained_beside_adapters() -> None:
    config = replace(digits(), lora=LORA)
    named = replace(config, trained=("transformer.proj_out.", "transformer.transformer_blocks.1."))
    trained = {name for name, p in adapted(named).named_parameters() if p.requires_grad and ".lora_" not in name}
    blocks = {"transformer.transformer_blocks.1.scale_shift_table"}
    assert trained == {"transformer.proj_out.weight", "transformer.proj_out.bias"} | blocks
    for start in ("transformer.transformer_blocks.1.attn1.", "transformer.no_such"):
        with pytest.raises(ValueError, match=rf"begins with {start} \(trained beside adapters\)"):
            adapted(replace(config, trained=(start,)))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> tuple[Path, TextToImage]:
    """(where a run would lie, its network: every weight that it trains moved away from the base's)."""
    config = replace(sana_1600m(), lora=LORA, transformer=replace(CONFIG, time_scale=7.0))
    network = adapted(config)
    network.transformer.config = config.transformer
    sana.randomize(network, seed=1)
    monkeypatch.setattr(lora, "load_run", lambda *_: (config, network.eval()))
    return Path("run"), network


def base_of(network: TextToImage) -> tuple[Transformer, dict[str, Tensor]]:
    """A published transformer, without EMF's embedders, that the network's adapters were put on; its tables and those
    that were trained have nothing in common."""
    state = {k.replace(".base_layer.", "."): v for k, v in network.transformer.state_dict().items()}
    state = {k: v.clone() for k, v in state.items() if ".lora_" not in k and not k.startswith(BRANCHES)}
    for name in TABLES:
        state[name] = torch.randn_like(state[name])
    base = Transformer(replace(CONFIG, dual_time=False, time_scale=1.0))
    base.load_state_dict(state)
    return base.eval(), state


@torch.no_grad()
def test_the_pipeline_puts_them_on_a_published_base(trained: tuple[Path, TextToImage], tmp_path: Path) -> None:
    from emf.weights.export import write_export

    run, network = trained
    export_adapters(run, tmp_path / "lora", "float32")
    told = (tmp_path / "lora" / "README.md").read_text()
    assert "- base: " in told and "- text encoder: " in told and str(tmp_path) not in told
    base, state = base_of(network)
    write_export(state, base.config, tmp_path / "sana")  # diffusers' files alone: no embedders beside them
    pipe: Any = EMFPipeline.from_pretrained(tmp_path / "sana", adapters=tmp_path / "lora")
    z, t, c = sana.inputs()
    want = network.transformer(z, t, t / 2, c)
    torch.testing.assert_close(pipe.transformer(z, t, t / 2, c), want, rtol=1e-4, atol=1e-5)
    assert pipe.transformer.network.config.time_scale == 7.0
    # saved whole, they are in its weights, and not merged a second time
    pipe.save_pretrained(tmp_path / "whole")
    again: Any = EMFPipeline.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(again.transformer(z, t, t / 2, c), pipe.transformer(z, t, t / 2, c))
    for act in (
        lambda: pipe.load_lora_weights(tmp_path / "lora"),
        lambda: again.load_lora_weights(tmp_path / "lora"),
        lambda: EMFPipeline.from_pretrained(tmp_path / "whole", adapters=tmp_path / "lora"),
    ):
        with pytest.raises(ValueError, match="lora is merged in these weights already$"):
            act()
    once, twice = (p.transformer.network.state_dict() for p in (pipe, again))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@torch.no_grad()
def test_peft_and_diffusers_read_their_forms(trained: tuple[Path, TextToImage], tmp_path: Path) -> None:
    run, network = trained
    export_adapters(run, tmp_path / "lora", "float32")
    names = {p.name for p in (tmp_path / "lora").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", lora.DIFFUSERS, lora.FULL, "README.md"}
    full = load_file(tmp_path / "lora" / lora.FULL)
    assert full.keys() == TABLES | {k for k in network.transformer.state_dict() if k.startswith(BRANCHES)}
    z, t, c = sana.inputs()
    want = network.transformer(z, t, None, c)

    base, state = base_of(network)
    state |= {name: full[name] for name in TABLES}
    base.load_state_dict(state)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    torch.testing.assert_close(model(z, t, None, c), want, rtol=1e-4, atol=1e-5)

    theirs = sana.diffusers_model()
    theirs.load_state_dict(state)
    assert (sana.velocity(theirs) - want).norm() > 0.1 * want.norm()
    parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=None)
    pipe: Any = diffusers.SanaPipeline(transformer=theirs, **parts)  # type: ignore[arg-type]
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(sana.velocity(theirs), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["peft", "peft rslora", "diffusers", "diffusers without settings"])
def test_adapters_of_others(kind: str, tmp_path: Path) -> None:
    """As the libraries themselves write them, without anything beside."""
    theirs, settings = sana.diffusers_model(), peft.LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_out.0"])
    base = Transformer(replace(CONFIG, dual_time=False))
    base.load_state_dict(theirs.state_dict())
    settings.use_rslora = kind == "peft rslora"
    if "without" in kind:
        settings.lora_alpha = settings.r
    if kind.startswith("peft"):
        model = peft.get_peft_model(theirs, settings)
        sana.randomize(model, seed=2)
        model.save_pretrained(tmp_path / "lora")
        theirs = model.base_model.model
    else:
        theirs.add_adapter(settings)
        sana.randomize(theirs, seed=2)
        factors = peft.get_peft_model_state_dict(theirs)
        told = {"transformer_lora_adapter_metadata": settings.to_dict()} if "without" not in kind else {}
        diffusers.SanaPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=factors, **told)
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in theirs.state_dict().items() if "lora_" not in k})
    put_on(base, read_adapters(tmp_path / "lora"), "lora")
    z, t, c = sana.inputs()
    torch.testing.assert_close(base.eval()(z, t, None, c), sana.velocity(theirs.eval()), rtol=1e-4, atol=1e-5)


def test_an_export_with_adapters_knows_them(
    trained: tuple[Path, TextToImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number format the adapters were written in; others are merged as well."""
    from emf.weights import export

    run, network = trained
    config = lora.load_run(run)[0]
    monkeypatch.setattr(export, "at_weights", lambda run, read: (config, network, None))
    export_adapters(run, tmp_path / "float16", "float16")
    export_adapters(run, tmp_path / "bfloat16", "bfloat16")
    export.export(run, tmp_path / "whole", dtype="float32")
    sana.randomize(network, seed=5)
    export_adapters(run, tmp_path / "other")
    pipe: Any = EMFPipeline.from_pretrained(tmp_path / "whole")
    for name in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match=f"{name} is merged in these weights already"):
            pipe.load_lora_weights(tmp_path / name)
    pipe.load_lora_weights(tmp_path / "other")
    assert len(pipe.transformer.network.adapters) == 2


UNREADABLE: dict[str, dict[str, Any]] = {
    "holds adapters of the kind 'IA3'; expected LORA": {"peft_type": "IA3"},
    "was made with bias 'all', which is not read here": {"bias": "all"},
    "was made with fan_in_fan_out": {"fan_in_fan_out": True},
    "was made with use_dora": {"use_dora": True},
    "was made with modules_to_save": {"modules_to_save": ["proj_out"]},
    "was made with alpha_pattern": {"alpha_pattern": {"to_q": 8}},
    "was made with layer_replication": {"layer_replication": [[0, 2]]},
    "was made with init_lora_weights pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "says r 5, and holds adapters of rank 3": {"r": 5},
    "has lora_alpha nan; expected a number other than 0": {"lora_alpha": float("nan")},
    "has lora_alpha 0; ": {"lora_alpha": 0},
    "has lora_alpha True; ": {"lora_alpha": True},
    "has lora_alpha None; ": {"lora_alpha": None},
    "has use_rslora 'no'; expected true or false": {"use_rslora": "no"},
}


@pytest.mark.parametrize("says", UNREADABLE)
def test_settings_that_ask_for_more_are_one_line(says: str, trained: tuple[Path, TextToImage], tmp_path: Path) -> None:
    export_adapters(trained[0], tmp_path / "lora")
    file = tmp_path / "lora" / lora.PEFT_SETTINGS
    settings = json.loads(file.read_text())
    read_adapters(tmp_path / "lora")
    file.write_text(json.dumps(settings | {"bias": None, "use_rslora": None}))  # absent
    read_adapters(tmp_path / "lora")
    file.write_text(json.dumps(settings | UNREADABLE[says]))
    with pytest.raises(ValueError, match=f"^lora: {tmp_path}/lora {says}"):
        read_adapters(tmp_path / "lora")


@pytest.mark.parametrize("file", [lora.PEFT, lora.FULL])
def test_factors_of_nan_are_named(file: str, trained: tuple[Path, TextToImage], tmp_path: Path) -> None:
    export_adapters(trained[0], tmp_path / "lora")
    path = tmp_path / "lora" / file
    state, said = load_file(path), read_metadata(path)
    name = next(iter(state))
    state[name].view(-1)[0] = float("nan")
    save_file(state, path, said)
    with pytest.raises(ValueError, match=rf"{file}: of .* there is NaN or inf"):
        read_adapters(tmp_path / "lora")


def test_what_does_not_fit_is_one_line(trained: tuple[Path, TextToImage], tmp_path: Path) -> None:
    run, network = trained
    folder = tmp_path / "lora"
    export_adapters(run, folder)
    factors, settings = load_file(folder / lora.PEFT), json.loads((folder / lora.PEFT_SETTINGS).read_text())
    name = "base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight"

    def fails(message: str) -> None:
        base, state = base_of(network)
        with pytest.raises(ValueError, match=message) as error:
            put_on(base, read_adapters(folder), folder)
        assert "\n" not in str(error.value) and not base.config.dual_time
        assert all(torch.equal(base.state_dict()[k], v) for k, v in state.items())

    def with_factors(change: dict[str, Tensor | None], message: str) -> None:
        changed = {k: v.clone() for k, v in (factors | change).items() if v is not None}
        save_file(changed, folder / lora.PEFT)
        fails(message)
        save_file(factors, folder / lora.PEFT)

    with pytest.raises(ValueError, match="lora exists"):
        export_adapters(run, folder)
    layers = network.transformer.config.num_layers
    deeper = Transformer(replace(network.transformer.config, num_layers=layers + 1, dual_time=False))
    with pytest.raises(ValueError, match=f"of {layers} blocks, and {layers + 1} there"):
        put_on(deeper, read_adapters(folder), folder)
    with_factors({name: None}, "has one factor of transformer_blocks.0.attn1.to_q")
    with_factors({name: factors[name][:2].contiguous()}, r"adapters of ranks \[2, 3\]")
    with_factors({name: factors[name][:, :5].contiguous()}, r"to_q.weight is \(32, 5\), and \(32, 32\) there")
    with_factors({"base_model.model.other.bias": torch.zeros(1)}, "holds base_model.model.other.bias; expected")
    with_factors({k.replace("blocks.0", "blocks.9"): v for k, v in factors.items()}, "blocks.9.*and not there")
    for change, message in (({"use_dora": True}, "made with use_dora"), ({"lora_alpha": "x"}, "expected a number")):
        (folder / lora.PEFT_SETTINGS).write_text(json.dumps(settings | change))
        fails(message)
    (folder / lora.PEFT_SETTINGS).write_text(json.dumps(settings))
    full = load_file(folder / lora.FULL)
    save_file(full, folder / lora.FULL)
    fails("does not say its time_scale")
    del full["time_embed_r.linear.bias"]
    save_file(full, folder / lora.FULL, {"time_scale": "1", "base_time_scale": "1000"})
    fails("lacks time_embed_r.linear.bias, and so does the transformer")
    (folder / lora.PEFT).write_bytes(b"torn")
    fails("not a whole safetensors file")
    (folder / lora.PEFT_SETTINGS).unlink()
    (folder / lora.DIFFUSERS).unlink()
    fails("holds no adapters")


def test_a_run_that_has_more_than_adapters_is_refused(trained: tuple[Path, TextToImage], tmp_path: Path) -> None:
    run, network = trained
    network.own_encoder = {"encoder.weight"}
    with pytest.raises(ValueError, match="trained its text encoder too"):
        export_adapters(run, tmp_path / "lora")


def test_a_config_with_adapters_survives_its_file(tmp_path: Path) -> None:
    from emf.recipes import from_file

    config = replace(sana_1600m(), lora=LORA)
    (tmp_path / "config.json").write_text(configs.to_json(config))
    assert from_file(tmp_path / "config.json") == config
