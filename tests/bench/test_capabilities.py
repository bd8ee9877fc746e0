"""What each way to the tangent can be combined with is what the record says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("diffusers")
from bench import capabilities  # noqa: E402
from emf.train.zero import process_group  # noqa: E402

ASKED = [way for way in capabilities.WAYS if way not in ("dual 0.75", "dual 0.25", "dual 0")]  # as 0.5 and fm


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with process_group():
        yield


@pytest.mark.parametrize("capability", capabilities.CAPABILITIES)
@pytest.mark.parametrize("way", ASKED)
def test_the_record(way: str, capability: str) -> None:
    found = capabilities.attempt(way, capability)
    recorded = capabilities.read()[way][capability]
    assert (found == "yes") == (recorded == "yes"), found


def test_the_record_is_of_every_way_and_ours_do_all() -> None:
    record = capabilities.read()
    assert list(record) == list(capabilities.WAYS)
    for way, found in record.items():
        assert list(found) == list(capabilities.CAPABILITIES)
        assert all(said == "yes" or said.startswith("no: ") for said in found.values())
        if way.startswith(("fm", "dual")):
            assert set(found.values()) == {"yes"}, way


def test_a_wrong_tangent_is_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial itself can fail: a compiled function that gives another tangent."""

    def compiled(fn, **_):
        def wrong(*args):
            u = fn(*args)
            return u._replace(tangent=u.tangent * 1.01) if hasattr(u, "tangent") else u

        return wrong

    monkeypatch.setattr(capabilities.torch, "compile", compiled)
    assert capabilities.attempt("dual 1", "compile").startswith("no: another du/dt")
