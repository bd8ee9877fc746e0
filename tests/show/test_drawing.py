"""What is drawn for a reader: texts as they are written, whatever characters they hold."""

from __future__ import annotations

import io
import re
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from emf.show import lettering, page, plot, table
from emf.show.lettering import Lettering, readable
from emf.show.sheet import Cell, captioned, sheet, write_sheet

STRANGE = "$x$ <b>&amp; _a_ \\n \\$ [red] $\\frac{1$ `c` |d| \N{GRINNING FACE}"
"""What a reader of mathematics, HTML, Markdown or rich's markup would not leave as it is."""
HEBREW = "שלום"


def test_a_sheet_draws_a_caption_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    real = Lettering._font

    def seen(self: Lettering, text: str) -> lettering.FT2Font:
        drawn.append(text)
        return real(self, text)

    monkeypatch.setattr(Lettering, "_font", seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a letter that the font lacks
        write_sheet(tmp_path / "sheet.png", [[Cell(STRANGE, np.full((8, 8, 3), 90, np.uint8))]], ["_h_ $y$"], cell=500)
    assert STRANGE in drawn and "_h_ $y$" in drawn
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 520 and np.asarray(image)[-12:].min() < 128  # ink below the picture
    assert not list(tmp_path.glob("*.part"))


def test_other_characters_are_other_pictures() -> None:
    pictures = [np.asarray(sheet([[Cell(text)]])) for text in ("$x$", "x", "\\$x$", "<b>x</b>", "**x**", "_x_")]
    for i, a in enumerate(pictures):
        assert all(a.shape != b.shape or (a != b).any() for b in pictures[:i])


def test_lines_stay_and_long_ones_are_wrapped_by_their_width() -> None:
    font = Lettering()
    assert font.wrap("one\ntwo\n\nthree", 200) == ["one", "two", "", "three"]
    lines = font.wrap("W" * 60 + " and iiiiiiii", 120)
    assert "".join(lines).replace(" ", "") == "W" * 60 + "andiiiiiiii"
    assert all(font.width(line) <= 120 for line in lines) and len(lines) > 5
    cut = font.wrap("a few words " * 30, 120, 3)
    assert len(cut) == 3 and cut[-1].endswith(" …") and font.width(cut[-1]) <= 120
    begun = time.process_time()
    (line,) = font.wrap("x" * 3000, 120, 1)  # a minute, where every length was tried
    assert line.endswith(" …") and font.width(line) <= 120 and time.process_time() - begun < 10


def test_a_letter_that_no_font_has_is_told_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "_others", lambda: ())
    lettering._font_with.cache_clear()
    try:
        assert (
            readable("a \N{FOX FACE} b\x07\tc\n\N{ZERO WIDTH JOINER}")
            == "a ‹U+1F98A› b‹U+0007›    c\n\N{ZERO WIDTH JOINER}"
        )
        assert readable(STRANGE + HEBREW + "äßЖ") == STRANGE + HEBREW + "äßЖ"
    finally:
        lettering._font_with.cache_clear()


def test_right_to_left_is_drawn_from_the_right() -> None:
    """The first letter stands at the right end: a line of it and its next begins as the next letter alone does."""

    def ink(text: str) -> np.ndarray:
        made = np.asarray(sheet([[Cell(text)]]).convert("L")) < 128
        columns = np.flatnonzero(made.any(0))
        return made[:, columns[0] : columns[-1] + 1]

    both, second = ink("אב"), ink("ב")
    assert (both[:, : second.shape[1] - 1] == second[:, : second.shape[1] - 1]).mean() > 0.97
    whole = np.asarray(sheet([[Cell(HEBREW)]], cell=200).convert("L")) < 128
    assert np.flatnonzero(whole.any(0))[0] > 100  # it begins at the right edge


def test_pictures_keep_their_aspect_and_small_ones_their_pixels() -> None:
    wide = Image.new("RGB", (400, 200), "red")
    made = np.asarray(sheet([[Cell(image=wide)]], cell=100))
    assert made.shape == (120, 120, 3)
    assert (made[60, 60] == [255, 0, 0]).all() and (made[20, 60] == [0xEE, 0xF0, 0xF3]).all()
    checks = (np.indices((2, 2)).sum(0) % 2)[..., None].repeat(3, 2).astype(np.uint8) * 255
    assert len(np.unique(np.asarray(sheet([[Cell(image=checks)]], cell=100))[12:108, 12:108])) == 2  # not smoothed
    rows = captioned(["a", "b"], {"FM 1": [checks, checks]})
    assert [len(row) for row in rows] == [2, 2] and rows[1][0].text == "b"
    with pytest.raises(ValueError, match="nothing to show"):
        sheet([])


class Text(HTMLParser):
    """What a reader sees of a page: its text, and the tags used."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen, self.tags = "", set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.seen += "\n" * (tag == "br")

    def handle_data(self, data: str) -> None:
        self.seen += data


def test_a_page_shows_a_text_as_it_is_written() -> None:
    said = STRANGE + "\n" + HEBREW
    made = [page.words(said), page.code(said), page.note(said), page.facts({said: said}), page.card("1", said)]
    made += [page.figure(said, said, page.Html()), page.folded(said, page.Html()), page.missing(said, said)]
    made += [page.table([said], [[said], [page.Shaded(said, 0.5)]], told=(0,))]
    for part in made:
        text = Text(part)
        assert said in text.seen and "b" not in text.tags - ({"b"} if "card" in part else set())
    whole = Text(page.page("<t> & more", page.words(said)))
    assert said in whole.seen and "<t> & more" in whole.seen
    assert page.words(page.Html("<b>x</b>")) == "<b>x</b>"
    assert 'alt="&lt;&quot;"' in page.picture(b"", '<"')


def test_a_markdown_table_shows_a_text_as_it_is_written() -> None:
    from markdown_it import MarkdownIt

    lines = table.markdown(["name", "x"], [[STRANGE + "\nnext", "1"], [table.bold("a_b|c*"), ""], ["", ""]])
    assert len(lines) == 5 and lines[1] == "|--|--|"
    text = Text(MarkdownIt("commonmark").enable("table").render("\n".join(lines)))
    assert STRANGE + "\nnext" in text.seen and "a_b|c*" in text.seen
    assert text.tags == {"table", "thead", "tr", "th", "tbody", "td", "br", "strong"}
    assert table.markdown(["a", "b"], [["", "x"]])[2] == "| | x |"


def test_a_terminal_shows_a_text_as_it_is_written() -> None:
    out = Console(file=io.StringIO(), width=200)
    out.print(table.terminal(["[bold]h"], [[STRANGE]], "[t]", words=(0,)))
    printed = out.file.getvalue()  # type: ignore[attr-defined]
    assert STRANGE in printed and "[bold]h" in printed and "[t]" in printed


def test_a_plot_shows_a_text_as_it_is_written() -> None:
    seen: list[str] = []

    def draw(axes: plot.Axes) -> None:
        axes.plot([1, 2], [0.001, 0.1])
        axes.set_title(STRANGE.replace("\N{GRINNING FACE}", ""))
        axes.set_xticks([1, 2], ["$x$", "$\\wrong{$"])
        axes.set_yscale("log")
        figure = axes.figure
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()  # mathematics that is none would end it here
        seen.extend(t.get_text() for t in axes.get_xticklabels())
        assert not any(t.get_parse_math() for t in (axes.title, *axes.get_xticklabels()))

    made = plot.plot("t", "n", "a plot", draw)
    assert seen == ["$x$", "$\\wrong{$"] and made.count("<img") == 1


def test_logarithmic_axes_are_labelled_in_plain_text(tmp_path: Path) -> None:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], [0.001, 0.1])
        axes.set_yscale("log")
        figures.append(figure)

    figures: list[Figure] = []
    plot.write_plot(tmp_path / "p.png", draw, (3, 2), 50)
    (axes,) = figures[0].axes
    said = [t.get_text() for t in axes.get_yticklabels()]
    assert "10⁻²" in said and not re.search(r"[$\\{}]", "".join(said))
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (150, 100)
