"""FID: the distance against closed forms of known Gaussians, the network's form, and a run that goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from emf.cli.main import main
from emf.evaluate import fid
from emf.evaluate.fid import frechet, run_fid
from emf.evaluate.generated import unchecked

pytest.importorskip("torchmetrics")


WIDTH = 64
"""In the place of 2,048, whose eigenvalues take a minute."""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fid.WIDTH == 2048
    monkeypatch.setattr(fid, "WIDTH", WIDTH)


class Inception(nn.Module):
    """What inception-2015-12-05.pt looks like from outside, with random weights."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, width)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        small = nn.functional.interpolate(img.float(), size=(8, 8), mode="bilinear", align_corners=False)
        assert return_features
        return self.fc(((small - 128) / 128).flatten(1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.jit.save(torch.jit.script(Inception()), str(file))
    return file


def draw(folder: Path, count: int, seed: int, sizes: tuple[tuple[int, int], ...] = ((20, 20),)) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*sizes[i % len(sizes)], 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return draw(tmp_path / "drawn", 6, 1, ((20, 20), (16, 24))), draw(tmp_path / "real", 5, 2)


def gaussian(n: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    """n points whose mean and covariance (by n - 1) are these exactly, in float64."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def test_the_distance_of_known_gaussians() -> None:
    """One of the two forms has commuting covariances, whose distance is a sum over axes; the other has not."""
    one, two = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a, b = torch.tensor([4.0, 1.0, 9.0], dtype=torch.float64), torch.tensor([1.0, 16.0, 2.0], dtype=torch.float64)
    drawn, real = gaussian(50, one, torch.diag(a), 0), gaussian(70, two, torch.diag(b), 1)
    want = 5.25 + sum((math.sqrt(x) - math.sqrt(y)) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert frechet(drawn, real) == pytest.approx(want, rel=1e-12)
    m = torch.tensor([[2.0, 0.7, 0.1], [0.7, 1.0, -0.4], [0.1, -0.4, 3.0]], dtype=torch.float64)
    drawn = gaussian(50, one, m, 2)
    s = root(m)
    want = 5.25 + float(m.trace() + b.sum() - 2 * root(s @ torch.diag(b) @ s).trace())
    assert frechet(drawn, real) == pytest.approx(want, rel=1e-12)
    assert frechet(real, drawn) == pytest.approx(want, rel=1e-12)
    assert frechet(drawn, drawn) == pytest.approx(0, abs=1e-9)


def test_a_score_is_that_of_the_features(weights: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    drawn, real = folders
    result = run_fid(drawn, real, tmp_path / "out", weights, device="cpu", name="x")
    network = torch.jit.load(str(weights))

    def features(folder: Path) -> Any:
        pixels = [torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1)[None] for f in sorted(folder.iterdir())]
        with torch.no_grad():
            return torch.cat([network(p, return_features=True) for p in pixels]).double().numpy()

    a, b = features(drawn), features(real)
    # the two covariances have rank 5 and 4: the trace of the product's root from its few eigenvalues
    x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (a, b))
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum()
    want -= 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()
    assert result.overall == pytest.approx(want, rel=1e-5)
    assert result.images == 6 and result.deviations[0].startswith(
        "6 pictures against 5 real ones: with fewer than 10000"
    )
    assert "| **x**, FID (TorchScript" in (tmp_path / "out" / "results.md").read_text()


def test_what_is_computed_stays_and_a_new_picture_is_computed(
    weights: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses the part that was begun; equal pictures count as often as they are there."""
    drawn, real = folders
    monkeypatch.setattr(fid, "PART", 4)
    monkeypatch.setattr(fid, "frechet", lambda drawn, real: float(len(drawn) + 100 * len(real)))
    seen: list[Path] = []
    as_pixels = fid.as_pixels

    def counted(file: Path) -> Tensor:
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(file)
        return as_pixels(file)

    monkeypatch.setattr(fid, "as_pixels", counted)
    limit = 6
    with pytest.raises(KeyboardInterrupt):
        run_fid(drawn, real, tmp_path / "out", weights, device="cpu")
    assert len(seen) > 4 and len(list((tmp_path / "out" / "features").iterdir())) == 1
    seen.clear()
    limit = 99
    run_fid(drawn, real, tmp_path / "out", weights, device="cpu")
    assert len(seen) == 11 - 4
    (drawn / "again.png").write_bytes((drawn / "0.png").read_bytes())
    (drawn / "new.png").write_bytes((draw(tmp_path / "more", 1, 9) / "0.png").read_bytes())
    seen.clear()
    assert run_fid(drawn, real, tmp_path / "out", weights, device="cpu").overall == 8 + 500
    assert seen == [drawn / "new.png"]
    with pytest.raises(ValueError, match=r"made by other settings \(real\)"):
        run_fid(drawn, draw(tmp_path / "other", 3, 4), tmp_path / "out", weights)
    torch.jit.save(torch.jit.script(Inception()), str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"made by other settings \(weights\)"):
        run_fid(drawn, real, tmp_path / "out", tmp_path / "other.pt", device="cpu")
    # of four parts one is lost: what it held is computed anew, and no other part is overwritten by it
    parts = sorted((tmp_path / "out" / "features").iterdir())
    assert len(parts) == 4
    parts[0].unlink()
    for computed in (True, False):
        seen.clear()
        run_fid(drawn, real, tmp_path / "out", weights, device="cpu")
        assert bool(seen) == computed and len(list((tmp_path / "out" / "features").iterdir())) == 4
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^FID: .*{parts[1].name}.*; remove it, and it is computed again$"):
        run_fid(drawn, real, tmp_path / "out", weights, device="cpu")


def test_pictures_are_read_as_files_and_what_is_left_out_is_said(
    weights: Path,
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A manifest among the real pictures neither chooses nor refuses; steps that no manifest tells are noted."""
    drawn, real = folders
    rows = [{"file": f"{i}.png", "steps": steps} for i, steps in enumerate((1, 4))]
    (real / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in (drawn / "a.bmp", drawn / "0.txt"):
        file.touch()
    (drawn / "more").mkdir()
    monkeypatch.setattr(fid, "frechet", lambda drawn, real: float(len(drawn) + 100 * len(real)))
    result = run_fid(drawn, real, tmp_path / "out", weights, device="cpu", steps=4)
    assert result.overall == 6 + 500
    assert result.deviations[1] == (
        "that the pictures were drawn in 4 steps is what --steps says; no manifest.jsonl tells it"
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1 and f"of {drawn} 1 subfolders and 1 pictures of other kinds are left out" in said[0]
    assert unchecked(real, 1) == [] and unchecked(drawn, None) == []


def test_a_broken_picture_is_found_before_any_feature(
    weights: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its header; one that is cut short is found when it is its turn."""
    drawn, real = folders
    (real / "9.png").write_text("no picture")
    with monkeypatch.context() as patch:
        patch.setattr(fid, "as_pixels", lambda file: pytest.fail("a picture was decoded"))
        with pytest.raises(ValueError, match=r"^FID: .*9\.png cannot be read as an image: .*; replace or remove it$"):
            run_fid(drawn, real, tmp_path / "out", weights, device="cpu")
    (real / "9.png").write_bytes((real / "0.png").read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"^FID: .*9\.png cannot be read as an image: .*; replace or remove it$"):
        run_fid(drawn, real, tmp_path / "out", weights, device="cpu")


@pytest.mark.parametrize("file", ["settings.json", "results.json", "results.md"])
def test_two_commands_write_into_one_folder(
    weights: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """While one command has written `file` and not yet put it in its place, another runs from beginning to end."""
    monkeypatch.setattr(fid, "frechet", lambda drawn, real: 1.5)
    replace = os.replace
    others: list[int] = []

    def replaced(part: Path, path: Path) -> None:
        if path.name == file and not others:
            others.append(os.getpid() + 1)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: others[0])
                assert run_fid(*folders, tmp_path / "out", weights, device="cpu").overall == 1.5
        replace(part, path)

    monkeypatch.setattr(os, "replace", replaced)
    assert run_fid(*folders, tmp_path / "out", weights, device="cpu").overall == 1.5 and others
    made = ["features", "results.json", "results.md", "settings.json"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == made


def test_the_score_of_few_pictures_of_either_side_is_said_to_be_too_high(
    weights: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, real = folders
    monkeypatch.setattr(fid, "frechet", lambda drawn, real: 1.5)
    for enough, warned in ((6, True), (5, False)):
        monkeypatch.setattr(fid, "ENOUGH", enough)
        for i, (one, other) in enumerate(((drawn, real), (real, drawn))):
            told = run_fid(one, other, tmp_path / f"out{i}", weights, device="cpu").deviations[0]
            assert (f"with fewer than {enough} of either the score is too high" in told) == warned


def test_what_is_missing_is_one_line(
    weights: Path,
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn, real = map(str, folders)
    (tmp_path / "text.pt").write_text("no program")
    torch.jit.save(torch.jit.script(Inception(7)), str(tmp_path / "narrow.pt"))
    nan = Inception()
    nan.fc.weight.data[0, 0] = float("nan")
    torch.jit.save(torch.jit.script(nan), str(tmp_path / "nan.pt"))
    one, given = draw(tmp_path / "one", 1, 5), ["--weights", str(weights)]
    for words, said in (
        ([drawn], "give a folder of pictures, as emf generate writes one, and --real another"),
        ([drawn, "--real", real], "it is scored by --weights, inception-2015-12-05.pt"),
        ([drawn, "--real", real, "--weights", "no.pt"], "FID: no.pt does not exist; put inception-2015-12-05.pt"),
        ([drawn, "--real", real, "--weights", real], "real is a folder; give the file in it: inception-2015-12-05.pt"),
        ([drawn, "--real", real, "--weights", str(tmp_path / "text.pt")], "text.pt is no TorchScript file"),
        ([drawn, "--real", real, "--weights", str(tmp_path / "nan.pt")], "fc.weight of"),
        ([drawn, "--real", drawn, *given], "would be compared with itself"),
        ([drawn, "--real", str(one), *given], "one real picture alone has no covariance"),
        (
            [drawn, "--real", str(tmp_path), *given],
            "pictures; .png, .jpg, .jpeg, .webp in the folder itself are read, no sub",
        ),
        ([drawn, "--real", real, "--weights", str(tmp_path / "narrow.pt")], "gives no 64 features a picture"),
    ):
        monkeypatch.setattr("sys.argv", ["emf", "evaluate", "fid", *words, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as end:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and said in line, line
        assert not (tmp_path / "out").exists()
