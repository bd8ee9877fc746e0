"""Work on every core: each thread by itself, the same results as one after the other."""

from __future__ import annotations

from contextvars import ContextVar

import pytest
import torch
from digits_run import small_config, small_network

from emf.errors import NotFinite
from emf.evaluate.small_world import draw
from emf.sample.cores import on_every_core
from emf.sample.sampler import Sampler
from emf.sample.sampling_settings import Settings

IN_FORCE: ContextVar[str] = ContextVar("in force", default="nowhere")
CAPTIONS = ["two red sevens", "a blue three", "a six", "four ones", "a red one and a green two"]


def test_every_thread_computes_alone_and_in_what_is_in_force_here() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        IN_FORCE.set("here")
        seen = list(on_every_core(lambda n: (n, torch.get_num_threads(), IN_FORCE.get()), [3, 1, 2]))
        assert [n for n, *_ in seen] == [3, 1, 2] and {threads for _, threads, _ in seen} == {1}
        assert {said for *_, said in seen} == {"here"}
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            list(on_every_core(lambda n: 1 // n, [1, 0, 2]))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_pictures_are_those_of_the_sampler_and_do_not_depend_on_the_threads() -> None:
    config = small_config()
    samplers = [Sampler(config, small_network(config, seed)) for seed in (0, 1)]
    rows = [(samplers[0], Settings(2, 1.25, 3, average=False, batch=2)), (samplers[1], Settings(1, 1.0, 3, batch=2))]
    before, made = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append([torch.from_numpy(images) for images in draw(rows, CAPTIONS)])
    torch.set_num_threads(before)
    for (sampler, how), one, three in zip(rows, *made, strict=True):
        assert torch.equal(one, three)
        torch.testing.assert_close(one, sampler.images(CAPTIONS, how, batch=5), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        next(samplers[1].network.transformer.parameters()).fill_(float("nan"))
    with pytest.raises(NotFinite, match="holds NaN or inf"):
        list(draw(rows, CAPTIONS))
    assert torch.get_num_threads() == before
