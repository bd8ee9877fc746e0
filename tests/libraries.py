"""Attention's backward as on a GPU, on tensors without data: whose kernel is called, and with what."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

HALF = (torch.float16, torch.bfloat16)


class Ours:
    """In place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **constants: None


def cudnn(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any, **scale: Any) -> Any:
    """The operator's signature, with its arguments as flash has them: heads after tokens."""
    _, _, bias, starts_q, starts_k, *lengths, dropout, causal = rest
    assert bias is starts_q is starts_k is None
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    given = flash(do, q, k, v, o, lse.squeeze(-1), None, None, *lengths, dropout, causal, None, None, **scale)
    return [x.transpose(1, 2) for x in given]


CALLS: list[dict[str, Any]] = []


def flash(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any, scale: float) -> Any:
    starts_q, starts_k, *lengths, dropout, causal, _, _ = rest
    assert starts_q is starts_k is None
    shapes = [(tuple(x.shape), x.stride()) for x in (do, q, k, v, o, lse)]
    CALLS.append(dict(shapes=shapes, lengths=lengths, dropout=dropout, causal=causal, scale=scale))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def check_backward(file: Any) -> None:
    """PyTorch's kernels take half precision without a mask, and are told causal and scale; ours the rest. file: the
    module of attention, or a changed copy of it."""
    with ExitStack() as stack:
        for patch in (
            mock.patch.multiple(file, _bwd_q=Ours(), _bwd_kv=Ours()),
            mock.patch("emf_kernels.launch.configuration", lambda kernel, x, default, **shape: default),
            mock.patch("emf_kernels.launch.shared_memory", lambda x: 227 * 1024),
            mock.patch.object(torch.ops.aten, "_flash_attention_backward", flash),
            mock.patch.object(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", cudnn),
            FakeTensorMode(),
        ):
            stack.enter_context(patch)
        for library, dtype, D, masked, causal, deterministic in product(
            ("cudnn", "flash", ""), (*HALF, torch.float32), (20, 112), *[(False, True)] * 3
        ):
            told = f"{library or 'no library'}, {dtype}, D {D}, masked {masked}, deterministic {deterministic}"
            Nk = 40 if causal else 64
            # each with strides of its own: sizes alone would not tell do from q and o, or k from v
            do, q, o, k, v = (
                torch.empty_strided((2, n, 3, D), (n * 3 * (D + i), 3 * (D + i), D + i, 1), dtype=dtype, device="cuda")
                for i, n in enumerate((40, 40, 40, Nk, Nk))
            )
            mask = torch.empty(2, Nk, dtype=torch.bool, device="cuda") if masked else None
            lse = torch.empty(2, 3, 40, device="cuda")
            CALLS.clear()
            torch.use_deterministic_algorithms(deterministic)
            with mock.patch("emf_kernels.launch._attention_library", lambda *_, library=library: library):
                grads = file.backward((q, k, v, mask, o, lse, causal, 0.3, None, None, None, None, False), do)
            torch.use_deterministic_algorithms(False)
            assert [g.shape for g in grads] == [q.shape, k.shape, v.shape], told
            if not library or dtype not in HALF or D % 8 or masked or deterministic:
                assert not CALLS, told
                continue
            shapes = [(tuple(x.shape), x.stride()) for x in (do, q, k, v, o, lse)]
            (call,) = CALLS
            assert call == dict(shapes=shapes, lengths=[40, Nk], dropout=0, causal=causal, scale=0.3), told
