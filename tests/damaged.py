"""Bytes and JSON as users' files may hold them: what was whole, with a part of it broken or of another kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**31, 2**70, -(2**40), 0.5, -0.0, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "yes", "1", "\ud83d", "../x", "--help", "a b", "a\0b", "none"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "1"]), inner, max_size=2),
    max_leaves=4,
)
"""What JSON can hold."""


@st.composite
def damaged(draw: st.DrawFn, whole: Sequence[bytes], most: int = 40) -> bytes:
    """One of `whole` with a part of it, of `most` bytes at most, replaced."""
    data = draw(st.sampled_from(whole))
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + most)))
    return data[:start] + draw(st.binary(max_size=20)) + data[end:]


@st.composite
def changed(draw: st.DrawFn, whole: Sequence[Any]) -> Any:
    """One of these trees of JSON with one or two values replaced, removed or added anywhere in it."""
    tree = copy.deepcopy(draw(st.sampled_from(whole)))
    if not draw(st.integers(0, 15)):
        return draw(VALUES)
    for _ in range(draw(st.integers(1, 2))):
        node: Any = tree
        while True:
            keys = [*node] if isinstance(node, dict) else [*range(len(node))]
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if how == "remove":
                del node[key]
            elif how == "add" and isinstance(node, dict):
                node[draw(st.sampled_from(["other", "b", "1"]))] = draw(VALUES)
            else:
                node[key] = draw(VALUES)
            break
    return tree


def holds(act: Callable[[], Any], name: str) -> None:
    """Whatever the file `name` holds, what reads it gives a value, or raises a ValueError of one line that names it."""
    try:
        act()
    except ValueError as error:
        line = str(error)
        assert name in line and len(line.splitlines()) == 1, line
