"""Whatever bytes a caption or a tar holds: a sample, a drop with its reason, or a ValueError of one line."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import pairs, tar_of

from emf.data.drops import Dropped
from emf.data.images import Images, read_caption
from emf.data.sources import Source
from emf.data.tars import read_tar

WHOLE = [
    b'{"caption": "a dog \\ud83d\\ude00", "text": null}',
    b"\xef\xbb\xbfa caf\xc3\xa9\r\nin two lines",
    "a cat".encode("utf-16"),
]


@st.composite
def damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """One of `whole` with a part of it replaced."""
    data = draw(st.sampled_from(whole))
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 600)))
    return data[:start] + draw(st.binary(max_size=30)) + data[end:]


@settings(deadline=None)
@given(data=st.one_of(st.binary(max_size=60), damaged(WHOLE)), is_json=st.booleans())
def test_any_caption_is_text_or_a_reason(data: bytes, is_json: bool) -> None:
    try:
        text = read_caption(data, is_json, None)
    except ValueError as error:
        assert ":" in str(error) and len(str(error).splitlines()) == 1
    else:
        assert text == text.strip() and text.encode() and "\r" not in text and not text.startswith("\ufeff")


TARS = [tar_of(pairs(2)), tar_of(pairs(2)) + tar_of(pairs(1, 5))]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.one_of(st.binary(max_size=60), damaged(TARS)))
def test_any_tar_gives_what_is_whole_in_it(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.tar"
    file.write_bytes(data)
    members, problem = read_tar(str(file))
    assert all(offset + size <= len(data) for _, offset, size in members) and len(problem.splitlines()) <= 1
    try:
        images = Images([Source(str(file))], 8)
    except ValueError as error:
        assert "any.tar" in str(error) and len(str(error).splitlines()) == 1
        return
    for i in range(images.counts[0]):
        try:
            assert images.get(0, i).caption
        except Dropped as drop:
            assert drop.reason
