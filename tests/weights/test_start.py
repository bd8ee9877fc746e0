"""Where a run starts: weights that do not fit its network are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits_run import small_config, small_network
from safetensors.torch import save_file
from torch import Tensor

from emf import config as configs
from emf.config import Config, LoraConfig
from emf.network.build import build
from emf.recipes import digits_base
from emf.sample.sampler import Sampler
from emf.train.command import Run, parse_run
from emf.weights import checkpoints
from emf.weights.checkpoints import Made
from emf.weights.export import export, release
from emf.weights.start import for_few_steps, started


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    small = dict(num_layers=1, num_attention_heads=2, num_cross_attention_heads=1)
    single = replace(digits_base(), transformer=replace(digits_base().transformer, **small))
    state = {k: v.clone() for k, v in build(single).state_dict().items()}
    twice = replace(single.transformer, dual_time=True)
    file = tmp_path / "weights.safetensors"

    def load(weights: dict[str, Tensor], config: Config) -> None:
        save_file(weights, file)
        started(replace(config, init=file))

    load(state, single)
    load(state, replace(single, objective="meanflow", transformer=twice))
    name = "transformer.proj_out.weight"
    with pytest.raises(ValueError, match=f"1 missing, 0 extra, 0 misshaped keys; missing {name}"):
        load({k: v for k, v in state.items() if k != name}, single)
    with pytest.raises(ValueError, match="0 missing, 1 extra, 0 misshaped keys; unexpected transformer.other"):
        load(state | {"transformer.other": torch.zeros(1)}, single)
    with pytest.raises(ValueError, match=f"0 missing, 0 extra, 1 misshaped keys; shape of {name}"):
        load(state | {name: state[name][:-1].contiguous()}, single)
    with pytest.raises(ValueError, match="no file"):
        started(replace(single, init=tmp_path / "none.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a safetensors file"):
        started(replace(single, init=file))


@pytest.mark.parametrize("rank", [0, 2])
def test_whatever_leaves_a_run_is_a_start(rank: int, tmp_path: Path) -> None:
    """The run, its checkpoint's file, its release and its export, with adapters or without: the sizes are theirs, and
    the network computes what the run's does; for flow matching without EMF's embedders."""
    made = replace(small_config(), lora=LoraConfig(rank, alpha=4))
    network, checkpoint = small_network(made), tmp_path / "run" / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(configs.to_json(made))
    (checkpoint / "checkpoint.json").write_text('{"step": 1, "world": 1, "stage": 0}')
    release(tmp_path / "run", tmp_path / "released.safetensors")
    export(tmp_path / "run", tmp_path / "exported", dtype="float32")
    z, t, c = torch.randn(2, 3, 18, 18), torch.tensor([0.3, 0.9]), torch.randn(2, 4, 128)
    ids, mask = network.encoder.tokenize(["a red seven", "two blue threes"])
    with torch.no_grad():
        want, states = network.transformer(z, t, t / 2, c), network.encoder(ids, mask)[0]
    for name in ("run", "run/checkpoints/step_0000001/model.safetensors", "released.safetensors", "exported"):
        init = str(tmp_path / name)
        config = parse_run(["digits", "--init", init], Run, "train").config
        assert config.transformer == made.transformer and config.lora.rank == 0, name
        begun, close = started(config), dict(rtol=0.0, atol=1e-2 if name.startswith("released") else 1e-5)
        with torch.no_grad():
            assert torch.allclose(begun.transformer(z, t, t / 2, c), want, **close), name
            assert torch.allclose(begun.encoder(ids, mask)[0], states, **close), name
        base = started(parse_run(["digits-base", "--init", init], Run, "train").config).state_dict()
        own = {k: v for k, v in begun.state_dict().items() if not k.startswith(("transformer.time_embed_",))}
        assert base.keys() == own.keys() and all(torch.equal(base[k], own[k]) for k in own), name
        assert for_few_steps(Path(init))


def test_a_checkpoint_that_goes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that keeps one checkpoint writes the next while the old one is read: the next is read, all of it."""
    config, run = small_config(), tmp_path / "run"
    networks = [small_network(config, seed) for seed in range(5)]

    def save(step: int) -> None:
        part = checkpoints.begin(run, step)
        checkpoints.write_checkpoint(part, networks[step].state_dict(), configs.to_json(config), Made(step, 1, 0))
        checkpoints.finish(part, 1)

    real, steps = checkpoints.read, iter(range(2, 5))

    def read(checkpoint: Path) -> dict[str, Tensor]:
        if step := next(steps, None):
            save(step)
        return real(checkpoint)

    save(1)
    save(1)  # over itself
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_0000001"]
    monkeypatch.setattr(checkpoints, "read", read)
    sampler = Sampler.load(run)
    name = "transformer.proj_out.weight"
    assert torch.equal(sampler.network.state_dict()[name], networks[4].state_dict()[name])
    monkeypatch.undo()
    assert sampler.stamp == Sampler.load(run).stamp
    (run / "checkpoints" / "step_0000004" / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):  # what is there and broken is said at once
        Sampler.load(run)


def test_adapters_of_which_nothing_is_known(tmp_path: Path) -> None:
    config = replace(small_config(), lora=LoraConfig(2))
    file = tmp_path / "lone.safetensors"
    save_file({k: v.contiguous() for k, v in small_network(config).state_dict().items()}, file)
    with pytest.raises(ValueError, match=r"lone.safetensors holds adapters, .*lora_A.*; give the run's folder"):
        started(replace(small_config(), init=file))
