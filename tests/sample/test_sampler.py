"""The one sampler: what an image depends on, and that every setting reaches the method as it is written in emf.flow."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits_run import small_config, small_network, small_run
from same_pictures import assert_same_pictures
from torch import Tensor

from emf.config import Config
from emf.flow import guided, sample, seed_of
from emf.model.autoencoder import Identity
from emf.model.text_to_image import TextToImage
from emf.sample.image_tokens import tokenize
from emf.sample.sampler import Sampler, to_uint8
from emf.sample.sampling_settings import GUIDANCE, GUIDANCE_PRETRAINED, Settings, read_size

CAPTIONS = ["a red seven", "two blue threes", "a four above a one", "a red seven", "three green twos"]


@pytest.fixture(scope="module")
def network() -> TextToImage:
    return small_network(small_config())


@pytest.fixture(scope="module")
def sampler(network: TextToImage) -> Sampler:
    return Sampler(small_config(), network)


@torch.no_grad()
def by_hand(network: TextToImage, config: Config, captions: list[str], how: Settings, numbers: Any) -> Tensor:
    """Every step of the way written out, in one batch: noise by seed and number, condition, guidance, steps."""
    seeds = [how.seed * 1_000_003 + n for n in numbers]
    width, height = how.size or (18, 18)
    noise = torch.stack([torch.randn(3, height, width, generator=torch.Generator().manual_seed(n)) for n in seeds])
    ids, mask = network.encoder.tokenize(captions)
    condition = network.encoder(ids, mask)
    null = network.encoder(ids, mask, torch.ones(len(captions), dtype=torch.bool))
    velocity = lambda states: lambda z, t, r: network.transformer(z, t, r, *states)  # noqa: E731
    assert how.guidance is not None
    w = how.guidance / config.flow.built_in if how.average else how.guidance
    return sample(guided(velocity(condition), velocity(null), w), noise, how.steps, how.average)


@pytest.mark.parametrize(
    "how",
    [
        Settings(guidance=1.25, batch=8),
        Settings(steps=3, guidance=2.0, seed=4, batch=8),
        Settings(steps=2, guidance=1.0, average=False, batch=8),
        Settings(steps=2, guidance=1.5, average=False, seed=1, batch=8),
        Settings(steps=2, guidance=1.5, batch=8, size=(24, 12)),
    ],
    ids=str,
)
def test_the_whole_way_is_the_one_written_out(network: TextToImage, how: Settings) -> None:
    """Bit for bit: the batch is the same."""
    built_in = replace(small_config(), flow=replace(small_config().flow, guidance=1.25))
    for config in (small_config(), built_in):
        for numbers in (range(5), [7, 3, 11, 0, 5]):
            want = by_hand(network, config, CAPTIONS, how, numbers)
            assert torch.equal(Sampler(config, network).images(CAPTIONS, how, numbers=numbers), want)


def test_captions_are_read_once_and_by_a_call(network: TextToImage) -> None:
    """For guidance too. accelerate, which diffusers moves models to the GPU with, does so before a call."""
    network, seen = deepcopy(network), list[str]()
    for name, module in (("encoder", network.encoder), ("model", network.encoder.language_model)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    Sampler(small_config(), network).images(CAPTIONS, Settings(guidance=2.0, batch=len(CAPTIONS)))
    assert seen == ["model", "encoder"]


def test_an_image_depends_on_its_own_number_seed_and_caption(sampler: Sampler) -> None:
    how = Settings(steps=2, seed=3)
    pictures = sampler.pictures(CAPTIONS, how)
    assert_same_pictures(pictures, sampler.pictures(CAPTIONS, how), levels=0)  # the same batches
    assert_same_pictures(pictures, sampler.pictures(CAPTIONS, how, batch=1))
    assert_same_pictures(pictures, sampler.pictures(CAPTIONS, how, batch=64))
    back = sampler.pictures(CAPTIONS[::-1], how, numbers=[4, 3, 2, 1, 0])
    assert_same_pictures(pictures, back[::-1])
    for other in (sampler.pictures(CAPTIONS, how, seed=4), sampler.pictures(CAPTIONS, how, numbers=range(1, 6))):
        with pytest.raises(AssertionError, match="levels apart"):
            assert_same_pictures(pictures, other)
    assert not np.array_equal(pictures[0], pictures[3])  # the same caption of another number


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_round_otherwise_at_most(sampler: Sampler, threads: int) -> None:
    pictures, before = sampler.pictures(CAPTIONS, steps=4), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_pictures(pictures, sampler.pictures(CAPTIONS, steps=4))
    finally:
        torch.set_num_threads(before)


def test_settings_come_from_the_sampler_where_a_call_says_nothing(network: TextToImage) -> None:
    own = Settings(steps=2, seed=5, average=False)
    sampler = Sampler(small_config(), network, settings=own)
    want = sampler.images(CAPTIONS, Settings(steps=2, seed=5, average=False, guidance=GUIDANCE))
    assert torch.equal(sampler.images(CAPTIONS), want)
    assert torch.equal(sampler.images(CAPTIONS, seed=6), sampler.images(CAPTIONS, replace(own, seed=6)))
    assert not torch.equal(sampler.images(CAPTIONS, seed=6), want)
    other = replace(small_config(), condition=replace(small_config().condition, kind="gemma"))
    assert Sampler(other, network).guidance == GUIDANCE_PRETRAINED != GUIDANCE == sampler.guidance


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("20x18", r"size 20x18 \(width x height\); expected multiples of 6, as 18x18"),
        ("24x3", "size 24x3 .* as 24x6"),
        ("24", "size '24'; expected WIDTHxHEIGHT in pixels, as 1152x896"),
        ("0x18", "expected WIDTHxHEIGHT"),
        ("18x-6", "expected WIDTHxHEIGHT"),
        ("99999x6", "expected sides of at most 65536 pixels"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(sampler: Sampler, size: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sampler.images(CAPTIONS[:1], size=read_size(size))


def test_a_size_is_width_and_height(sampler: Sampler) -> None:
    assert read_size("24x12") == read_size("24X12") == (24, 12)
    wide, square = sampler.pictures(CAPTIONS[:1], size=(24, 12))[0], sampler.pictures(CAPTIONS[:1], size=(18, 18))[0]
    assert wide.size == (24, 12)
    assert_same_pictures([square], sampler.pictures(CAPTIONS[:1]), levels=0)


def test_an_autoencoder_decodes_each_image(network: TextToImage) -> None:
    class Halved(Identity):
        def decode(self, latents: Tensor) -> Tensor:
            assert latents.shape == (1, 3, 18, 18)
            return latents / 2

    plain, halved = Sampler(small_config(), network), Sampler(small_config(), network, Halved())
    assert torch.equal(halved.images(CAPTIONS), plain.images(CAPTIONS) / 2)
    assert list(plain.seconds) == ["text", "transformer"] and list(halved.seconds) == [*plain.seconds, "decoder"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(steps=0), "steps 0"),
        (dict(batch=0), "batch 0"),
        (dict(seed=-1), "seed -1"),
        (dict(seed=2**43), "seed 8796093022208"),
        (dict(guidance=float("nan")), "guidance nan"),
        (dict(guidance=float("inf")), "guidance inf"),
    ],
)
def test_settings_that_cannot_be_are_one_line(sampler: Sampler, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        sampler.images(CAPTIONS, **wrong)
    assert "\n" not in str(error.value)


def test_the_largest_seed(sampler: Sampler) -> None:
    assert sampler.images(CAPTIONS[:2], seed=2**43 - 1, numbers=[0, 1_000_002]).isfinite().all()
    for wrong in (1, 3):
        with pytest.raises(ValueError, match=f"^sample: {wrong} numbers of 2 images; expected one of each caption$"):
            sampler.images(CAPTIONS[:2], batch=1, numbers=range(wrong))


def test_captions_that_cannot_be_are_one_line(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="no captions"):
        sampler.images([])
    with pytest.raises(ValueError, match="zebra"):
        sampler.images(["a red zebra"])
    # as a command line has a byte that is not UTF-8; no tokenizer takes it
    with pytest.raises(ValueError, match=r"^sample: caption 'a \\udcff' holds .*the byte 0xff, which is not UTF-8$"):
        sampler.images(["a red seven", os.fsdecode(b"a \xff")])


def test_a_run_is_loaded(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    sampler = Sampler.load(run)
    want = Sampler(small_config(), small_network(small_config())).images(CAPTIONS, steps=2)
    torch.testing.assert_close(sampler.images(CAPTIONS, steps=2), want)
    assert sampler.settings.average and not Sampler.load(run, flow_matching=True).settings.average
    assert sampler.stamp == Sampler.load(run).stamp != Sampler.load(small_run(tmp_path / "other", seed=1)).stamp


class Drawing:
    """An encoder that draws image tokens, as BLIP3o-NEXT does."""

    image_tokens = 3

    def generate(self, captions: list[str], generators: list[torch.Generator], progress: bool = False) -> Tensor:
        assert not progress  # three are soon drawn
        return torch.stack([torch.randint(100, (3,), generator=g) for g in generators])

    def tokenize(self, captions: list[str], image_ids: Tensor) -> tuple[Tensor, Tensor]:
        return image_ids, torch.ones_like(image_ids, dtype=torch.bool)


def test_image_tokens_follow_their_own_seed() -> None:
    together, _ = tokenize(Drawing(), CAPTIONS[:3], [5, 6, 5], progress=True)
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(tokenize(Drawing(), CAPTIONS[1:2], [6])[0], together[1:2])


def test_seeds_of_images_stay_apart() -> None:
    assert seed_of(0, 7) == 7 and seed_of(3, 2) == 3_000_011
    assert len({seed_of(s, n) for s in range(10) for n in range(100)}) == 1000


def test_pixels_are_rounded_and_clipped() -> None:
    images = torch.tensor([-1.2, -1.0, 0.0, 1.0])[:, None, None, None].expand(4, 3, 2, 2)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 0, 128, 255]
