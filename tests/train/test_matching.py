"""The distribution-matching term: what it moves, and that a run with it goes on, and is the same on several ranks."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import TINY, assert_same_training, averaged, files, kill_in_second_save, metrics, train

from emf.flow_config import MatchConfig
from emf.matching import matching_loss
from emf.network.build import build
from emf.network.flows import with_flows
from emf.network.outline import outline
from emf.recipes import digits
from emf.train.batch import make_batch, matched_samples
from emf.train.plan import plan

pytest.importorskip("deepspeed")

MATCH = ["--match.weight", "2", "--match.begin", "0.3", "--match.share", "0.5", "--match.steps", "2", "1"]


class Gain(nn.Module):
    """z times a number."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor, r: Tensor | None) -> Tensor:
        return self.gain * z


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_term_moves_a_picture_from_the_fake_flow_to_the_real_one(steps: int) -> None:
    """Against the same written out a sample at a time; and each gradient reaches one network alone, through every step
    of a picture."""
    torch.manual_seed(0)
    noise, again = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    tau = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    network, real, fake = Gain(0.7), Gain(0.3), Gain(-0.2)
    term, error = matching_loss(network, real, fake, noise, tau, again, steps=steps)
    left, slope = (1 - 0.7 / steps) ** steps, -((1 - 0.7 / steps) ** (steps - 1))
    for i, s in enumerate(tau.tolist()):
        x = left * noise[i]
        z = (1 - s) * x + s * again[i]
        clean_real, clean_fake = z - s * 0.3 * z, z + s * 0.2 * z
        move = (clean_real - clean_fake) / ((x - clean_real).square().mean().sqrt() + 1e-2)
        assert term[i].item() == pytest.approx(move.square().mean().item(), rel=1e-5)
        assert error[i].item() == pytest.approx((-0.2 * z - (again[i] - x)).square().mean().item(), rel=1e-5)
    (by_network,) = torch.autograd.grad(term.sum(), network.gain, retain_graph=True)
    # the loss falls where x goes along its move: dx/dgain = slope noise
    moves = []
    for i, s in enumerate(tau.tolist()):
        x = left * noise[i]
        z = (1 - s) * x + s * again[i]
        move = -0.5 * s * z / ((x - z + s * 0.3 * z).square().mean().sqrt() + 1e-2)
        moves.append((-2 * move * slope * noise[i]).mean())
    assert by_network.item() == pytest.approx(sum(moves).item(), rel=1e-4)  # type: ignore[union-attr]
    every = [network.gain, real.gain, fake.gain]
    reached = [torch.autograd.grad(x.sum(), every, allow_unused=True, retain_graph=True) for x in (term, error)]
    assert [[g is not None for g in gradients] for gradients in reached] == [[True, False, False], [False, False, True]]


def test_nothing_moves_where_both_flows_agree() -> None:
    noise, again = torch.randn(2, 3, 1, 2, 2)
    term, _ = matching_loss(Gain(0.7), Gain(0.3), Gain(0.3), noise.double(), torch.rand(3).double(), again.double())
    assert term.abs().max().item() == 0


def test_the_weight_begins_late_and_grows() -> None:
    match = MatchConfig(weight=2, begin=0.5)
    weights = [match.weight_at(s) for s in (0, 0.5, 0.525, 0.55, 1)]
    assert weights == pytest.approx([0, 0, 1, 2, 2])


def test_parts_of_a_batch_share_its_draws() -> None:
    """And the rest of a batch is what it is without the term."""
    config = replace(
        digits(), batch_size=8, steps=10, match=MatchConfig(weight=1, share=0.5, begin=0.3, steps=(1, 2, 4))
    )

    class Feed:
        samples = None

        def __call__(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
            n = 8 // parts
            return torch.zeros(n, 3, 18, 18), torch.zeros(n, 4, dtype=torch.int64), torch.ones(n, 4, dtype=torch.bool)

    feed: Any = Feed()
    assert make_batch(config, feed, 2, 0, 1).noise is None
    whole, plain = make_batch(config, feed, 3, 0, 1), make_batch(replace(config, match=MatchConfig()), feed, 3, 0, 1)
    assert plain.noise is None and torch.equal(whole.e, plain.e) and torch.equal(whole.t, plain.t)
    assert [make_batch(config, feed, step, 0, 1).made_in for step in range(3, 8)] == [1, 2, 4, 1, 2]
    halves = [make_batch(config, feed, 3, part, 2) for part in (0, 1)]
    for name in ("noise", "tau", "again"):
        together = getattr(whole, name)
        assert len(together) == 4
        for part, half in enumerate(halves):
            assert torch.equal(getattr(half, name), together[part::2])


def test_a_share_that_the_ranks_cannot_share_is_refused() -> None:
    """The term is the same on any number of ranks, and so every part has as much of it."""
    config = replace(digits(), batch_size=8, match=MatchConfig(weight=1, share=0.375))
    assert matched_samples(config, 1) == matched_samples(config, 3) == 3
    with pytest.raises(
        ValueError, match=r"match.share 0.375 of batch_size 8 is 3 samples, which 2 .* multiple of 0.25"
    ):
        matched_samples(config, 2)


def test_an_outline_has_both_flows() -> None:
    config = replace(digits(), match=MatchConfig(weight=1))

    def told(network: Any) -> dict[str, Any]:
        return {name: (tuple(p.shape), p.requires_grad) for name, p in network.named_parameters()}

    outlined = told(outline(config))
    assert outlined == told(with_flows(build(config), config))
    assert {name.split(".")[0] for name in outlined} == {"encoder", "transformer", "base", "fake"}
    with pytest.raises(ValueError, match="needs a text encoder that is not trained"):
        outline(replace(config, freeze_encoder=False))


@pytest.fixture(scope="module")
def matched(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matched")
    result = train(folder, *recipe, *MATCH, "--out", str(folder / "run"))
    assert result.code == 0, result.text
    return folder / "run"


def test_a_run_with_it(matched: Path, straight: Path) -> None:
    """The term acts from its beginning on; a checkpoint's weights are those of any run."""
    assert [row.keys() >= {"match", "fake_error"} for row in metrics(matched)] == [False] * 2 + [True] * 4
    assert [row["match_steps"] for row in metrics(matched)[2:]] == [2, 1, 2, 1]
    assert [row["error"] for row in metrics(matched)[:2]] == [row["error"] for row in metrics(straight)[:2]]
    got, plain = averaged(matched), averaged(straight)
    assert got.keys() == plain.keys()
    name = "transformer.proj_out.weight"
    assert not torch.equal(got[name], plain[name])


def test_a_killed_run_goes_on_with_its_fake_flow(recipe: list[str], matched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*recipe, *MATCH, "--out", str(run)]
    assert train(tmp_path, *flags, before=kill_in_second_save).code == -signal.SIGKILL
    assert train(tmp_path, *flags, "--resume", "True").code == 0
    assert metrics(run) == metrics(matched)
    step = "checkpoints/step_0000006"
    assert files(run / step)["model.safetensors"] == files(matched / step)["model.safetensors"]


def test_ranks_and_stages_agree(recipe: list[str], matched: Path, base: Path, tmp_path: Path) -> None:
    """Killed and continued too: the fake flow is in what DeepSpeed keeps."""
    run = tmp_path / "run"
    flags = [*recipe, *MATCH, "--out", str(run), "--zero.stage", "3"]
    assert train(tmp_path, *flags, ranks=2, before=kill_in_second_save).code
    result = train(tmp_path, *flags, "--resume", "True", ranks=2)
    assert result.code == 0, result.text
    assert_same_training(run, matched, base)
    for got, want in zip(metrics(run)[2:], metrics(matched)[2:], strict=True):
        assert [got[k] for k in ("match", "fake_error")] == pytest.approx(
            [want[k] for k in ("match", "fake_error")], rel=1e-3
        )


def test_the_fake_flow_rests_until_it_begins(recipe: list[str], tmp_path: Path) -> None:
    """Weight decay moves it no more than its gradient does."""
    flags = [*MATCH[:2], "--match.begin", "0.6", "--optim.weight-decay", "10", "--out", str(tmp_path / "run")]
    assert train(tmp_path, *recipe, *flags).code == 0
    saved = torch.load(tmp_path / "run/checkpoints/step_0000003/engine/mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    base = load_file(recipe[recipe.index("--init") + 1])
    fake = {name: x for name, x in saved.items() if name.startswith("fake.")}
    assert fake and all(torch.equal(x, base[name.replace("fake", "transformer")]) for name, x in fake.items())


def test_another_base_is_refused(recipe: list[str], base: Path, matched: Path, tmp_path: Path) -> None:
    """Where a run goes on, and where it begins from a network of few steps."""
    run, mine = tmp_path / "run", tmp_path / "mine.safetensors"
    weights = load_file(base)
    save_file(weights, mine)
    flags = ["digits", "--init", str(mine), *TINY, *MATCH, "--out", str(run)]
    assert train(tmp_path, *flags, before=kill_in_second_save).code == -signal.SIGKILL
    save_file({k: x + 1e-3 for k, x in weights.items()}, mine)
    mine_moved = train(tmp_path, *flags, "--resume", "True")
    assert mine_moved.code == 2 and "holds other weights than when" in mine_moved.text, mine_moved.text
    mine.unlink()
    gone = train(tmp_path, *flags, "--resume", "True")
    assert gone.code == 2 and "match.weight needs the flow matching that the run starts from" in gone.text, gone.text
    result = train(tmp_path, "digits", "--init", str(matched), *TINY, *MATCH, "--out", str(tmp_path / "other"))
    assert result.code == 2 and "is one of few steps" in result.text, result.text
    with pytest.raises(ValueError, match="is one of few steps"):
        plan(replace(digits(), init=matched, match=MatchConfig(weight=1)))


def test_what_cannot_be_is_one_line(recipe: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    for flags, said in (
        (["--match.share", "0.5"], "match.share 0.5 has no effect: it needs match.weight above 0"),
        (["--match.weight", "1", "--freeze-encoder", "False"], "match.weight needs a text encoder that is not trained"),
        (["--match.weight", "1", "--match.steps", "0"], "match.steps 0 must be at least 1 and at most 100"),
        (["--match.weight", "-1"], "match.weight -1.0 must be at least 0"),
    ):
        result = train(tmp_path, *recipe, *out, *flags)
        assert result.code == 2 and said in result.text and "Traceback" not in result.text, result.text
    assert not (tmp_path / "run").exists()
