"""Text into pixels: every character as it is written, right-to-left scripts included, lines as wide as they are drawn.

matplotlib's reader of fonts does the work: it orders and joins the letters of every script. There is no markup.
"""

from __future__ import annotations

import math
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from matplotlib.font_manager import fontManager, get_font
from matplotlib.ft2font import FT2Font
from PIL import Image

OWN = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")  # matplotlib brings them
LAST_RESORT = "Last Resort"  # a font of boxes, of no use to a reader
ELLIPSIS = " …"


class Lettering:
    """A font at a size. Letters that it lacks come from other fonts of the machine; one that no font has is written as
    its code point, ‹U+1F98A›."""

    def __init__(self, size: int = 11, bold: bool = False) -> None:
        self.size, self.own = size, str(Path(get_data_path(), "fonts", "ttf", OWN[bold]))
        self.line = round(1.3 * size)
        """Pixels from one line to the next."""

    def _font(self, text: str) -> FT2Font:
        more = dict.fromkeys(_font_with(c) for c in text if ord(c) not in _letters(self.own))
        font = get_font([self.own, *(path for path in more if path is not None)])
        font.set_size(self.size, 72)
        font.set_text(text, 0.0)
        return font

    def width(self, text: str) -> float:
        """Pixels of a line of text."""
        return float(self._font(text).get_width_height()[0] / 64)

    def wrap(self, text: str, width: float, most: int | None = None) -> list[str]:
        """Lines of at most `width` pixels, `most` of them, the last then ending with an ellipsis. The text's own line
        breaks stay; a word that is wider than a line is cut."""
        lines: list[str] = []
        if most is not None:  # a text without end is not to be measured whole
            text = text[: int(4 * most * (width + 1))]
        for part in readable(text).split("\n"):
            lines += self._wrap(part, width, most)
            if most is not None and len(lines) > most:
                break
        if most is None or len(lines) <= most:
            return lines
        last = lines[most - 1]
        while last and self.width(last + ELLIPSIS) > width:
            last = last[:-1]
        return [*lines[: most - 1], last + ELLIPSIS]

    def _wrap(self, text: str, width: float, most: int | None) -> list[str]:
        """The lines of a text; at least one more than `most` where there are more."""
        lines, here = list[str](), ""
        for word in text.split(" "):
            longer = f"{here} {word}" if here else word
            if self.width(longer) <= width:
                here = longer
                continue
            if here:
                lines.append(here)
            while len(word) > 1 and self.width(word) > width:
                if most is not None and len(lines) > most:
                    return lines
                # by halves, since a word may be a whole text: so many letters fit, the next one does not
                fits, over = 1, len(word)
                while over - fits > 1:
                    middle = (fits + over) // 2
                    fits, over = (middle, over) if self.width(word[:middle]) <= width else (fits, middle)
                lines.append(word[:fits])
                word = word[fits:]
            here = word
        return [*lines, here]

    def draw(self, picture: Image.Image, at: tuple[int, int], lines: list[str], width: int | None = None) -> None:
        """Write lines in black on a picture, the first with its top left corner at a place. With a width, a line that
        begins with a right-to-left letter stands to the right in it."""
        for i, line in enumerate(lines):
            if not line.strip():
                continue
            font = self._font(line)
            font.draw_glyphs_to_bitmap(antialiased=True)
            ink = Image.fromarray(np.array(font.get_image()))
            base = at[1] + i * self.line + self.size
            above = math.ceil(font.get_width_height()[1] / 64) - math.ceil(font.get_descent() / 64)
            x = at[0] if width is None or not starts_right(line) else at[0] + max(0, width - ink.width)
            picture.paste("black", (x, base - above), ink)


def readable(text: str) -> str:
    """The text with what cannot be drawn written out: a letter that no font has, and a control character but the line
    break, as its code point; a tab as spaces; an invisible mark of the writing system is left out."""
    made = []
    for c in text.replace("\r\n", "\n").replace("\t", "    "):
        if c == "\n" or _font_with(c) is not None:
            made.append(c)
        elif unicodedata.category(c) != "Cf" and not 0xFE00 <= ord(c) <= 0xFE0F:  # marks that join or vary a letter
            made.append(f"‹U+{ord(c):04X}›")
    return "".join(made)


def starts_right(text: str) -> bool:
    """Whether a text's first letter with a direction is written from right to left."""
    kinds = (unicodedata.bidirectional(c) for c in text)
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


@cache
def _letters(path: str) -> frozenset[int]:
    return frozenset(get_font(path).get_charmap())


@cache
def _font_with(letter: str) -> str | None:
    """A font's path: DejaVu Sans, or the first of the machine's that has the letter."""
    own = str(Path(get_data_path(), "fonts", "ttf", OWN[0]))
    if ord(letter) in _letters(own):
        return own
    if unicodedata.category(letter)[0] == "C":
        return None
    for path in _others():
        if ord(letter) in _letters(path):
            return path
    return None


@cache
def _others() -> tuple[str, ...]:
    """Fonts of the machine whose outlines can be drawn, those without serifs first."""
    found: dict[str, str] = {}
    for entry in sorted(fontManager.ttflist, key=lambda e: (e.style != "normal", "Sans" not in e.name, e.fname)):
        if entry.name.startswith(LAST_RESORT) or entry.fname in found:
            continue
        try:
            if get_font(entry.fname).scalable:
                found[entry.fname] = entry.name
        except (OSError, RuntimeError):  # a file that is no longer there, or of another kind
            continue
    return tuple(found)
