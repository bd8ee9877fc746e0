"""attention in the signature of torch.nn.functional.scaled_dot_product_attention, for models that know no Duals."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

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
    """query [B, H, Nq, D]; key, value [B, G, Nk, D], where G is H, or divides it with enable_gqa; result as query.
    Under torch.func.jvp it gives the tangent that SDPA's fused backends have not got.

    attn_mask: bool, True where a query attends to a key, or of query's dtype and added to the scores; of at most four
    dimensions, broadcast to [B, H, Nq, Nk], the last being Nk. Or causal_upper_left or causal_lower_right of
    torch.nn.attention.bias. is_causal is the upper left corner where Nq and Nk differ, and may be joined with a mask,
    which torch refuses. A query without any key gives 0.

    Raises ValueError on what the kernel has not: dropout, other shapes, and the gradient of a mask that has one row for
    all queries (it would take a matrix of [Nq, Nk] that nobody gave).
    """
    q, k, bias = primal(query), primal(key), None
    causal: bool | str = is_causal
    if dropout_p:
        raise ValueError(f"scaled_dot_product_attention: dropout_p is {dropout_p}; expected 0")
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or (q.shape[1] != k.shape[1] and not enable_gqa):
        shapes = f"query is {tuple(q.shape)}, key is {tuple(k.shape)}, enable_gqa is {enable_gqa}"
        raise ValueError(f"scaled_dot_product_attention: {shapes}; expected [B, H, N, D]")
    (B, H, Nq, _), Nk, mask = q.shape, k.shape[2], attn_mask
    if isinstance(mask, CausalBias):
        if (mask.seq_len_q, mask.seq_len_kv) != (Nq, Nk):
            lengths = f"{mask.seq_len_q} and {mask.seq_len_kv}"
            raise ValueError(f"scaled_dot_product_attention: attn_mask is of lengths {lengths}; expected {Nq} and {Nk}")
        causal, mask = True if mask.variant == CausalVariant.UPPER_LEFT else "lower right", None
    if mask is not None:
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        fits = zip(shape, (B, H, Nq, Nk), (1, 1, 1, Nk), strict=False)
        if len(shape) != 4 or not all(n in (m, least) for n, m, least in fits):
            raise ValueError(
                f"scaled_dot_product_attention: attn_mask is {tuple(mask.shape)}; expected what broadcasts to "
                f"{(B, H, Nq, Nk)}, the last dimension whole"
            )
        if mask.requires_grad and shape[2] != Nq:
            raise ValueError(
                f"scaled_dot_product_attention: attn_mask {tuple(mask.shape)} requires grad; expected a row for each "
                f"of {Nq} queries, or a constant"
            )
        mask = mask.reshape(shape)
        if mask.is_floating_point():
            bias, mask = mask.expand(-1, -1, Nq, -1), None
        else:
            mask = mask[:, 0, 0].expand(B, -1) if shape[1:3] == (1, 1) else mask.expand(-1, -1, Nq, -1)
    heads_inside = lambda x: x.transpose(1, 2)  # noqa: E731
    o = attention(*(each(heads_inside, x) for x in (query, key, value)), mask, causal, scale, bias)
    return each(heads_inside, o)
