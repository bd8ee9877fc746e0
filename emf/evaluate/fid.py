"""FID (arXiv 1706.08500): the Frechet distance of drawn pictures to real ones, between Gaussians of InceptionV3's 2,048
features, |m_1 - m_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), by torchmetrics in float64.

The network is the one of 2015-12-05 as a TorchScript file, inception-2015-12-05.pt, which StyleGAN and clean-fid use
too: it holds its own architecture and enlarges a picture to its size itself. The libraries that bring the architecture
as code ask for a torchvision beside the torch, which a CPU build of torch does not have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emf.device import AUTO
from emf.device import device as find_device
from emf.evaluate.benchmark import OWN, Result, stamp, stamps, take, write_results
from emf.evaluate.generated import pictures_beside, pictures_in, unchecked
from emf.files import BrokenImage, image_size, open_image, read_bytes, whole_file, whole_path, why
from emf.sample.sampler import bad_weight
from emf.show.progress import bars, say, track
from emf.weights.tensors import items, read_weights, write_file

LABEL = "FID (TorchScript Inception 2015-12-05, torchmetrics)"
FEATURES, WIDTH = "features", 2048
ENOUGH = 10_000
"""Pictures of either side below which the score is said to be biased: arXiv 1911.07023 shows how it falls with more."""
DEVIATIONS = (
    "a picture is enlarged or reduced to the network's size as a whole, whatever its sides",
    "the network is read from a file that was made elsewhere; scores of other ports of it differ slightly",
)
PART = 200
"""Pictures whose features are kept in one file: what a kill loses at most."""
FILE = "inception-2015-12-05.pt (StyleGAN2-ADA's metrics; clean-fid downloads the same)"


class Given(nn.Module):
    """What torchmetrics takes for the network: features are computed before, so that they can be kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def library() -> Any:
    """torchmetrics' metric. Raises ValueError where it is not installed."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise ValueError("FID: it needs torchmetrics; pip install 'emf-meanflow[fid]'") from None
    return FrechetInceptionDistance


def frechet(drawn: Tensor, real: Tensor) -> float:
    """The distance of two sets of features [n, D] and [m, D], n and m at least 2, of any dtype: in float64, covariances
    by n - 1. Raises ValueError where torchmetrics is not installed."""
    metric = library()(Given(drawn.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def load_inception(file: Path, device: str = AUTO) -> Any:
    """The network of a TorchScript file, tried on one picture, so that a wrong file is found before any work. Raises
    ValueError, saying what to put where."""
    place = find_device(device)
    if file.is_dir():
        raise ValueError(f"FID: {file} is a folder; give the file in it: {FILE}")
    if not file.is_file():
        raise ValueError(f"FID: {file} does not exist; put {FILE} there")
    try:
        network = torch.jit.load(str(file), map_location=place).eval()
    except Exception as error:  # libtorch's and zip's
        raise ValueError(f"FID: {file} is no TorchScript file ({why(error)}); expected {FILE}") from None
    if bad := bad_weight(network):
        raise ValueError(f"FID: {bad} of {file} holds NaN or inf; download it again")
    features_of(network, torch.zeros(1, 3, 299, 299, dtype=torch.uint8), place)
    return network


@torch.no_grad()
def features_of(network: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [n, 3, H, W] -> float32 [n, 2048], on the CPU. Raises ValueError where a network gives something else."""
    try:
        found = network(pixels.to(device), return_features=True)
    except RuntimeError as error:
        raise ValueError(f"FID: the network takes no pictures ({why(error)}); expected {FILE}") from None
    if not isinstance(found, Tensor) or found.numel() != len(pixels) * WIDTH:
        raise ValueError(f"FID: the network gives no {WIDTH} features a picture; expected {FILE}")
    features = found.reshape(len(pixels), WIDTH).float().cpu()
    if not features.isfinite().all():
        raise ValueError("FID: the network gives features that are not finite")
    return features


def computed(
    work: Mapping[str, Path], out: Path, network: Any, device: torch.device, batch: int = 20
) -> dict[str, Tensor]:
    """Digest -> features of each picture. What was not computed before is, and kept in out/features part by part. A
    part is named by what it holds, so that none takes another's place, whichever are there and whoever else writes."""
    made = sorted((out / FEATURES).glob("*.safetensors"))
    done: dict[str, Tensor] = {}
    for file in made:
        try:
            done |= read_weights(file)
        except ValueError as error:
            raise ValueError(f"FID: {error}; remove it, and it is computed again") from None
    missing = [digest for digest in work if digest not in done]
    check_pictures([work[digest] for digest in missing])
    shares = [missing[i : i + PART] for i in range(0, len(missing), PART)]
    with bars(disable=not missing) as progress:
        task = progress.add_task("features", total=len(missing))
        for share in shares:
            fresh: dict[str, Tensor] = {}
            for i in range(0, len(share), batch):
                images = [(digest, as_pixels(work[digest])) for digest in share[i : i + batch]]
                for _, same in groupby(images, lambda pair: pair[1].shape):  # a batch is of one size
                    digests, pixels = zip(*same, strict=True)
                    found = features_of(network, torch.stack(pixels), device)
                    fresh |= dict(zip(digests, found, strict=True))
                    progress.advance(task, len(digests))
            name = hashlib.sha256("".join(share).encode()).hexdigest()[:16]
            with whole_file(out / FEATURES / f"{name}.safetensors", os.getpid()) as part:
                write_file(part, items(fresh))
            done |= fresh
    return done


def as_pixels(file: Path) -> Tensor:
    """A picture as uint8 [3, H, W]. Raises ValueError where it cannot be read."""
    try:
        return torch.from_numpy(np.array(open_image(file))).permute(2, 0, 1)
    except BrokenImage as error:
        raise ValueError(f"FID: {error}; replace or remove it") from None


def check_pictures(files: Sequence[Path]) -> None:
    """Raises ValueError where a picture's header shows that it cannot be read, before hours of features."""
    for file in track(files, "looking", disable=not files):
        try:
            image_size(read_bytes(file), str(file))
        except BrokenImage as error:
            raise ValueError(f"FID: {error}; replace or remove it") from None


def run_fid(
    root: Path,
    real: Path,
    out: Path,
    weights: Path,
    *,
    device: str = AUTO,
    name: str = "",
    steps: int | None = None,
) -> Result:
    """The distance of a folder of pictures to one of real ones; features, results.json and results.md in `out`. A
    killed run goes on where it was. Raises ValueError on what is missing, before the network is read."""
    files = {"drawn": [root / file for file in pictures_in(root, "FID", steps)]}
    files |= {"real": [real / file for file in pictures_beside(real, "FID")]}
    if whole_path(root) == whole_path(real):
        raise ValueError(f"FID: {root} would be compared with itself; give --real the folder of real pictures")
    if whole_path(out) in (whole_path(root), whole_path(real)):
        raise ValueError(f"FID: {out} is a folder of pictures; give another --out")
    if few := [side for side, some in files.items() if len(some) < 2]:
        raise ValueError(f"FID: one {few[0]} picture alone has no covariance; give thousands")
    library()  # before an hour of features, not after it
    network = load_inception(weights, device)
    settings: dict[str, Any] = {"benchmark": "FID", "weights": stamp(weights), "steps": steps}
    settings |= {"real": str(whole_path(real))}
    take(out, root, settings, len(files["drawn"]), (*OWN, FEATURES))
    digests = {side: [*stamps({str(f): (f, None) for f in some}).values()] for side, some in files.items()}
    work = {d: file for side, some in files.items() for d, file in zip(digests[side], some, strict=True)}
    features = computed(work, out, network, find_device(device))
    drawn, others = (torch.stack([features[d] for d in digests[side]]) for side in ("drawn", "real"))
    told = f"{len(drawn)} pictures against {len(others)} real ones"
    if min(len(drawn), len(others)) < ENOUGH:
        told += f": with fewer than {ENOUGH} of either the score is too high, by more with fewer"
    deviations = [f"{told}; compare scores of equal numbers alone", *unchecked(root, steps), *DEVIATIONS]
    say("the distance, which takes half a minute")
    called = name or root.resolve().name
    result = Result("FID", LABEL, called, steps, frechet(drawn, others), {}, len(drawn), settings, deviations)
    write_results(out, result)
    return result
