"""What a training run needs before it is started: parameters, memory by ZeRO stage, operations, days (`emf plan`).

Activations are those of the fused kernels: what each op of a block keeps for backward, counted from its code and held
to measured bytes by tests/train/test_plan.py. Everything is for one GPU unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from emf.model.sizes import TransformerConfig
from emf.model.transformer import Transformer
from emf.recipes import BATCH, EMF_TRAINS, RECIPES, SAMPLES

GIB = 2**30
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 operations a second, by data sheet."""


def peak_flops(device: str) -> float | None:
    """Of a device by the name that CUDA gives it; None where it is not in PEAK_FLOPS."""
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in device), None)


PAPER_STEPS = {"4 steps near their best": 10_000, "2 steps": 70_000, "1 step": 90_000}
"""Optimizer steps of the paper's figure 4 (arXiv 2604.18168)."""
QWEN3_17B = 1_409_410_048 + 217_210 * 2048
"""BLIP3o-NEXT's language model with its image vocabulary, head tied: counted in its published weights
(arXiv 2510.15857)."""
CONNECTOR = 10_033_920


@dataclass(frozen=True)
class Model:
    """A published model: its transformer, tokens of its condition, and what else is held in memory."""

    transformer: TransformerConfig
    condition: int
    others: int = 0
    """Parameters beside the transformer: frozen language model and connector. Text states that come from a cache need
    none."""


_SANA = TransformerConfig(dual_time=True)
MODELS = {
    "sana-1.5-1.6b": Model(_SANA, 300),
    "sana-1.5-4.8b": Model(replace(_SANA, num_layers=60), 300),
    "blip3o-next-3b": Model(_SANA, 730, QWEN3_17B + CONNECTOR),
}


def parameters(config: TransformerConfig) -> tuple[int, int]:
    """(all, trained) of the transformer, where EMF's part of it is trained."""
    with torch.device("meta"):
        net = Transformer(config)
    trained = tuple(name.removeprefix("transformer.") for name in EMF_TRAINS)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    return sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith(trained))


def activation_bytes(config: TransformerConfig, tokens: int, condition: int, itemsize: int = 2) -> dict[str, float]:
    """Bytes a sample: `block`, what one block keeps for backward; `input`, what it keeps under checkpointing; `rest`,
    outside the blocks; `tangent`, what is alive of tangents at most, for a sample that carries one."""
    C, F, N, M = config.channels, int(config.mlp_ratio * config.channels), tokens, condition
    # x, h, q k v, o, its projection; x, q before and after its norm, o; x, h, the feed-forward's output
    by_token = 14 * C + 3 * F
    by_text = 3 * C  # k before and after its norm, v
    norms = 4 * (8 * N + M + config.num_cross_attention_heads * N)  # float32 statistics of norms and softmax
    states = 4 * C * (config.attention_head_dim + 1)  # linear attention's sums, float32
    block = itemsize * (N * by_token + M * by_text + 6 * C) + norms + states  # 6 C: its modulation
    text = M * (config.caption_channels + 4 * C)  # the caption's projection, GELU and norm
    times = 2 * (256 + 4 * C) + 2 * C
    pixels = N * config.patch_size**2 * (config.in_channels + config.out_channels)
    rest = itemsize * (text + times + pixels + 2 * N * C)
    return dict(block=block, input=itemsize * N * C, rest=rest, tangent=itemsize * N * (2 * C + 3 * F))


def forward_flops(config: TransformerConfig, tokens: int, condition: int) -> float:
    """Operations of a sample's forward: products, convolutions and attention."""
    C, F, N, M = config.channels, int(config.mlp_ratio * config.channels), tokens, condition
    linear = 2 * (N * (4 * C * C + 2 * C * C + 3 * C * F) + M * 2 * C * C)
    mixing = 4 * N * M * C + 4 * N * C * (config.attention_head_dim + 1) + 2 * 9 * N * 2 * F
    ends = 2 * N * C * config.patch_size**2 * (config.in_channels + config.out_channels)
    ends += 2 * M * (config.caption_channels * C + C * C) + 2 * 2 * (256 * C + 7 * C * C)
    return config.num_layers * (linear + mixing) + ends


@dataclass(frozen=True)
class Plan:
    """What was asked, and what it needs."""

    model: str
    gpus: int
    memory: float
    rows: list[dict[str, Any]]
    """A ZeRO stage each: GiB of weights, gradients, optimizer, ema; activations kept and checkpointed; whether they
    fit."""
    total: int
    trained: int
    micro_batch: int
    share: float
    step_flops: float
    step_seconds: float
    days: dict[str, float]
    cache_gib: dict[str, float]


def plan(
    model: str,
    gpus: int = 8,
    memory: float = 80.0,
    *,
    resolution: int = 1024,
    micro_batch: int = 1,
    batch_size: int = BATCH,
    share: float = 0.5,
    mfu: float = 0.4,
    gpu: str = "H100",
    offload: bool = False,
) -> Plan:
    """Plan a run of one of MODELS. Raises ValueError on what is not there or cannot be.

    share: of the samples with r < t, which carry a tangent (EMF: 0.25 to 0.75 over training). memory: GiB a GPU.
    offload: the optimizer's states lie in the host's memory.
    """
    if model not in MODELS:
        raise ValueError(f"plan: no model {model!r}; there are {', '.join(MODELS)}")
    if gpu not in PEAK_FLOPS:
        raise ValueError(f"plan: no GPU {gpu!r}; there are {', '.join(PEAK_FLOPS)}")
    if min(gpus, micro_batch, batch_size, memory) <= 0 or not 0 <= share <= 1 or not 0 < mfu <= 1:
        raise ValueError(
            f"plan: gpus {gpus}, memory {memory}, micro-batch {micro_batch}, batch size {batch_size}, share {share}, "
            f"mfu {mfu}; expected at least 1 GPU and sample, some memory, a share in [0, 1], an mfu in (0, 1]"
        )
    if resolution % 32 or resolution < 32 or batch_size % (gpus * micro_batch):
        raise ValueError(
            f"plan: resolution {resolution} must be a multiple of 32, batch size {batch_size} a multiple of "
            f"{gpus} GPUs x micro-batch {micro_batch}"
        )
    m, tokens = MODELS[model], (resolution // 32) ** 2
    total, trained = parameters(m.transformer)
    a = activation_bytes(m.transformer, tokens, m.condition)
    layers = m.transformer.num_layers
    tangent = micro_batch * share * a["tangent"]
    kept = micro_batch * (layers * a["block"] + a["rest"]) + tangent
    # under checkpointing one block is whole at a time, with its gradients beside it
    checkpointed = micro_batch * (layers * a["input"] + 2 * a["block"] + a["rest"]) + tangent
    rows = []
    for stage in range(4):
        split = [gpus if stage >= least else 1 for least in (3, 2, 1)]
        parts = dict(
            weights=2 * (total + m.others) / split[0],
            gradients=2 * trained / split[1],
            optimizer=0.0 if offload else 12 * trained / split[2],  # float32 master, two moments
            ema=4 * trained / (gpus if stage else 1),  # of the master weights, sharded as they are
            activations=kept,
            checkpointed=checkpointed,
        )
        state = sum(parts[k] for k in ("weights", "gradients", "optimizer", "ema"))
        row: dict[str, Any] = dict(stage=stage) | {k: v / GIB for k, v in parts.items()}
        row |= dict(fits=(state + kept) / GIB < memory, fits_checkpointed=(state + checkpointed) / GIB < memory)
        rows.append(row)
    forward = forward_flops(m.transformer, tokens, m.condition)
    flops = batch_size * forward * (3 + share)
    seconds = flops / (gpus * mfu * PEAK_FLOPS[gpu])
    latents = m.transformer.in_channels * tokens * 2 * SAMPLES / GIB
    cache = {"latents": latents, "image-token ids": 729 * 4 * SAMPLES / GIB}
    whole = RECIPES["sana-1.5-1.6b-paper"]().steps
    days = {what: n * seconds / 86400 for what, n in (PAPER_STEPS | {"the whole run": whole}).items()}
    return Plan(model, gpus, memory, rows, total + m.others, trained, micro_batch, share, flops, seconds, days, cache)


def show(p: Plan) -> None:
    """The plan as tables on the terminal."""
    from emf.show.table import console, terminal

    rows, out = [], console()
    for row in p.rows:
        state = sum(row[k] for k in ("weights", "gradients", "optimizer", "ema"))
        cells = [str(row["stage"]), *(f"{row[k]:.1f}" for k in ("weights", "gradients", "optimizer", "ema"))]
        for kind, fits in (("activations", "fits"), ("checkpointed", "fits_checkpointed")):
            mark = "" if row[fits] else f" > {p.memory:g}"
            cells += [f"{row[kind]:.1f}", f"{state + row[kind]:.1f}{mark}"]
        rows.append(cells)
    heads = ("ZeRO", "weights", "grads", "optim", "EMA", "kept", "sum", "recomputed", "sum")
    out.print(terminal(heads, rows, f"{p.model}: GiB a GPU, micro-batch {p.micro_batch}, {p.gpus} GPUs"))
    out.print(f"{p.total / 1e9:.2f}B parameters, {p.trained / 1e9:.2f}B of them trained")
    out.print(
        f"{p.step_flops / 1e15:.1f} PFLOP a step, a share of {p.share:g} with r < t; {p.step_seconds:.2f} s expected: "
        + ", ".join(f"{what} {days:.1f} days" for what, days in p.days.items())
    )
    sizes = ", ".join(f"{k} {v:.1f} GiB" for k, v in p.cache_gib.items())
    out.print(f"a cache of {SAMPLES:,} samples: {sizes}")
