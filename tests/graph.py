"""What a result holds for its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(*outputs: Tensor) -> int:
    """Bytes that the graph of the outputs holds for backward, weights left out: every storage once."""
    seen, storages, stack = set(), {}, [y.grad_fn for y in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for x in [*saved, *getattr(node, "saved_tensors", ())]:
            for t in x if isinstance(x, (tuple, list)) else [x]:
                if isinstance(t, Tensor) and not isinstance(t, torch.nn.Parameter):
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())
