"""Blocks by CUDA graphs. Without a GPU a recording is imitated: a replay computes again, at the same addresses. What a
GPU makes of it, `python -m bench.graphs` holds to the eager step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_sana
from torch import Tensor

from emf.flow import meanflow_loss
from emf.flow_config import FlowConfig
from emf.model import replay
from emf.model.replay import Graphs
from emf.model.transformer import Transformer

FLOW = FlowConfig()


def imitated(run: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """record, by computing again."""
    made = run()

    def replay() -> None:
        for held, x in zip(made, run(), strict=True):
            if held is not None:
                held.copy_(x)

    return made, replay


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> tuple[Transformer, Transformer]:
    """(eager, with graphs), of the same weights."""
    monkeypatch.setattr(replay, "record", imitated)
    monkeypatch.setattr(replay, "warm_up", lambda run: run())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    torch.manual_seed(0)
    eager, graphed = (Transformer(tiny_sana(num_layers=2)) for _ in range(2))
    graphed.load_state_dict(eager.state_dict())
    graphed.graphs = Graphs(graphed.through, graphed.transformer_blocks)
    return eager, graphed


def test_a_recording_that_fails_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["own"]

    @contextmanager
    def stream(other: str) -> Iterator[None]:
        before, streams[0] = streams[0], other
        try:
            yield
        finally:
            streams[0] = before

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:  # as torch's, whose exit ends the capture first, which raises
        streams[0] = "capture"
        yield
        raise RuntimeError("capture_end")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[0])
    for name, value in (("stream", stream), ("graph", graph), ("CUDAGraph", SimpleNamespace)):
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="^capture_end$"):
        replay.record(lambda: None, None)
    assert streams == ["own"]


def loss(net: Transformer, seed: int, n: int, b: int, masked: bool = True) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x, e, c = (torch.randn(n, *shape, generator=g) for shape in ((3, 4, 4), (3, 4, 4), (5, 12)))
    t = 0.5 + 0.4 * torch.rand(n, generator=g)
    r = torch.where(torch.arange(n) < b, t * torch.rand(n, generator=g), t)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3]])[:n] if masked else None
    velocity = lambda z, t, r: net(z, t, r, c, mask)  # noqa: E731
    return meanflow_loss(velocity, velocity, x, e, (t, r, b), FLOW)[0].mean()


def gradients(net: Transformer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_graphs_compute_what_eager_blocks_do(nets: tuple[Transformer, Transformer]) -> None:
    """Over steps with every b at micro-batches of 1 and 2, two micro-batches each, the weights moving."""
    optimizers = [torch.optim.SGD(net.parameters(), 1e-2) for net in nets]
    seed = 0
    for step in range(3):
        for n, first, second in ((2, 1, 2), (2, 0, 0), (1, 1, 0), (2, 2, 1)):
            seed += 1
            found = []
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                values = []
                for i, b in enumerate((first, second)):
                    y = loss(net, 10 * seed + i, n, b)
                    y.backward()
                    values.append(y.detach())
                found.append((torch.stack(values), gradients(net)))
                optimizer.step()
            assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]), (step, n)
    assert nets[1].graphs is not None and len(nets[1].graphs.recorded) == 5  # b = 0, 1, 2 of 2, and 0, 1 of 1


def test_a_backward_after_another_forward_is_refused(nets: tuple[Transformer, Transformer]) -> None:
    first = loss(nets[1], 1, 2, 1)
    loss(nets[1], 2, 2, 2)
    with pytest.raises(RuntimeError, match="^graphs: this backward comes after another forward"):
        first.backward()


def test_a_forward_without_gradient_is_eager(nets: tuple[Transformer, Transformer]) -> None:
    with torch.no_grad():
        assert torch.equal(loss(nets[1], 1, 2, 1), loss(nets[0], 1, 2, 1))
    assert nets[1].graphs is not None and not nets[1].graphs.recorded


def test_weights_at_other_addresses_are_recorded_again(nets: tuple[Transformer, Transformer]) -> None:
    loss(nets[1], 1, 2, 1).backward()
    assert nets[1].graphs is not None
    (before,) = nets[1].graphs.recorded.values()
    for net in nets:
        net.zero_grad()
        for p in net.parameters():
            p.data = 2 * p.data
        loss(net, 3, 2, 1).backward()
    (after,) = nets[1].graphs.recorded.values()
    assert after is not before
    assert torch.equal(gradients(nets[0]), gradients(nets[1]))


def test_more_shapes_than_graphs_are_eager(
    nets: tuple[Transformer, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST", 1)
    for b in (1, 2):
        for net in nets:
            net.zero_grad()
            loss(net, b, 2, b).backward()
        assert torch.equal(gradients(nets[0]), gradients(nets[1]))
    assert nets[1].graphs is not None and len(nets[1].graphs.recorded) == 1


def test_a_frozen_part_gets_no_gradient(nets: tuple[Transformer, Transformer]) -> None:
    """As EMF trains: patches and captions come in as constants."""
    for net in nets:
        net.requires_grad_(False)
        net.transformer_blocks[1].requires_grad_(True)
        loss(net, 4, 2, 1, masked=False).backward()
    assert torch.equal(gradients(nets[0]), gradients(nets[1]))
    assert {k for k, p in nets[1].named_parameters() if p.grad is not None} == {
        k for k, _ in nets[1].named_parameters() if k.startswith("transformer_blocks.1.")
    }
