"""Which pictures of a folder are scored: those that emf generate lists there, else all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emf.evaluate.benchmark import check_images
from emf.files import files_in, numbered_jsonl
from emf.sample.picture_files import MANIFEST

WAY = ("run", "steps", "guidance", "flow_matching", "size", "image_tokens", "scale")
"""What manifest.jsonl says of how a picture was drawn: a score is of one way."""
KINDS = (".png", ".jpg", ".jpeg", ".webp")


def pictures_in(root: Path, who: str, steps: int | None = None) -> dict[str, Any]:
    """File name -> prompt of each picture of a folder; without manifest.jsonl every prompt is None.

    steps: of those alone that the manifest says were drawn in so many. who: who asks, which stands before what is
    wrong. Raises ValueError where a picture is missing, where they were drawn in several ways, and where there is none.
    """
    check_images(root)
    if not (root / MANIFEST).is_file():
        prompts = dict.fromkeys(sorted(file.name for file in files_in(root, "*") if file.suffix.lower() in KINDS))
    else:
        prompts = _listed(root, who, steps)
    if not prompts:
        raise ValueError(f"{who}: {root} holds no pictures{'' if steps is None else f' drawn in {steps} steps'}")
    return prompts


def _listed(root: Path, who: str, steps: int | None) -> dict[str, Any]:
    rows = numbered_jsonl(root / MANIFEST)
    if lacking := [number for number, row in rows if not isinstance(row.get("file"), str)]:
        raise ValueError(f"{who}: {root / MANIFEST}:{lacking[0]} names no file; repair or remove the line")
    if outside := [number for number, row in rows if Path(row["file"]).name != row["file"]]:
        raise ValueError(f"{who}: {root / MANIFEST}:{outside[0]} names a file that is not in its folder")
    every = [row for _, row in rows if steps is None or row.get("steps", steps) == steps]
    said = [[json.dumps(row.get(key)) for key in WAY] for row in every]
    ways = {*map(tuple, said)}
    if len(ways) > 1:
        differ = [key for key, values in zip(WAY, zip(*said, strict=True), strict=True) if len({*values}) > 1]
        raise ValueError(
            f"{who}: {root} holds pictures drawn in {len(ways)} ways ({', '.join(differ)}): say --steps, or draw each "
            "into a folder of its own"
        )
    prompts = {row["file"]: row.get("prompt") for row in every}
    if len(prompts) < len(every):
        raise ValueError(f"{who}: {root / MANIFEST} lists a picture twice; repair it")
    if missing := [name for name in prompts if not (root / name).is_file()]:
        raise ValueError(f"{who}: {root / missing[0]} is missing, which {MANIFEST} lists; generate it again")
    return prompts
