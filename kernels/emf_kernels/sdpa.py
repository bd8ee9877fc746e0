"""attention in the signature of torch.nn.functional.scaled_dot_product_attention, for models that know no Duals."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .dual import Dual, each, primal
from .ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor | Dual,
    key: Tensor | Dual,
    value: Tensor | Dual,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """query [B, H, Nq, D]; key, value [B, H, Nk, D]; attn_mask bool [B or 1, 1, 1, Nk], True where a key is attended
    to; result [B, H, Nq, D]. Under torch.func.jvp it gives the tangent that SDPA's fused backends have not got.

    Raises ValueError on what the kernel has not: dropout, grouped queries, a mask that differs by query or is added.
    """
    q, k = primal(query), primal(key)
    if dropout_p or enable_gqa:
        raise ValueError(
            f"scaled_dot_product_attention: dropout_p {dropout_p}, enable_gqa {enable_gqa}; expected neither"
        )
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2]:
        shapes = f"query is {tuple(q.shape)}, key is {tuple(k.shape)}"
        raise ValueError(f"scaled_dot_product_attention: {shapes}; expected [B, H, N, D]")
    mask = attn_mask
    if mask is not None:
        if mask.ndim != 4 or mask.shape[0] not in (1, q.shape[0]) or mask.shape[1:] != (1, 1, k.shape[2]):
            raise ValueError(
                f"scaled_dot_product_attention: attn_mask is {tuple(mask.shape)}; expected bool "
                f"[{q.shape[0]}, 1, 1, {k.shape[2]}], one entry a key"
            )
        mask = mask[:, 0, 0].expand(q.shape[0], -1)
    heads_inside = lambda x: x.transpose(1, 2)  # noqa: E731
    o = attention(*(each(heads_inside, x) for x in (query, key, value)), mask, is_causal, scale)
    return each(heads_inside, o)
