"""PickScore (arXiv 2305.01569; yuvalkirstain/PickScore): cosine of image and prompt under a CLIP-H fine-tuned on
people's choices, times its logit scale, which is 100.

It has no prompts of its own: a folder of pictures tells them, by the manifest.jsonl of `emf generate`, or by a NAME.txt
beside each picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emf.device import AUTO
from emf.device import device as find_device
from emf.evaluate.benchmark import Result, Row, mean, score_images, stamps, write_results
from emf.evaluate.clip import Clip, center_square, normalized, pretrained
from emf.evaluate.generated import pictures_in, unchecked
from emf.evaluate.network_names import PICK, PICK_TOKENIZER
from emf.files import open_image, place_or_name, read_text, whole_path
from emf.sample.picture_files import MANIFEST
from emf.weights.tensors import module_stamp

LABEL = "PickScore (transformers)"
DEVIATIONS = ("the prompts are those of the folder: compare models on the same ones alone",)


def read_prompts(root: Path, steps: int | None = None) -> dict[str, Any]:
    """File name -> prompt, of a folder of pictures; steps: of those alone that its manifest says were drawn in so many.
    Raises ValueError where a picture has no prompt, or is missing, and where they were drawn in several ways."""
    prompts = pictures_in(root, "PickScore", steps)
    if not (root / MANIFEST).is_file():
        if mute := [name for name in prompts if not (root / name).with_suffix(".txt").is_file()]:
            raise ValueError(
                f"PickScore: {root / mute[0]} has no prompt; expected {MANIFEST}, as emf generate writes it, or "
                f"{Path(mute[0]).with_suffix('.txt')} beside it"
            )
        prompts = {name: read_text((root / name).with_suffix(".txt")).strip() for name in prompts}
    if empty := [name for name, prompt in prompts.items() if not isinstance(prompt, str) or not prompt.strip()]:
        raise ValueError(f"PickScore: {root / empty[0]} has no prompt: it is {prompts[empty[0]]!r}")
    return prompts


def load_clip(network: str = PICK, tokenizer: str = PICK_TOKENIZER, device: str = AUTO) -> Clip:
    """PickScore's network from folders or Hub names. Raises ValueError, saying what to put where."""
    from transformers import AutoTokenizer, CLIPModel

    place = find_device(device)
    model = pretrained(CLIPModel, network, "PickScore's network").to(place)
    # its own code gives prompts to the tokenizer as they are
    return Clip(model, pretrained(AutoTokenizer, tokenizer, "PickScore's tokenizer"), cleaned=False)


def run_pick(
    root: Path,
    out: Path,
    *,
    network: str = PICK,
    tokenizer: str = PICK_TOKENIZER,
    device: str = AUTO,
    batch: int = 20,
    name: str = "",
    steps: int | None = None,
) -> Result:
    """Score a folder; scored.jsonl, results.json and results.md in `out`. A killed run goes on where it was. Raises
    ValueError on what is missing, before the network is read."""
    prompts = read_prompts(root, steps)
    if whole_path(out) == whole_path(root):
        raise ValueError(f"PickScore: {out} is the pictures' own folder; give another --out")
    clip = load_clip(network, tokenizer, device)
    digests = stamps({file: (root / file, prompt) for file, prompt in prompts.items()})
    scale = clip.model.logit_scale.detach().exp().item()

    def score(files: Sequence[str]) -> list[Row]:
        pixels = torch.stack([normalized(center_square(open_image(root / file), clip.size)) for file in files])
        texts = [prompts[file] for file in files]
        similar = scale * (clip.images(pixels) * clip.texts(texts)).sum(-1)
        return [{"prompt": text, "score": s} for text, s in zip(texts, similar.tolist(), strict=True)]

    settings: dict[str, Any] = {
        "benchmark": "PickScore",
        "network": place_or_name(network),
        "tokenizer": place_or_name(tokenizer),
    }
    settings |= {"weights": module_stamp(clip.model), "steps": steps}
    words = json.dumps(sorted(clip.tokenizer.get_vocab().items()))
    settings |= {"vocabulary": hashlib.sha256(words.encode()).hexdigest()[:16]}
    rows = score_images(out, root, settings, digests, score, batch=batch)
    overall = mean(row["score"] for row in rows)
    called = name or root.resolve().name
    result = Result(
        "PickScore", LABEL, called, steps, overall, {}, len(rows), settings, [*DEVIATIONS, *unchecked(root, steps)]
    )
    write_results(out, result)
    return result
