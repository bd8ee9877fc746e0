"""A small diffusion transformer of one's own on emf_kernels alone: trained by MeanFlow, then drawing in one step.

    python examples/own_dit.py              # about half a minute on a CPU
    python examples/own_dit.py --steps 20   # a try

The pictures are toys: 8 x 8 pixels with one bright spot somewhere. Nothing here imports emf, and nothing here is
written twice: the same forward pass computes a value from Tensors, and a value with its tangent from Duals. On a CPU
the ops run their references in plain torch; on a CUDA device (--device cuda, not tried yet) they are fused kernels.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emf_kernels import (
    Dual,
    adaln,
    attention,
    each,
    gated_residual,
    linear,
    meanflow,
    modulation,
    path,
    silu,
    time_embedding,
)

Value = Any  # a Tensor, or a Dual: what every function below takes and returns, alike
SIDE, PATCH = 8, 2
TOKENS, PIXELS = (SIDE // PATCH) ** 2, PATCH**2


class Linear(nn.Module):
    """An affine map of the last dimension."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Value) -> Value:
        return linear(x, self.weight, self.bias)


class TimeEmbed(nn.Module):
    """Sinusoids [B, 64] -> one vector for each sample [B, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Linear(64, width), Linear(width, width)

    def forward(self, sinusoids: Value) -> Value:
        return self.second(silu(self.first(sinusoids)))


class Block(nn.Module):
    """Self-attention and an MLP, each normalised and modulated before and gated behind (adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = Linear(width, 6 * width)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Value, time: Value) -> Value:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(self.modulate(time), self.table)
        qkv = self.qkv(adaln(x, scale, shift))
        # a rearrangement that keeps the batch first goes through each(): it is done to the value and to the tangent
        q, k, v = (each(partial(self.heads_of, part=part), qkv) for part in range(3))
        attended = each(lambda a: a.flatten(2), attention(q, k, v))
        x = gated_residual(x, gate, self.out(attended))
        return gated_residual(x, gate_mlp, self.down(silu(self.up(adaln(x, scale_mlp, shift_mlp)))))

    def heads_of(self, qkv: Tensor, part: int) -> Tensor:
        """Queries, keys or values [B, N, heads, C / heads] of [B, N, 3 C]."""
        return qkv.chunk(3, -1)[part].unflatten(-1, (self.heads, -1))


class DiT(nn.Module):
    """The average velocity u(z, r, t) of tokens z [B, TOKENS, PIXELS] at times t, r [B]."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.unembed = Linear(PIXELS, width), Linear(width, PIXELS)
        self.position = nn.Parameter(torch.randn(TOKENS, width) / 4)
        self.end, self.interval = TimeEmbed(width), TimeEmbed(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, z: Value, t: Value, r: Tensor) -> Value:
        end, interval = time_embedding(t, r, 10.0, 64)
        # a Dual has no arithmetic: a sum is a residual without a gate
        time = silu(gated_residual(self.end(end), None, self.interval(interval)))
        x = gated_residual(self.embed(z), None, self.position.expand(len(r), -1, -1))
        for block in self.blocks:
            x = block(x, time)
        return self.unembed(x)


def pictures(n: int, device: str) -> Tensor:
    """Toys as tokens [n, TOKENS, PIXELS], in about [-1, 1]."""
    middle = 1 + (SIDE - 3) * torch.rand(n, 2, 1, device=device)
    near = (-((torch.arange(SIDE, device=device) - middle) ** 2) / 2).exp()  # [n, 2, SIDE]
    image = 2 * near[:, 0, :, None] * near[:, 1, None, :] - 1
    patches = image.unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [n, rows, PATCH, columns, PATCH]
    return patches.transpose(2, 3).reshape(n, TOKENS, PIXELS)


def image(tokens: Tensor) -> Tensor:
    """[n, SIDE, SIDE] of tokens."""
    rows = SIDE // PATCH
    return tokens.view(-1, rows, rows, PATCH, PATCH).transpose(2, 3).reshape(-1, SIDE, SIDE)


def step(model: DiT, x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of one batch, a share of whose samples has r < t."""
    B, b = len(x), round(len(x) * share)
    times = torch.randn(2, B, device=x.device).sigmoid()
    t, r = times.max(0).values, times.min(0).values
    r = torch.cat([r[:b], t[b:]])  # the samples with a tangent come first
    z, v = path(x, torch.randn_like(x), t)
    # the tangent of (z, t, r) along the path is (v, 1, 0); the other samples carry none
    u = model(Dual(z, v[:b]), Dual(t, torch.ones_like(t[:b])), r)
    loss, error = meanflow(u.primal, u.tangent, v, t, r)
    return loss.mean(), error.mean()


def train(steps: int, device: str = "cpu", batch: int = 64) -> tuple[DiT, list[float]]:
    """A trained model, and the mean squared error of each step. The loss itself is near 1 at every step, for every
    sample's loss is divided by its own size."""
    torch.manual_seed(0)
    model = DiT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    errors: list[float] = []
    for n in range(steps):
        loss, error = step(model, pictures(batch, device), share=0.5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        errors.append(error.item())
        schedule.step()
        done = n + 1
        if done & n == 0 or done == steps:  # 1, 2, 4, 8, ... and the last
            recent = errors[-10:]
            print(f"step {done:4}: mean squared error {sum(recent) / len(recent):.3f}", flush=True)
    return model, errors


@torch.no_grad()
def draw(model: DiT, n: int, device: str) -> Tensor:
    """[n, SIDE, SIDE] from noise in one step: x = z - u(z, r = 0, t = 1)."""
    z = torch.randn(n, TOKENS, PIXELS, device=device)
    return image(z - model(z, torch.ones(n, device=device), torch.zeros(n, device=device)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}; expected at least 1")
    model, _ = train(options.steps, options.device)
    print("four pictures, each drawn in one step:")
    for row in torch.cat(tuple(draw(model, 4, options.device)), 1).clamp(-1, 1).tolist():
        print("".join(" .:*#"[round(2 * (pixel + 1))] * 2 for pixel in row))


if __name__ == "__main__":
    main()
