"""What is assumed of each chip, with its source: one table, from which every bound and every simulated time follows.

Sources, by the letter that stands beside a figure:
G  NVIDIA, CUDA C++ Programming Guide, "Arithmetic Instructions" (results a clock and multiprocessor) and "Technical
   Specifications per Compute Capability" (registers, shared memory, warps and blocks of a multiprocessor).
W  NVIDIA's white papers and data sheets of the A100, GA102 (RTX 3090), AD102 (RTX 4090), H100, B200, GB202 (RTX 5090):
   multiprocessors, boost clock, memory, and the tensor cores' products a clock, which follow from their peak.
M  Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking" (arXiv 2402.13499)
   and its successor (arXiv 2501.12084): latencies; mma.sync reaches 62 % of wgmma's rate on an H100.
C  Chips and Cheese, "Nvidia's H100: Funny L2, and Tons of Bandwidth" (2023): 5.5 TB/s from the L2 cache.
K  profiles/nvidia-h100-80gb-hbm3/kernels.json, an H100's own clock: row kernels that wait for memory, and launches of
   almost nothing, which take 2.3 to 3.5 us.
E  an estimate of ours: see the note beside it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates are of one multiprocessor and clock."""

    name: str
    arguments: int
    """Where a kernel's arguments begin in the constant bank 0 (of the machine code itself)."""
    clock: float
    """Hz."""
    multiprocessors: int
    dram: float
    """Bytes a second: 0.9 of the data sheet's, which a copy of large tensors reaches (E)."""
    fp32: int
    tensor: int
    """Products of bfloat16 added up in float32, by the fastest instruction of the chip; half as many of tf32."""
    mma: int
    """The same by mma.sync (HMMA)."""
    shared_kib: int
    """What one block may have."""
    shared_total_kib: int
    l1_kib: int
    """L1 cache and shared memory together."""
    l2_mib: int
    warps: int
    blocks: int
    l2: float | None = None
    """Bytes a second; None: no figure was found, so there is neither a bound by L2 nor a simulated time."""
    int32: int = 64
    multiply: int = 64
    special: int = 16
    """Exponentials, reciprocals, roots; conversions too (E: some chips convert faster)."""
    l1_bytes: int = 128
    latency: tuple[int, int, int] = (41, 263, 800)
    """Clocks to L1, L2 and memory. The last is 479 (M) on an idle H100, and more under load (K)."""
    launch: float = 1.6e-6
    """Seconds that an almost empty launch takes beyond what its instructions do (K)."""
    registers: int = 65536
    issue: int = 4


CHIPS = {
    # G: rates, limits. W: 108 x 1.41 GHz, 2.04 TB/s, 312 TFLOP/s. L2: H100's share of its 5120 bytes a clock (E)
    "sm_80": Chip("A100 80 GB SXM", 0x160, 1.41e9, 108, 1.83e12, 64, 1024, 1024, 163, 164, 192, 40, 64, 32, 4.4e12),
    # W: 82 x 1.695 GHz, 936 GB/s, 71 TFLOP/s of float16 added up in float32
    "sm_86": Chip("RTX 3090", 0x160, 1.695e9, 82, 0.84e12, 128, 256, 256, 99, 100, 128, 6, 48, 16),
    # W: 128 x 2.52 GHz, 1008 GB/s, 165 TFLOP/s
    "sm_89": Chip("RTX 4090", 0x160, 2.52e9, 128, 0.91e12, 128, 256, 256, 99, 100, 128, 72, 48, 24),
    # W: 132, 3.35 TB/s, 989 TFLOP/s at 1.83 GHz. Under the load of tensor cores the clock falls to about 1.7 GHz (E)
    "sm_90": Chip("H100 SXM", 0x210, 1.7e9, 132, 3.0e12, 128, 2048, 1270, 227, 228, 256, 50, 64, 32, 5.5e12),
    # W: 148 x 1.85 GHz, 8 TB/s, 2250 TFLOP/s. L2: as many bytes a clock and multiprocessor as H100's (E); mma.sync as
    # fast as an A100's (E)
    "sm_100": Chip("B200", 0x380, 1.85e9, 148, 7.2e12, 128, 4096, 1024, 227, 228, 256, 126, 64, 32, 6.7e12),
    # W: 170 x 2.407 GHz, 1792 GB/s, 209 TFLOP/s
    "sm_120": Chip("RTX 5090", 0x380, 2.407e9, 170, 1.61e12, 128, 256, 256, 99, 100, 128, 96, 48, 24),
}
TRUST = {
    "sm_90": "the model was compared with an H100's clock: see Trust",
    "sm_80": "the model of an H100 with another table, compared with no clock",
    "sm_100": "coarse: tensor memory and its barriers are modelled roughly, and no clock was compared",
}
"""How far to believe a simulated time."""
