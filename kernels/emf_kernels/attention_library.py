"""The backward of attention by the kernels that PyTorch brings, where it has one for the call.

They take what attention's own forward saved: o and the logarithms lse of its sums. Both are attention of half precision
without masks, bias or packed sequences; both add up dq in an order that changes from call to call. Flash alone is asked
for grouped queries, and for causal with Nq != Nk, of which it has the lower right corner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import attention_library


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(dq, dk, dv), or None where no library has this.

    do, q, o [B, Nq, H, D]; k, v [B, Nk, G, D]; lse [B, H, Nq] float32.
    """
    if not q.is_cuda or q.dtype == torch.float32 or q.shape[3] % 8 or torch.are_deterministic_algorithms_enabled():
        return None
    name, lengths = attention_library(q), (q.shape[1], k.shape[1])
    same = q.shape[2] == k.shape[2] and (not causal or q.shape[1] == k.shape[1])
    if name == "cudnn" and same and q.shape[3] <= 128 and not any(0 in x.stride() for x in (do, q, k, v)):
        state = torch.empty((), dtype=torch.int64, device=q.device)  # of the dropout that there is not
        by_head = (x.transpose(1, 2) for x in (do, q, k, v, o))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *by_head, lse.unsqueeze(-1), state, state, None, None, None, *lengths, 0.0, causal, scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    if name:
        state = torch.empty(0, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, lse, None, None, *lengths, 0.0, causal, state, state, scale=scale
        )
    return None
