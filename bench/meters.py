"""What a step computes, launches and holds: counted, not timed."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MOVES = ("_unsafe_view", "clone", "copy_", "_to_copy", "cat", "zeros_like", "empty_like")  # no arithmetic


class Count(TorchDispatchMode):
    """Operators called, views left out; the floating-point operations of those that PyTorch has a formula for
    (products, convolutions, attention), and the elements that the others give. (FlopCounterMode's own module tracker
    does not survive torch.func.)"""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.flops = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(isinstance(a, Tensor) and a._is_zerotensor() for a in args):
            return out  # forward AD's zeros are multiplied by nobody
        self.ops += not func.is_view
        if func is torch.ops.aten.convolution.default:  # PyTorch's own formula takes no account of groups in backward
            self.flops += 2 * out.numel() * args[1][0].numel()
        elif func is torch.ops.aten.convolution_backward.default:
            self.flops += 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
        elif func is torch.ops.aten._flash_attention_backward.default:  # of [B, N, H, D], as PyTorch's formula is not
            (B, Nq, H, D), Nk = args[0].shape, args[2].shape[1]
            self.flops += 10 * B * H * Nq * Nk * D
        elif formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        elif isinstance(out, Tensor) and not func.is_view and func._overloadpacket.__name__ not in MOVES:
            self.elements += out.numel()
        return out


class Held:
    """Bytes that autograd holds for backward, each storage once, weights left out: live and peak."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.count, self.live, self.peak = weights, dict[int, int](), 0, 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.x):
            yield

    def _pack(self, x: Tensor) -> Any:
        return _Saved(self, x.detach())

    def add(self, x: Tensor) -> tuple[int, int]:
        inner = x
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        if inner._is_zerotensor():  # forward AD's zeros, which have no storage
            return 0, 0
        storage = inner.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self.weights or not at:
            return 0, 0
        if not self.count.get(at):
            self.live += size
            self.peak = max(self.peak, self.live)
        self.count[at] = self.count.get(at, 0) + 1
        return at, size

    def remove(self, at: int, size: int) -> None:
        if at:
            self.count[at] -= 1
            self.live -= 0 if self.count[at] else size


class _Saved:
    def __init__(self, held: Held, x: Tensor) -> None:
        self.held, self.x, self.at = held, x, (0, 0)
        self.at = held.add(x)

    def __del__(self) -> None:
        self.held.remove(*self.at)


def kernels_launched(call: Callable[[], Any]) -> int:
    """Kernels that a call launches on a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(e.count for e in profiler.key_averages() if e.device_type == on_gpu and not e.key.startswith("Mem"))


@contextmanager
def heap_set_aside() -> Iterator[None]:
    """While the block runs, garbage is looked for among what is made in it alone. Each collection else visits all that
    the process holds, which takes longer than a small step where that is a million objects of imports."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def process_peak_bytes(call: Callable[[], Any]) -> int | None:
    """Resident memory that the process holds at most during a call, beyond what it held before. None where the system
    is no Linux that lets a process begin its peak anew."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # the allocator's free memory would hide what the call asks for
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))
