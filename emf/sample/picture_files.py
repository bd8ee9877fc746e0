"""Pictures as files whose names say their prompts, and the list of them beside: manifest.jsonl, a line a picture."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from emf.files import (
    alone,
    append_rows,
    check_folder,
    check_writable,
    files_in,
    make_folder,
    mend_rows,
    read_bytes,
    read_rows,
    whole_file,
)
from emf.sample.sampler import to_uint8

MANIFEST = "manifest.jsonl"
LONGEST = 80
"""Bytes of a prompt in a file's name; a file system takes 255 for all of it."""
SMALL = 64
"""Pixels along the longer side below which a picture is enlarged for the eye."""


def words_of(prompt: str) -> str:
    """A prompt as a part of a file's name: its letters, marks and digits of any script, _ for all that is between them,
    at most LONGEST bytes."""
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", prompt))
    return "_".join("".join(kept).split()).encode()[:LONGEST].decode(errors="ignore").rstrip("_")


def check_pictures_folder(out: Path) -> None:
    """Raises ValueError where pictures could not be written in the folder `out`, or its manifest.jsonl is somebody
    else's; asked before the weights are read."""
    check_folder(out, (), who="generate: ", advice="give another --out")
    check_writable(out, "generate: ")
    if (out / MANIFEST).exists():
        needs = ("file", "prompt")
        with alone(out):
            # what is cut off as torn must have been ours: of a list without a whole row its beginning tells
            if not read_rows(out / MANIFEST, needs) and not read_bytes(out / MANIFEST).startswith(b'{"file"'):
                raise ValueError(f"generate: {out / MANIFEST} lists no pictures of ours; give another --out")
            torn = read_bytes(out / MANIFEST).rpartition(b"\n")[2].decode(errors="replace")
            mend_rows(out / MANIFEST, needs)
            if torn:
                said = f"its last line was torn by a kill and is cut off ({torn[:120]}); its picture tells the same"
                print(f"generate: {out / MANIFEST}: {said}", file=sys.stderr)


def write_images(
    images: Tensor, prompts: Sequence[str], out: Path, told: dict[str, Any], numbers: Sequence[int]
) -> list[Path]:
    """PNG files of images [n, 3, H, W], and a line of manifest.jsonl for each: its file, its prompt, its number, which
    seeds it together with the seed, and what is told of all. The files hold the same as text; small ones are eight
    times as large. A name is the next number that is free, and the prompt's words: nothing is overwritten, nor does
    another process that writes in the same folder take the number."""
    make_folder(out)
    paths = []
    with alone(out):
        taken = (int(found[0]) for p in files_in(out, "*.png") if (found := re.match(r"\d+", p.name)))
        first = max(taken, default=-1) + 1
        for place, (image, prompt, number) in enumerate(zip(to_uint8(images), prompts, numbers, strict=True), first):
            picture = Image.fromarray(image)
            zoom = 8 if max(picture.size) < SMALL else 1
            picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
            said = {"prompt": prompt, "number": number, **told}
            note = PngInfo()
            for key, value in said.items():
                note.add_text(key, str(value))
            name = "_".join(filter(None, (f"{place:05d}", words_of(prompt))))
            with whole_file(out / f"{name}.png") as part:
                picture.save(part, "png", pnginfo=note)
            append_rows(out / MANIFEST, [{"file": f"{name}.png", **said}])
            paths.append(out / f"{name}.png")
    return paths
