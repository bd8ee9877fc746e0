"""NaN and inf never become pictures: not from weights, not from the way between, not in training's validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digits_run import small_config, small_network, small_run
from exported import CONFIG, network, pipeline, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from emf.cli.main import main
from emf.errors import NotFinite
from emf.model.autoencoder import Identity
from emf.sample.sampler import Sampler
from emf.train.validation import Validation
from emf.weights.export import write_export

CAPTIONS = ["a red seven", "two blue threes", "a four above a one"]


def spoil(file: Path, name: str, value: float) -> None:
    state = load_file(file)
    state[name].view(-1)[0] = value
    save_file(state, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_are_named_with_their_file(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small_run(tmp_path / "run") / "model.safetensors"
    spoil(file, "transformer.proj_out.weight", value)
    words = ["generate", "a red seven", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["emf", *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said == f"error: sample: transformer.proj_out.weight in {file} holds NaN or inf\n"
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_are_named_by_their_numbers(value: float) -> None:
    """What becomes NaN after the weights, of one image of several batches."""

    class Breaking(Identity):
        made = 0

        def decode(self, latents: Tensor) -> Tensor:
            self.made += 1
            return super().decode(latents * value if self.made == 3 else latents)

    sampler = Sampler(small_config(), small_network(small_config()), Breaking())
    with pytest.raises(NotFinite, match=r"captions 9 \(counted from 0\) hold NaN or inf: the weights are finite"):
        sampler.images(CAPTIONS, batch=2, numbers=[5, 7, 9])
    spoiled = small_network(small_config())
    spoiled.transformer.proj_out.bias.data[0] = value
    with pytest.raises(NotFinite, match=r"captions 0, 1 .*: transformer.proj_out.bias in a/file holds NaN or inf"):
        Sampler(small_config(), spoiled, source="a/file").images(CAPTIONS, batch=2)


def test_the_pipeline_refuses_latents_and_decoded_images(tmp_path: Path) -> None:
    import sana

    base = write_base(tmp_path / "base")
    write_export(network().state_dict(), CONFIG, tmp_path / "out", base=base)
    pipe = pipeline(tmp_path / "out", text_encoder=None, tokenizer=None)
    z, _, c = sana.inputs()
    call: dict[str, Any] = dict(prompt_embeds=c, latents=z)
    assert len(pipe(**call).images) == 3
    with pytest.raises(NotFinite, match="captions 1 "):
        pipe(prompt_embeds=c, latents=z.index_fill(0, torch.tensor([1]), torch.inf), output_type="latent")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.inf)  # clamped it would be a white picture
    with pytest.raises(NotFinite, match="captions 0, 1, 2 "):
        pipe(**call)


class TrainedBy:
    """What validation asks of an engine, on one rank: a network whose moving average has a NaN, or both."""

    def __init__(self, network: Any, broken: bool = False) -> None:
        self.rank, self.world, self.stage, self.ema = 0, 1, 0, [1]
        self.engine, self.bias = SimpleNamespace(module=network), network.transformer.proj_out.bias
        self.shown: list[str] = []
        if broken:
            self.bias.data[0] = torch.nan

    @contextmanager
    def averaged(self) -> Iterator[None]:
        kept = self.bias.detach().clone()
        self.bias.data[0] = torch.nan
        yield
        self.bias.data.copy_(kept)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def show(self, name: str, pictures: Any, captions: Sequence[str], step: int) -> None:
        self.shown.append(name)


def test_validation_tells_it_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sheet and the monitors have what is finite."""
    config = small_config()
    config = replace(config, run=replace(config.run, prompts=("a red seven",)))
    engine = TrainedBy(small_network(config))
    assert Validation(config, engine, tmp_path)(7) is None
    said = capsys.readouterr().out
    assert said.startswith("step 7: no validation of the EMA weights: sample: the images")
    assert "transformer.proj_out.bias in the EMA weights holds NaN or inf" in said and said.count("\n") == 1
    assert (tmp_path / "samples" / "step_0000007.png").is_file() and engine.shown == ["raw 1", "raw 2", "raw 4"]
    assert Validation(config, TrainedBy(small_network(config), broken=True), tmp_path)(8) is None
    assert not (tmp_path / "samples" / "step_0000008.png").exists()
