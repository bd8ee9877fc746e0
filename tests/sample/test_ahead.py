"""The text stage of a batch while the one before is drawn: the same pictures, the same errors, and a clean end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from digits_run import small_config, small_network

from emf.errors import NotFinite
from emf.sample.ahead import GoOn, Unwanted, work_aside
from emf.sample.image_batches import batches_of
from emf.sample.sampler import Sampler
from emf.sample.sampling_settings import Settings
from emf_kernels import backend, rmsnorm

CAPTIONS = ["a red seven", "two blue threes", "a four above a one", "a red seven", "three green twos"]
CPU = torch.device("cpu")


@pytest.fixture
def sampler() -> Sampler:
    made = Sampler(small_config(), small_network(small_config()))
    assert not made.overlaps  # on a CPU without an engine
    return made


def test_the_same_pictures_bit_for_bit(sampler: Sampler) -> None:
    how = Settings(steps=2, batch=2)
    want = sampler.images(CAPTIONS, how)
    sampler.overlaps = True
    assert torch.equal(sampler.images(CAPTIONS, how), want)
    made = threading.current_thread()
    parts = list(sampler.draw(batches_of(CAPTIONS, how), lambda b, x: (b.numbers, x, threading.current_thread())))
    assert [list(numbers) for numbers, *_ in parts] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([images for _, images, _ in parts]), want)
    assert {thread for *_, thread in parts}.isdisjoint({made})  # written without a wait for the next text stage
    assert list(sampler.seconds) == ["text", "transformer"]


@pytest.mark.gpu
def test_the_same_pictures_in_a_stream_of_its_own() -> None:
    sampler, how = Sampler(small_config(), small_network(small_config()).cuda()), Settings(steps=2, batch=1)
    assert sampler.overlaps
    drawn = sampler.images(CAPTIONS, how)
    sampler.overlaps = False
    torch.testing.assert_close(drawn, sampler.images(CAPTIONS, how))


def test_the_next_is_made_while_one_is_worked_on() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for i in range(4):
            made[i].set()
            yield i

    def work(i: int, go_on: GoOn) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert made[min(i + 1, 3)].wait(20)  # waits in vain where the next is made afterwards
        assert not any(event.is_set() for event in made[i + 2 :])  # one ahead, and no more
        return i

    assert list(work_aside(items(), work, CPU)) == [0, 1, 2, 3]
    with backend("triton"):  # what is in force here is in force there
        assert list(work_aside([1], lambda *_: rmsnorm.backend_for(torch.zeros(1)), CPU)) == ["triton"]
    assert list(work_aside([], work, CPU)) == []


def test_the_next_is_worked_on_while_the_caller_has_a_result() -> None:
    began = [threading.Event() for _ in range(3)]
    for i in work_aside(range(3), lambda i, _: began[i].set() or i, CPU):
        assert began[min(i + 1, 2)].wait(20)  # waits in vain where it begins when the caller comes back


def test_an_error_comes_as_it_is_after_what_was_drawn() -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise ValueError("image tokens: one line")

    done = []
    with pytest.raises(ValueError, match="^image tokens: one line$"):
        for result in work_aside(items(), lambda i, _: i, CPU):
            done.append(result)
    assert done == [0, 1]

    def work(i: int, go_on: GoOn) -> int:
        if i == 1:
            raise NotFinite([3])
        return i

    done.clear()
    with pytest.raises(NotFinite, match="of captions 3 "):
        for result in work_aside(iter(range(5)), work, CPU):
            done.append(result)
    assert done == [0]


@pytest.mark.parametrize("where", ["made", "waited"])
def test_an_interrupt_ends_what_is_under_way(where: str) -> None:
    # a shell that puts the tests into the background has SIGINT ignored in them
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended: list[Any] = []
    began = threading.Event()

    def work(i: int, go_on: GoOn) -> int:
        began.set()
        try:
            for _ in range(4000):
                go_on()
                time.sleep(0.005)
            return i
        except Unwanted as error:
            ended.append(error)
            raise

    def items() -> Iterator[int]:
        yield 0
        assert began.wait(20)
        raise KeyboardInterrupt

    source = items() if where == "made" else iter([0])
    stop = None
    if where == "waited":
        main = threading.main_thread().ident
        assert main is not None
        stop = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        stop.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(work_aside(source, work, CPU))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == 1
    if stop is not None:
        stop.join()


def test_what_is_not_finite_is_named_by_its_number(sampler: Sampler) -> None:
    sampler.overlaps = True
    with torch.no_grad():
        sampler.network.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"captions 7, 8 .*transformer.proj_out.bias in the network holds NaN"):
        sampler.images(CAPTIONS, batch=2, numbers=range(7, 12))
