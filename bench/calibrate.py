"""How far the predictions of `bench/static.py` lie from clocks: beside figures that others published, and beside our
own where profiles/<device>/kernels.json has them (`bench/clocks.py`). `make static` prints both and writes
profiles/static/calibration.json.
"""

from __future__ import annotations

from bench.static import Launch, compiled, predict  # isort: skip - first: it decides that kernels are compiled

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.chips import CHIPS
from bench.clocks import FILE, Row, measured, summary
from bench.records import write_record
from emf.errors import as_command


@triton.jit
def flash(qkvo_ptr, size, N, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A plain FlashAttention-2 forward of [B, H, N, D], as Triton's tutorial has it, whose times are published. q, k, v
    and o lie behind each other, each of size elements."""
    qkvo_ptr += tl.program_id(1).to(tl.int64) * N * D
    rows, d, n = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, D), tl.arange(0, BLOCK_K)
    at = rows[:, None] * D + d[None, :]
    q = tl.load(qkvo_ptr + at)
    m, l = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    a = tl.zeros([BLOCK_Q, D], tl.float32)
    for first in range(0, N, BLOCK_K):
        k = tl.load(qkvo_ptr + size + (first + n)[:, None] * D + d[None, :])
        v = tl.load(qkvo_ptr + 2 * size + (first + n)[:, None] * D + d[None, :])
        s = tl.dot(q, tl.trans(k)) * 0.1275  # log2(e) / sqrt(128)
        m_next = tl.maximum(m, tl.max(s, 1))
        p, shrink = tl.exp2(s - m_next[:, None]), tl.exp2(m - m_next)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        a = tl.dot(p.to(v.dtype), v, a * shrink[:, None])
        m = m_next
    tl.store(qkvo_ptr + 3 * size + at, a / l[:, None])


@triton.jit
def norm(x_ptr, weight_ptr, y_ptr, eps, C: tl.constexpr):
    """An RMSNorm of a row."""
    at, c = tl.program_id(0).to(tl.int64) * C, tl.arange(0, C)
    x = tl.load(x_ptr + at + c).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / C + eps)
    tl.store(y_ptr + at + c, x * rstd * tl.load(weight_ptr + c))


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def flash_launch(B: int, H: int, N: int, D: int, **options: int) -> Launch:
    blocks = {k: options.pop(k) for k in ("BLOCK_Q", "BLOCK_K")}
    arguments = dict(qkvo_ptr=meta(4, B, H, N, D), size=B * H * N * D, N=N, D=D)
    return Launch(flash, arguments | blocks, options, (N // blocks["BLOCK_Q"], B * H))


def norm_launch(rows: int, C: int, num_warps: int) -> Launch:
    tensors = dict(x_ptr=meta(rows, C), weight_ptr=meta(C), y_ptr=meta(rows, C))
    return Launch(norm, tensors | dict(eps=1e-6, C=C), dict(num_warps=num_warps), (rows,))


FLASH = (
    "pytorch/benchmark",
    "https://github.com/pytorch/benchmark/pull/2391: triton_tutorial_flash_v2, H100, forward, no mask",
)
PAPER = (
    "FlashAttention-3's paper",
    "arXiv 2407.08608, figure 5, H100 SXM, forward, head size 128, no mask: the bars of Triton",
)
QUACK = "QuACK (Dao-AILab, 2025), H100: the best norms come to about 3.0 TB/s; Triton's were up to 1.5 times slower"
TRIED = [dict(BLOCK_Q=128, BLOCK_K=k, num_warps=8, num_stages=s) for k, s in ((64, 2), (64, 3), (128, 2))]


def published() -> list[Row]:
    """Predicted beside published. Of attention's configurations the best predicted counts, as an autotuner's would."""
    found = []
    figures = ((8, 2048, 433.7, FLASH), (4, 4096, 458.4, FLASH), (8, 2048, 389.0, PAPER))
    for B, N, figure, (who, source) in figures:
        times = []
        for options in TRIED:
            made, _ = compiled(flash_launch(B, 16, N, 128, **options), "sm_90")
            times.append(predict(made, "sm_90")["simulated_us"])
        time = min((t for t in times if t), default=None)
        reached = None if time is None else 4 * B * 16 * N * N * 128 / time / 1e6
        name = f"FlashAttention-2 forward in Triton, B {B}, 16 heads of 128, N {N} ({who})"
        found.append(row(name, source, "TFLOP/s", figure, reached))
    made, _ = compiled(norm_launch(16384, 4096, 8), "sm_90")
    time = predict(made, "sm_90")["simulated_us"]
    reached = None if time is None else 2 * 16384 * 4096 * 2 / time / 1e6
    return [
        *found,
        row("RMSNorm in Triton, 16384 x 4096, bfloat16 (the best norms, QuACK)", QUACK, "TB/s", 3.0, reached),
    ]


def row(name: str, source: str, unit: str, figure: float, reached: float | None) -> Row:
    """ratio: the published time over the predicted one."""
    ratio = None if reached is None else round(reached / figure, 3)
    predicted = None if reached is None else round(reached, 2)
    return dict(what=name, source=source, unit=unit, published=figure, predicted=predicted, ratio=ratio)


def told(rows: list[Row], clocks: dict[str, list[Row]]) -> str:
    """Both, as lines."""
    lines = ["Predicted beside published (ratio: published time over predicted):"]
    for r in rows:
        reached = "not simulated" if r["ratio"] is None else f"predicted {r['predicted']:g}, ratio {r['ratio']:.2f}"
        lines.append(f"  {r['what']}: published {r['published']:g} {r['unit']}, {reached}")
    for device, found in clocks.items():
        s = summary(found)
        lines.append(
            f"Measured over simulated on {device}: median {s['median']:.2f}, {s['least']:.2f} to {s['most']:.2f}, "
            f"{s['launches']} launches"
        )
        for r in sorted(found, key=lambda r: -r["ratio"]):
            name = f"{r['op']}.{r['kernel']} {r['case']} {r['launch']}"
            lines.append(f"  {name}: {r['us']:.1f} us, simulated {r['simulated_us']:.1f}, ratio {r['ratio']:.2f}")
    if not clocks:
        lines.append("No device has profiles/<device>/kernels.json: no time of our own kernels was measured.")
    return "\n".join(lines)


def main(write: bool = True) -> None:
    rows = published()
    if write:
        write_record(FILE, dict(chip=CHIPS["sm_90"].name, rows=rows))
    print(told(rows, measured()))


if __name__ == "__main__":
    with as_command():
        main()
