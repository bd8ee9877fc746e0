"""`emf generate --scale`: BLIP3o-NEXT's image tokens at another of TA-Tok's scales than the run's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from emf.cli.generate import generate

pytest.importorskip("diffusers")


def test_generate_at_another_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from exported import write_start
    from image_files import small_autoencoder

    start, out, vae = write_start(tmp_path / "start", tmp_path / "source"), tmp_path / "out", tmp_path / "vae"
    small_autoencoder().save_pretrained(vae / "vae")
    generate(("a cat",), start, out, flow_matching=True, vae=vae, scale=3)
    found = re.search(r"text (\d+) ms \(81 image tokens, ([0-9.]+) ms a token\), transformer", capsys.readouterr().err)
    assert found and float(found[2]) == pytest.approx(int(found[1]) / 81, abs=0.02)
    (row,) = (json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines())
    assert row["scale"] == 3 and Image.open(out / row["file"]).info["scale"] == "3"
