"""The plan's figures against counted and measured ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.meters import Count, Held
from bench.providers import _model
from emf.model.transformer import Transformer
from emf.train.plan import MODELS, activation_bytes, forward_flops, parameters, plan
from emf_kernels import Dual, Op, backend

# channels, text tokens and layers in other proportions
SIZES = [((2, (1, 64), 2, 32, 3), 6), ((2, (1, 64), 1, 48, 2), 20), ((4, (2, 64), 1, 96, 4), 11)]


@pytest.mark.parametrize(
    ("size", "condition", "checkpointing"), [(*SIZES[0], True), (*SIZES[1], False), (*SIZES[2], False)]
)
def test_activations_are_what_the_kernels_keep(
    size: tuple, condition: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes held for backward of a dual pass, in Triton's interpreter, within 10 %."""
    torch.manual_seed(0)
    config = replace(_model(*size), checkpointing=checkpointing)
    net, n = Transformer(config), 2
    tokens = config.sample_size**2
    z, c = (
        torch.randn(n, 32, config.sample_size, config.sample_size),
        torch.randn(n, condition, config.caption_channels),
    )
    t = torch.rand(n)
    held = Held({p.untyped_storage().data_ptr() for p in net.parameters()})
    monkeypatch.setattr(Op, "backend_for", lambda op, x: "triton" if op.triton else "reference")  # as on a GPU
    with held.watch():
        net(Dual(z, z[:1]), Dual(t, t[:1]), t / 2, c).primal.sum()
        measured = held.peak
    a = activation_bytes(config, tokens, condition, itemsize=4)
    want = n * (config.num_layers * a["input" if checkpointing else "block"] + a["rest"])
    assert measured == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize(("size", "condition"), SIZES)
def test_operations_are_what_is_counted(size: tuple, condition: int) -> None:
    config, n = _model(*size), 2
    net = Transformer(config)
    z, c, t = (
        torch.randn(n, 32, config.sample_size, config.sample_size),
        torch.randn(n, condition, config.caption_channels),
        torch.rand(n),
    )
    with torch.no_grad(), backend("reference"), Count() as count:
        net(z, t, t / 2, c)
    assert count.flops == pytest.approx(n * forward_flops(config, config.sample_size**2, condition), rel=0.05)


def test_parameters_of_the_published_models() -> None:
    """SANA-1.5's own counts, and the two embedders that EMF adds to them (arXiv 2604.18168)."""
    total, trained = parameters(MODELS["sana-1.5-1.6b"].transformer)
    assert total == 1_604_641_952 + 2 * 35_714_560 and trained == 1_630_025_600
    assert parameters(MODELS["sana-1.5-4.8b"].transformer)[0] == 4_721_825_952 + 2 * 35_714_560


def test_stages_split_what_they_say() -> None:
    p = plan("sana-1.5-1.6b", gpus=8, memory=80)
    first, last = p.rows[0], p.rows[3]
    assert last["weights"] == pytest.approx(first["weights"] / 8) and p.rows[1]["weights"] == first["weights"]
    assert (
        p.rows[1]["optimizer"] == pytest.approx(first["optimizer"] / 8) and p.rows[1]["gradients"] == first["gradients"]
    )
    assert p.rows[2]["gradients"] == pytest.approx(first["gradients"] / 8)
    assert first["checkpointed"] < first["activations"] / 4 and first["fits"]
    assert not any(row["fits"] for row in plan("sana-1.5-4.8b", gpus=1, memory=24, batch_size=1).rows)
    assert plan("sana-1.5-1.6b", share=1.0).step_flops == pytest.approx(
        4 / 3 * plan("sana-1.5-1.6b", share=0.0).step_flops
    )


@pytest.mark.parametrize(
    "wrong",
    [
        dict(model="sana"),
        dict(gpu="abacus"),
        dict(gpus=0),
        dict(batch_size=0),
        dict(batch_size=-8),
        dict(share=2.0),
        dict(resolution=1000),
        dict(gpus=3),
    ],
)
def test_what_cannot_be_is_one_line(wrong: dict) -> None:
    with pytest.raises(ValueError, match="^plan: "):
        plan(**(dict(model="sana-1.5-1.6b") | wrong))
