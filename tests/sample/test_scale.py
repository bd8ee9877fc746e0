"""`--scale` of the commands that draw: BLIP3o-NEXT's image tokens at another of TA-Tok's scales than the run's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from emf.app.studio import Asked, Studio, Way
from emf.cli import evaluate
from emf.cli.generate import generate
from emf.evaluate.drawing import Drawing
from emf.sample.sampler import Sampler

pytest.importorskip("diffusers")


def test_drawing_at_another_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from exported import write_start
    from image_files import small_autoencoder

    start, out, vae = write_start(tmp_path / "start", tmp_path / "source"), tmp_path / "out", tmp_path / "vae"
    small_autoencoder().save_pretrained(vae / "vae")
    generate(("a cat",), start, out, flow_matching=True, vae=vae, scale=3)
    found = re.search(r"text (\d+) ms \(81 image tokens, ([0-9.]+) ms a token\), transformer", capsys.readouterr().err)
    assert found and float(found[2]) == pytest.approx(int(found[1]) / 81, abs=0.02)
    (row,) = (json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines())
    assert row["scale"] == 3 and Image.open(out / row["file"]).info["scale"] == "3"
    # the same flag of the images that are scored: those of another scale are not taken for them
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text(json.dumps({"tag": "single_object", "include": [], "prompt": "a cat"}) + "\n")

    def drawn(scale: int) -> None:
        draw = Drawing(start, (1,), flow_matching=True, vae=vae, scale=scale, images_only=True)
        evaluate.geneval(tmp_path / "geneval", prompts=metadata, draw=draw)

    drawn(3)
    assert json.loads((tmp_path / "geneval" / "1" / "images" / "drawing.json").read_text())["scale"] == 3
    with pytest.raises(ValueError, match=r"made by other settings \(scale\)"):
        drawn(2)
    # and of the page in the browser
    studio = Studio(start, vae, scale=3)
    assert studio.sampler.network.encoder.image_tokens == 81 and not studio.pixels
    sampler = studio.sampler
    assert sampler.told == Sampler.load(start, vae, flow_matching=True, scale=3, beside=sampler).told == {"scale": 3}
    # the run's own is no other way of drawing, whether it is said or not
    assert sampler.config.condition.scale == 3 and Sampler.load(start, vae, flow_matching=True, scale=1).told == {}
    assert "--scale 3" in studio.command(Asked("a cat", (), (1,)), Way(1, True))
