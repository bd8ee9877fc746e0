"""What an image token costs: drawing by steps of fixed shapes against a call of transformers' model for each token.

    before     transformers' model, its cache and mask growing by a token
    after      emf.conditioning.token_drawing; on a GPU a CUDA graph

Both draw the same tokens at the same uniform numbers, in one process and in turn, and are compared. Sizes have random
weights in float32, bfloat16 on a GPU: `narrow` has the 28 layers of Qwen3-0.6B and next to no arithmetic, so what is
measured is what the host does; `0.6B` is Qwen3-0.6B with BLIP3o-NEXT's vocabulary. Times are CPU time of one thread, or
of the clock on a GPU. The prompts' own pass is measured apart and taken off.

Run it with `python -m bench.token_draws`; it writes profiles/<device>/token-draws.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.records import GPU, PROFILES, device_name, revision, write_record
from emf.conditioning.sampling import Sampling, pick
from emf.conditioning.token_drawing import draw, positions
from emf.errors import as_command

PROMPT = 60
"""Tokens of the shortest prompt, about those of a short caption in its chat; each further row has 7 more."""
SHARED = 35
"""Of them the chat up to the caption."""
SIZES: dict[str, dict[str, Any]] = {
    "narrow": dict(
        vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=28, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    ),
    "0.6B": dict(
        vocab_size=217210, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip


def language_model(size: str) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        return Qwen3ForCausalLM(Qwen3Config(**SIZES[size], tie_word_embeddings=True)).eval().to(DTYPE)


DTYPE = torch.bfloat16 if GPU else torch.float32


@torch.no_grad()
def one_by_one(model: Any, rows: list[list[int]], uniform: Tensor, sampling: Sampling) -> Tensor:
    """As image tokens were drawn before."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=uniform.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=uniform.device)
    where, past, drawn = positions(mask), None, []
    for i in range(uniform.shape[1]):
        out = model.model(ids, mask, where, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, pick(model.lm_head(out.last_hidden_state[:, -1]), uniform[:, i], sampling)
        drawn.append(token)
        ids, where = token[:, None], where[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(drawn, 1)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    clock = time.perf_counter if GPU else time.process_time
    start = clock()
    made = run().cpu()
    return clock() - start, made


def measure(size: str, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """For both ways the milliseconds of a token of every row (median and range), and the ratio of pairs."""
    model, sampling = language_model(size), Sampling()
    words = SIZES[size]["vocab_size"]
    said = torch.randint(words, (batch, PROMPT + 7 * batch)).tolist()
    rows = [said[0][:SHARED] + row[SHARED : PROMPT + 7 * i] for i, row in enumerate(said)]
    uniform = torch.rand(batch, tokens).to(model.device)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "before": lambda u: one_by_one(model, rows, u, sampling),
        "after": lambda u: draw(model.model, model.lm_head, rows, u, sampling),
    }
    took: dict[str, list[float]] = {way: [] for way in ways}
    begun: dict[str, list[float]] = {way: [] for way in ways}
    made: dict[str, Tensor] = {}
    for i in range(rounds + 1):  # the first warms up
        for way, run in ways.items():
            prompt, _ = timed(partial(run, uniform[:, :1]))
            whole, made[way] = timed(partial(run, uniform))
            if i:
                begun[way].append(1e3 * prompt)
                took[way].append(1e3 * (whole - prompt) / (tokens - 1))
    ratios = sorted(a / b for a, b in zip(took["after"], took["before"], strict=True))
    row: dict[str, Any] = dict(size=size, batch=batch, tokens=tokens, rounds=rounds)
    row["same"] = float((made["before"] == made["after"]).double().mean())
    for way, each in took.items():
        row |= {f"{way}_ms": statistics.median(each), f"{way}_low": min(each), f"{way}_high": max(each)}
        row[f"{way}_prompt_ms"] = statistics.median(begun[way])
    return row | dict(ratio=statistics.median(ratios), ratio_low=ratios[0], ratio_high=ratios[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.token_draws", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=0, help="drawn; default: 100, of 0.6B on a CPU 8")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if min(*options.batches, options.rounds) < 1 or options.tokens in (1, *range(-9, 0)):
        parser.error("batches and rounds must each be at least 1, tokens at least 2")
    torch.set_num_threads(1)
    head = dict(device=device_name(), torch=torch.__version__, commit=revision())
    file = PROFILES / (device_name() if GPU else "cpu") / "token-draws.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    # sizes that are not measured anew stay
    record: dict[str, Any] = dict(rows=[row for row in rows if row["size"] not in options.sizes])
    for size in options.sizes:
        for batch in options.batches:
            row = measure(size, batch, options.tokens or (8 if size == "0.6B" and not GPU else 100), options.rounds)
            record["rows"].append(head | row)
            print(
                f"{size:6} batch {batch}: {row['before_ms']:.2f} -> {row['after_ms']:.2f} ms a token, "
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}); "
                f"{row['same']:.0%} of the tokens the same",
                flush=True,
            )
            write_record(file, record)
    print(f"record: {file}")


if __name__ == "__main__":
    with as_command():
        main()
