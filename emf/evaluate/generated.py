"""Which pictures of a folder are scored: those that emf generate lists there, else all of them."""

from __future__ import annotations

import json
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from emf.evaluate.benchmark import check_images
from emf.files import files_in, numbered_jsonl
from emf.sample.picture_files import MANIFEST
from emf.show.progress import say

WAY = ("run", "steps", "guidance", "flow_matching", "size", "image_tokens", "scale")
"""What manifest.jsonl says of how a picture was drawn: a score is of one way."""
KINDS = (".png", ".jpg", ".jpeg", ".webp")
READ = f"{', '.join(KINDS)} in the folder itself are read, no subfolders"


def pictures_in(root: Path, who: str, steps: int | None = None) -> dict[str, Any]:
    """File name -> prompt of each picture of a folder; without manifest.jsonl every prompt is None.

    steps: of those alone that the manifest says were drawn in so many. who: who asks, which stands before what is
    wrong. Raises ValueError where a picture is missing, where they were drawn in several ways, and where there is none.
    """
    check_images(root)
    if not (root / MANIFEST).is_file():
        return dict.fromkeys(pictures_beside(root, who))
    if not (prompts := _listed(root, who, steps)):
        raise ValueError(f"{who}: {root} holds no pictures{'' if steps is None else f' drawn in {steps} steps'}")
    return prompts


def pictures_beside(root: Path, who: str) -> list[str]:
    """The names of all pictures of a folder, whatever a manifest lists; what is left out is said in one line. Raises
    ValueError where there is none."""
    check_images(root)
    every = files_in(root, "*")
    names = sorted(file.name for file in every if file.suffix.lower() in KINDS)
    if not names:
        raise ValueError(f"{who}: {root} holds no pictures; {READ}")
    folders = sum(file.is_dir() for file in every)
    others = sum((guess_type(file.name)[0] or "").startswith("image/") for file in every) - len(names)
    if folders or others > 0:
        say(f"{who}: of {root} {folders} subfolders and {max(others, 0)} pictures of other kinds are left out; {READ}")
    return names


def unchecked(root: Path, steps: int | None) -> list[str]:
    """What a table has to say of a number of steps that no manifest tells."""
    if steps is None or (root / MANIFEST).is_file():
        return []
    return [f"that the pictures were drawn in {steps} steps is what --steps says; no {MANIFEST} tells it"]


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
