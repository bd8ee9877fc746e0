"""Image tokens drawn one after another from a language model, a row for each caption.

The rows' common beginning, which is the chat up to the caption, goes through the model once. Then every step reads the
token of the step before and draws the next, on the device alone: on a GPU a step is one CUDA graph that is replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from emf.conditioning.qwen3_step import Qwen3Step, is_plain
from emf.conditioning.sampling import Sampling, pick
from emf.model.replay import WARM, record, warm_up


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, L] that count a row's tokens from 0; padding has 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, of each at least one left over; 0 of a single row, which shares nothing."""
    if len(rows) < 2:
        return 0
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)


@torch.no_grad()
def read(decoder: Any, rows: list[list[int]], device: torch.device, shared: int) -> tuple[Any, Tensor, Tensor]:
    """(the cache after rows of ids; which of its places each row attends to, [B, M] bool; the rows' last states
    [B, hidden]). The `shared` tokens that all rows begin with lie in front, then the rest of each row, aligned at the
    ends."""
    cache = None
    rest = [row[shared:] for row in rows]
    length = max(map(len, rest))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rest], device=device)
    mask = torch.tensor([[True] * shared + [False] * (length - len(r)) + [True] * len(r) for r in rest], device=device)
    if shared:
        cache = decoder(input_ids=torch.tensor([rows[0][:shared]], device=device), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
    where = positions(mask)[:, shared:]
    out = decoder(input_ids=ids, attention_mask=mask.long(), position_ids=where, past_key_values=cache, use_cache=True)
    return out.past_key_values, mask, out.last_hidden_state[:, -1]


class ModuleStep:
    """What Qwen3Step does, by the model's own modules: for one that is sharded, wrapped or of another make."""

    def __init__(self, decoder: Any, past: Any, mask: Tensor, position: Tensor, room: int) -> None:
        self.decoder, self.past, self.position, self.end = decoder, past, position, mask.shape[1]
        self.mask = torch.cat([mask.long(), mask.new_ones(len(mask), room, dtype=torch.long)], 1)

    def __call__(self, token: Tensor) -> Tensor:
        self.end += 1
        out = self.decoder(
            input_ids=token[:, None],
            attention_mask=self.mask[:, : self.end],
            position_ids=self.position[:, None],
            past_key_values=self.past,
            use_cache=True,
        )
        self.past, self.position = out.past_key_values, self.position + 1
        states: Tensor = out.last_hidden_state[:, -1]
        return states


class Drawing:
    """Tokens of rows that were read, each at its own uniform numbers [B, n]; `next` draws one more of every row.

    Of fixed shapes at fixed addresses, without a wait for the device."""

    def __init__(self, step: Callable[[Tensor], Tensor], layer: nn.Module, uniform: Tensor, sampling: Sampling) -> None:
        self.step, self.layer, self.uniform, self.sampling = step, layer, uniform, sampling
        self.drawn = torch.zeros_like(uniform, dtype=torch.long)
        self.number = torch.zeros(1, dtype=torch.long, device=uniform.device)
        self.token = torch.zeros_like(self.drawn[:, 0])

    def take(self, states: Tensor) -> None:
        """Draw a token of each row by its last states [B, hidden]."""
        uniform = self.uniform.index_select(1, self.number)[:, 0]
        self.token.copy_(pick(self.layer(states), uniform, self.sampling))
        self.drawn.index_copy_(1, self.number, self.token[:, None])
        self.number.add_(1)

    def next(self) -> None:
        self.take(self.step(self.token))


def begin(
    decoder: Any, layer: nn.Module, rows: list[list[int]], uniform: Tensor, sampling: Sampling, plain: bool
) -> Drawing:
    """What continues rows of ids, the first token drawn. plain: by Qwen3Step, else by the model's own modules."""
    # a sharded model is called as often on every rank, whatever the rank's rows have in common
    past, mask, states = read(decoder, rows, uniform.device, common(rows) if plain else 0)
    step = (Qwen3Step if plain else ModuleStep)(decoder, past, mask, mask.sum(1), uniform.shape[1] - 1)
    drawing = Drawing(step, layer, uniform, sampling)
    drawing.take(states)
    return drawing


def replayed(run: Callable[[], None]) -> Callable[[], None]:
    """What does on a GPU what run() does, by one launch. Runs it WARM times before; where a graph cannot be recorded,
    warns and returns run itself."""
    warm_up(run)
    try:
        return record(run, pool=None)[1]
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        warnings.warn(f"conditioning: image tokens are drawn without a CUDA graph, slower: {said}", stacklevel=2)
        return run


@torch.no_grad()
def draw(
    decoder: Any,
    layer: nn.Module,
    rows: list[list[int]],
    uniform: Tensor,
    sampling: Sampling,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """Token ids [B, n] that continue rows of ids, drawn at uniform [B, n] in [0, 1), on the device of both.

    decoder, layer: transformers' language model without its output layer, and that.
    """
    device, n = uniform.device, uniform.shape[1]
    plain, gpu = is_plain(decoder), device.type == "cuda"
    # weights that a sharded model gathers may not be made in inference mode
    with torch.inference_mode() if plain else nullcontext(), torch.cuda.device(device) if gpu else nullcontext():
        drawing = begin(decoder, layer, rows, uniform, sampling, plain)
        run, done = drawing.next, 1
        if plain and gpu and n > done + WARM:
            run, done = replayed(run), done + WARM
        for i in progress(range(done, n)):
            run()
            if gpu and (i % 64 == 0 or i == n - 1):  # progress is the device's, and no graph goes while it runs
                torch.cuda.current_stream().synchronize()
    return drawing.drawn.clone()
