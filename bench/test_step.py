"""bench.step in pytest-benchmark's store: `make bench`, then `--benchmark-compare`. Not part of `make test`.

The rounds of all providers are interleaved first and replayed here one provider at a time, on a clock of their own: a
second is one step of plain flow matching in the same round, on a GPU a second.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from bench.records import GPU
from bench.step import measure, save

pytest_plugins = ["bench.machine_info"]
SIZE, ROUNDS = os.environ.get("EMF_BENCH_SIZE", "cpu"), int(os.environ.get("EMF_BENCH_ROUNDS", "3"))
NAMES = ["fm", *(f"dual {share}" for share in ("1", "0.75", "0.5", "0.25", "0"))]
NAMES += ["fm, checkpointing", "dual 1, checkpointing", "paper", "func.jvp", "no_grad jvp + forward"]
NAMES += ["double backward", "finite difference", "compile"]


class Clock:
    """A timer that stands still until it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    record = measure(SIZE, ROUNDS, compile=GPU, say=say)
    assert {row["provider"] for row in record["rows"]} | set(record["without"]) == set(NAMES)
    save(record)
    return record


@pytest.mark.benchmark(group="step", timer=CLOCK)
@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark: Any, record: dict[str, Any], name: str) -> None:
    if name in record["without"]:
        pytest.skip(record["without"][name])
    (row,) = (row for row in record["rows"] if row["provider"] == name)
    fm = record["times"]["fm"]
    times = iter(t if GPU else t / base for t, base in zip(record["times"][name], fm, strict=True))

    def replay() -> None:
        CLOCK.now += next(times)

    benchmark.pedantic(replay, rounds=len(fm), iterations=1)
    benchmark.extra_info |= record["head"] | row | {"unit": "s" if GPU else "a step of fm"}
    if row["u_dot_error"] is not None:
        assert row["u_dot_error"] < 0.1, "a fast wrong tangent is no competitor"
