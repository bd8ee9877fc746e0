"""Image tokens drawn step by step, against the plain loop over transformers' model and against its states."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from text_models import CAPTIONS, CLOSE, QWEN, blip3o
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3Model

from emf.conditioning import token_drawing
from emf.conditioning.blip3o import Blip3oNext
from emf.conditioning.qwen3_step import Qwen3Step, is_plain
from emf.conditioning.sampling import Sampling, pick, uniforms
from emf.conditioning.token_drawing import WARM, ModuleStep, begin, common, draw, positions, replayed

N = 20
FEW = Sampling(top_k=4)
"""So few borders between tokens that rounding tips no draw."""


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@torch.no_grad()
def plainly(encoder: Blip3oNext, captions: list[str], uniform: Tensor, sampling: Sampling) -> Tensor:
    """The tokens by one call of transformers' model each, its cache and mask growing."""
    ids, mask = encoder.tokenize(captions)
    where, past, drawn = positions(mask), None, []
    for i in range(uniform.shape[1]):
        out = QWEN.model(ids, mask.long(), where, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, pick(QWEN.lm_head(out.last_hidden_state[:, -1]), uniform[:, i], sampling)
        drawn.append(token)
        ids, where = token[:, None], where[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(drawn, 1)


@pytest.fixture(params=["plain", "modules"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> type:
    """Whose steps are taken."""
    if request.param == "modules":
        monkeypatch.setattr(token_drawing, "is_plain", lambda decoder: False)
    else:
        assert is_plain(QWEN.model)
    return ModuleStep if request.param == "modules" else Qwen3Step


@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[:1], CAPTIONS[:1] * 3])
@pytest.mark.parametrize("sampling", [FEW, Sampling(temperature=0.7)])
def test_tokens_are_those_of_the_plain_loop(way: type, captions: list[str], sampling: Sampling) -> None:
    encoder, numbers = blip3o(image_tokens=N), range(3, 3 + len(captions))
    drawn = encoder.generate(captions, seeds(*numbers), sampling)
    assert torch.equal(drawn, plainly(encoder, captions, uniforms(seeds(*numbers), len(captions), N), sampling))
    assert drawn.shape == (len(captions), N) and len(drawn.unique()) > 10 and not drawn.is_inference()


@torch.no_grad()
def test_teacher_forcing_repeats_the_steps(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen, call = blip3o(image_tokens=N), [], way.__call__
    monkeypatch.setattr(way, "__call__", lambda self, token: seen.append(call(self, token)) or seen[-1])
    ids = encoder.generate(CAPTIONS, seeds(3, 4, 5))
    states, _ = encoder.states(*encoder.tokenize(CAPTIONS, ids))
    # <S0> was read with the prompt; the last token is drawn, but not yet read
    torch.testing.assert_close(states[:, 1:-1], torch.stack(seen, 1), **CLOSE)


@torch.no_grad()
def test_bfloat16_steps_are_as_close_as_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen, call = blip3o(image_tokens=N), [], Qwen3Step.__call__
    ids = encoder.generate(CAPTIONS, seeds(3, 4, 5))
    rows = encoder.tokenize(CAPTIONS, ids)
    exact = encoder.states(*rows)[0][:, 1:-1]

    def forced(self: Qwen3Step, token: Tensor) -> Tensor:
        seen.append(call(self, ids[:, len(seen)]))
        return seen[-1]

    monkeypatch.setattr(Qwen3Step, "__call__", forced)
    try:
        encoder.bfloat16()
        encoder.generate(CAPTIONS, seeds(3, 4, 5))
        own = (encoder.states(*rows)[0][:, 1:-1].float() - exact).norm()
    finally:
        encoder.float()
    assert seen[0].dtype == torch.bfloat16
    assert 0 < (torch.stack(seen, 1).float() - exact).norm() < 1.5 * own


def test_a_model_that_is_not_plain_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls = blip3o(image_tokens=N), list[Any]()
    want = encoder.generate(CAPTIONS, seeds(3, 4, 5), FEW)

    class Other(nn.Linear):
        pass

    layer = QWEN.model.layers[1].mlp.up_proj
    other = Other(layer.in_features, layer.out_features, bias=False)
    other.weight = layer.weight
    hook = QWEN.model.norm.register_forward_hook(lambda *a: calls.append(a))
    with monkeypatch.context() as patch:
        patch.setitem(QWEN.model.layers[1].mlp._modules, "up_proj", other)
        assert torch.equal(encoder.generate(CAPTIONS, seeds(3, 4, 5), FEW), want)
    hook.remove()
    assert len(calls) == N  # the rows, and every token but the last


def test_models_that_are_not_plain() -> None:
    def changed(**sizes: Any) -> Any:
        return Qwen3Model(Qwen3Config(**{**QWEN.config.to_dict(), **sizes}))

    assert is_plain(changed())
    assert not is_plain(changed(attention_bias=True)) and not is_plain(QWEN)
    assert not is_plain(changed(use_sliding_window=True, max_window_layers=1, sliding_window=8, layer_types=None))
    assert not is_plain(changed().to("meta"))
    sharded = changed()
    sharded.layers[1].post_attention_layernorm.weight.data = torch.empty(0)
    assert not is_plain(sharded)


@pytest.mark.parametrize(
    "rows, shared",
    [([[1, 2, 3]], 0), ([[1, 2, 3], [1, 2, 4, 5]], 2), ([[1, 2], [1, 2]], 1), ([[1], [2, 1]], 0), ([[1, 2], [1]], 0)],
)
def test_rows_share_their_beginning_and_keep_a_token_each(rows: list[list[int]], shared: int) -> None:
    assert common(rows) == shared


class Tape(TorchDispatchMode):
    """Operators as a CUDA graph holds them: on the tensors that they had, which replaying computes anew in place. A
    value that the host would wait for is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"), func
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, self.tensors(out)))
        return out

    @staticmethod
    def tensors(out: Any) -> list[Tensor]:
        return [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]

    def replay(self) -> None:
        for func, args, kwargs, held in self.calls:
            for old, new in zip(held, self.tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@torch.inference_mode()
def test_a_recorded_step_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's shapes and addresses stay, and nothing waits for the device: recorded once, its operators draw the
    rest of the tokens."""
    encoder, tapes = blip3o(image_tokens=N), []

    def record(run: Callable[[], None], pool: Any) -> tuple[Any, Callable[[], None]]:
        with Tape() as tape:  # which computes too, where recording a graph does not
            run()
        tapes.append(tape)
        return None, tape.replay

    monkeypatch.setattr(token_drawing, "warm_up", lambda run: [run() for _ in range(WARM)])
    monkeypatch.setattr(token_drawing, "record", record)
    uniform = uniforms(seeds(3, 4, 5), 3, N)
    rows = [ids[kept].tolist() for ids, kept in zip(*encoder.tokenize(CAPTIONS), strict=True)]
    drawing = begin(QWEN.model, QWEN.lm_head, rows, uniform, FEW, plain=True)
    run = replayed(drawing.next)
    for _ in range(N - 2 - WARM):
        run()
    assert torch.equal(drawing.drawn, plainly(encoder, CAPTIONS, uniform, FEW))
    assert len(tapes[0].calls) < 45 * len(QWEN.model.layers) + 60  # what the host has to do for a token


@pytest.mark.gpu
def test_a_graphs_tokens_are_those_of_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, uniform = deepcopy(QWEN).cuda(), uniforms(seeds(3, 4, 5), 3, N).cuda()
    encoded = blip3o(image_tokens=N).tokenize(CAPTIONS)
    rows = [ids[kept].tolist() for ids, kept in zip(*encoded, strict=True)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="conditioning: image tokens")  # where no graph could be recorded
        drawn = draw(model.model, model.lm_head, rows, uniform, FEW)
    monkeypatch.setattr(token_drawing, "is_plain", lambda decoder: False)
    assert torch.equal(drawn, draw(model.model, model.lm_head, rows, uniform, FEW))
    assert len(drawn.unique()) > 10


def test_the_tape_refuses_a_wait() -> None:
    with Tape(), pytest.raises(AssertionError):
        torch.ones(1).item()


def test_a_step_that_cannot_be_recorded_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Callable[[], None], pool: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(token_drawing, "warm_up", lambda run: None)
    monkeypatch.setattr(token_drawing, "record", record)
    with pytest.warns(UserWarning, match="without a CUDA graph, slower: operation not permitted$"):
        assert replayed(print) is print
