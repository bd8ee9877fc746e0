"""A plan and the data that its run is given: what is there is counted and checked as training does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cached import cache_settings
from image_files import pairs, small_autoencoder, write_folder, write_tar
from planned import changed, small_plans

from emf.data import sources
from emf.data.drops import Drops
from emf.recipes import RECIPES, SAMPLES
from emf.train.plan import Plan, plan
from emf.train.plan_tables import show


def test_what_the_data_hold_is_counted_where_that_is_cheap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders and tars; what is too long to list, or not here, is assumed, which the plan says."""
    small_autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "ta_tok.pth").touch()
    small = small_plans(tmp_path)

    def of(*data: str, epochs: float | None = None, **further: Any) -> Plan:
        data_of = dict(sources=data, vae=tmp_path / "vae", ta_tok=tmp_path / "ta_tok.pth", **further)
        return small("sana-1.5-1.6b", data=data_of, epochs=epochs)

    folder = str(write_folder(tmp_path / "a", pairs(5) | {"lone.png": b""}))
    write_tar(tmp_path / "t" / "0.tar", pairs(2))
    write_tar(tmp_path / "t" / "1.tar", pairs(4))
    tars = str(tmp_path / "t" / "{0..1}.tar")
    p = of(folder, tars, epochs=256)
    assert (p.samples, p.assumed, p.config.steps) == (11, "", 22)  # in batches of 128
    monkeypatch.setattr(sources, "CHEAP", 100)
    p = of(folder, tars)
    assert (p.samples, p.assumed) == (SAMPLES, "listing the tars takes long")
    show(p)
    assert "170,000 samples are assumed, as many as EMF's: listing the tars" in " ".join(
        capsys.readouterr().out.split()
    )
    listings = tmp_path / "listings.json"
    sources.scan([sources.parse_source(tars)], Drops(), listings)
    before = listings.read_bytes()
    p = of(folder, tars, listings=listings)
    assert (p.samples, p.assumed) == (11, "") and listings.read_bytes() == before
    p = of(folder, str(tmp_path / "b"), epochs=1)
    assert (p.samples, p.assumed) == (SAMPLES, f"{tmp_path / 'b'} is not here")
    assert small("sana-1.5-1.6b").assumed == "no data are named"


def test_what_training_refuses_is_not_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = str(write_folder(tmp_path / "a", pairs(2))), str(cache_settings(tmp_path / "cache"))
    small, wrong = (
        small_plans(tmp_path),
        [
            ("holds images; give --data.vae", dict(data=dict(sources=(folder,)))),
            ("http://x/a.tar is no path", dict(data=dict(sources=("http://x/a.tar",)))),
            ("data.ta_tok x has no effect", dict(data=dict(sources=(cache,), ta_tok=Path("x")))),
        ],
    )
    for message, changes in wrong:
        with pytest.raises(ValueError, match=message):
            small("sana-1.5-1.6b", **changes)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run.monitor wandb needs the package wandb: pip install wandb"):
        plan(changed(RECIPES["digits"](), dict(run=dict(monitor=("wandb",)))))
