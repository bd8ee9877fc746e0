"""Training with compiled blocks, what is refused of compile and graphs, and how often the host waits in a step."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_sana
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from training import assert_same_training, metrics, train

from emf.config import Config
from emf.flow import meanflow_loss
from emf.flow_config import FlowConfig
from emf.model.transformer import Transformer
from emf.recipes import RECIPES
from emf.train import faster
from emf.train.faster import check_compile, check_graphs, compiled
from emf.train.objective import carried, descended
from emf_kernels import meanflow


def traced_only() -> None:
    """Blocks are captured whole and run as captured: what a compiler makes of them takes it a minute on a CPU."""
    from emf.train import faster, loop

    faster.BACKEND = "aot_eager"
    run = loop.Training.run

    def counted(*args: Any) -> None:
        run(*args)
        print(f"compiled {counters['stats']['unique_graphs']} graphs", flush=True)

    loop.Training.run = counted


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [("--zero.stage 2", 2), ("--zero.stage 1 --transformer.checkpointing True", 1)],
)
def test_compiled_blocks_train_as_eager_ones(
    flags: str, ranks: int, recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run"), "--compile", "True", *flags.split()]
    result = train(tmp_path, *recipe, *out, before=traced_only, ranks=ranks)
    assert result.code == 0, result.text
    graphs = re.findall(r"compiled (\d+) graphs", result.text)
    assert len(graphs) == ranks and all(0 < int(n) <= 6 for n in graphs), result.text
    assert_same_training(tmp_path / "run", straight, base)


def build_nothing() -> None:
    from emf.train import loop

    def started(*_: object) -> None:
        raise AssertionError("a network was built")

    loop.started = started  # type: ignore[assignment]


def test_compile_where_it_does_not_work_is_one_line(recipe: list[str], tmp_path: Path) -> None:
    for flags, message in (
        ("--compile True --zero.stage 3", "config: compile True does not go with ZeRO 3"),
        ("--graphs True", "config: graphs True needs a GPU"),
    ):
        result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), *flags.split(), before=build_nothing)
        assert result.code == 2 and message in result.text and "Traceback" not in result.text, result.text
        assert not (tmp_path / "run").exists()


def small(**changes: Any) -> Config:
    config = RECIPES["digits"]()
    return replace(config, **{"graphs": True, **changes})


@pytest.mark.parametrize(
    ("config", "stage", "micro_batch", "device", "message"),
    [
        (small(), 0, 1, "cpu", "needs a GPU"),
        (small(), 3, 1, "cuda", "ZeRO 3"),
        (small(), 0, 3, "cuda", "micro-batches of 1 or 2, not 3"),
        (small(compile=True), 0, 1, "cuda", "compile True; choose one"),
        (small(transformer=replace(small().transformer, checkpointing=True)), 2, 1, "cuda", "checkpointing"),
    ],
)
def test_graphs_are_refused_in_one_line(
    config: Config, stage: int, micro_batch: int, device: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^config: graphs True .*{message}"):
        check_graphs(config, stage, micro_batch, torch.device(device))


def test_graphs_are_taken_where_they_hold() -> None:
    for stage in (0, 1, 2):
        for micro_batch in (1, 2):
            check_graphs(small(), stage, micro_batch, torch.device("cuda"))
        check_compile(stage, torch.device("cuda"))


def test_tangents_are_carried_by_few_numbers_of_samples() -> None:
    for n in range(1, 70):
        numbers = [carried(b, n) for b in range(n + 1)]
        assert len(set(numbers)) <= 5 and numbers == sorted(numbers) and numbers[0] == 0 and numbers[n] == n
        assert all(b <= more < b + -(-n // 4) for b, more in enumerate(numbers))
        assert n > 4 or numbers == list(range(n + 1))


def test_compilations_over_a_schedule_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every b of a micro-batch of 8, up and down, is five graphs, for all blocks together, though the first one's input
    has no gradient: patches are not trained, as in EMF."""
    monkeypatch.setattr(faster, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    net = Transformer(tiny_sana(num_layers=2))
    net.patch_embed.requires_grad_(False)
    eager = Transformer(net.config)
    eager.load_state_dict(net.state_dict())
    eager.patch_embed.requires_grad_(False)
    for block in net.transformer_blocks:
        block.forward = compiled(block)
    g = torch.Generator().manual_seed(0)
    x, e, c = (torch.randn(8, *shape, generator=g) for shape in ((3, 4, 4), (3, 4, 4), (5, 12)))
    t, r = 0.5 + 0.4 * torch.rand(8, generator=g), 0.5 * torch.rand(8, generator=g)

    def loss(net: Transformer, b: int, more: int) -> Tensor:
        velocity = lambda z, t, r: net(z, t, r, c)  # noqa: E731
        when = t, torch.where(torch.arange(8) < b, r, t), more
        return meanflow_loss(velocity, velocity, x, e, when, FlowConfig())[0].mean()

    for b in (*range(9), *range(8, -1, -1)):
        got, want = loss(net, b, carried(b, 8)), loss(eager, b, b)
        got.backward()
        want.backward()
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        with torch.no_grad():  # as in validation: another batch, without tangents
            net(x[: 1 + b % 5], t[: 1 + b % 5], r[: 1 + b % 5], c[: 1 + b % 5])
    assert counters["stats"]["unique_graphs"] == 5
    for (name, p), q in zip(net.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name


class Waits(TorchDispatchMode):
    """What a step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def print_calls() -> None:
    """Of each step: how often the host reads a number of the device, fills gradients with zeros, and averages."""
    from emf.train.loop import Training
    from emf.train.zero import Engine

    step, of_weights = Training.step, Engine.step

    def watched(*args: Any) -> Any:
        with Waits() as waits:
            done = step(*args)
        print(f"waits {waits.called['_local_scalar_dense']}", flush=True)
        return done

    def filled(self: Engine, *args: Any) -> bool:
        with Waits() as waits:
            done = of_weights(self, *args)
        zeroed = sum(waits.called[name] for name in ("zero_", "_foreach_zero_"))
        print(f"zeroed {zeroed} averages {waits.called['_foreach_lerp_']}", flush=True)
        return done

    Training.step, Engine.step = watched, filled


def test_no_micro_batch_makes_the_host_wait(recipe: list[str], tmp_path: Path) -> None:
    found = []
    for parts in ("1", "4"):
        out = ["--out", str(tmp_path / parts), "--zero.accumulation", parts, "--steps", "3"]
        result = train(tmp_path, *recipe, *out, before=print_calls)
        assert result.code == 0, result.text
        found.append(re.findall(r"waits (\d+)", result.text))
        assert set(re.findall(r"zeroed (\d+)", result.text)) == {"0"}, result.text
        averages = re.findall(r"averages (\d+)", result.text)
        assert Counter(averages) == Counter({"1": 3, "0": 3 * (int(parts) - 1)} if parts != "1" else {"1": 3})
    assert found[0] == found[1] and len(found[0]) == 3 and len(set(found[0])) == 1, found


def test_a_skipped_step_of_a_sharded_run_drops_its_other_micro_batches(recipe: list[str], tmp_path: Path) -> None:
    """A loss that is not finite in the first of two micro-batches, of a sharded run: as without ZeRO."""
    rows = []
    for stage in ("0", "2"):
        out = ["--out", str(tmp_path / stage), "--zero.stage", stage, "--zero.accumulation", "2", "--run.skip", "1"]
        result = train(tmp_path, *recipe, *out, before=poison_second_step)
        assert result.code == 0, result.text
        rows.append(metrics(tmp_path / stage))
    assert [row["step"] for row in rows[0]] == [1, 3, 4, 5, 6]
    assert [row["error"] for row in rows[0]] == pytest.approx([row["error"] for row in rows[1]], rel=1e-4)


def poison_second_step() -> None:
    from emf.train import batch as module

    make = module.make_batch

    def poisoned(config: Any, feed: Any, at: int, part: int, parts: int) -> Any:
        made = make(config, feed, at, part, parts)
        if (at, part) == (1, 0):
            made.e[0] = float("nan")
        return made

    module.make_batch = poisoned


def test_a_loss_too_large_for_its_weight_is_never_applied() -> None:
    """The weighted loss of a sample whose squares overflow is NaN, and its gradient would be zero: finite."""
    u = torch.full((1, 4), 1e30, requires_grad=True)
    loss, squared = meanflow(u, u.detach()[:0], torch.zeros(1, 4), torch.ones(1), torch.ones(1))
    assert not loss.isfinite().all() and not squared.isfinite().all()
    descended(loss, squared).backward()
    assert u.grad is not None and u.grad.isnan().all()


def test_where_both_are_finite_the_gradient_is_the_means() -> None:
    loss, squared = torch.tensor([0.3, 1e-30, 7.0], requires_grad=True), torch.tensor([1.0, 2.0, 1e30])
    (got,) = torch.autograd.grad(descended(loss, squared), loss)
    (want,) = torch.autograd.grad(loss.mean(), loss)
    assert torch.equal(got, want) and descended(loss, squared).item() == loss.mean().item()


def spoil(what: str) -> Any:
    """In step 2 the error alone, or the gradient alone, is not finite."""
    from emf.train import loop as module

    losses = module.losses

    def spoiled(config: Any, network: Any, batch: Any, progress: float) -> Any:
        loss, error, own = losses(config, network, batch, progress)
        if round(progress * config.steps) != 1:
            return loss, error, own
        return (loss, error / 0, own) if what == "error" else (loss + (loss * 0).sqrt(), error, own)

    module.losses = spoiled


def spoil_error() -> None:
    spoil("error")


def spoil_gradient() -> None:
    spoil("gradient")


def test_a_step_whose_error_alone_is_not_finite_moves_nothing(recipe: list[str], tmp_path: Path) -> None:
    rows = []
    for before in (spoil_error, spoil_gradient):
        out = ["--out", str(tmp_path / before.__name__), "--run.skip", "1"]
        result = train(tmp_path, *recipe, *out, before=before)
        assert result.code == 0, result.text
        rows.append(metrics(tmp_path / before.__name__))
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(("gpu", "offload", "fused"), [(True, False, True), (True, True, False), (False, False, False)])
def test_adamw_is_fused_on_a_gpu(gpu: bool, offload: bool, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from emf.train.zero import engine_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    zero = replace(small().zero, stage=2, offload=offload)
    made = engine_config(small(zero=zero), 1)["optimizer"]["params"]
    assert made["torch_adam"] and made["fused"] is fused
