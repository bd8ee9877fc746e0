"""A page that opens anywhere: one HTML file with style and pictures inside, and what stands on it.

A str is a text, which a reader sees as it is written; Html is markup that was made here, and goes in as it is.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

CSS = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem; color: #1d2430; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem }
p { max-width: 46rem; margin: .4rem 0 } .lead { font-size: 1.1rem } .quiet { color: #59616e; font-size: .9rem }
code { font-size: .9em; background: #f2f4f7; padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere }
.cards, .plots { display: grid; gap: 1rem; margin: 1rem 0 }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)) }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.card { border: 1px solid #dde1e7; border-radius: 10px; padding: .9rem 1rem; break-inside: avoid }
.card b { display: block; font-size: 2.2rem; line-height: 1.15; color: #0072b2 } .fm b { color: #b04d00 }
.bar { height: .5rem; margin: .35rem 0 .1rem; background: #e9ecf0; border-radius: 4px; overflow: hidden }
.bar i { display: block; height: 100%; background: #0072b2 } .bar i.paper { background: #8a8f98 }
figure { margin: 0; min-width: 0; break-inside: avoid } figure img { width: 100%; max-width: 32rem; display: block }
figcaption { font-weight: 600; margin-bottom: .2rem } figcaption span { display: block; font-weight: 400 }
figure p { margin: .3rem 0 0 }
.wide { overflow-x: auto } .wide img { width: 100%; min-width: 42rem; display: block }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide table { min-width: 100% }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
th { white-space: normal }
th:first-child, td:first-child, .text { text-align: left } td.text { white-space: normal }
.missing { border-left: 4px solid #e69f00; padding: .5rem .8rem; background: #fff8ea }
pre { overflow-x: auto; background: #f2f4f7; padding: 1rem; border-radius: 8px; font-size: .8rem; line-height: 1.35 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .8rem 0 }
dt { color: #59616e } dd { margin: 0 }
@media print { body { max-width: none; padding: 0; font-size: 11px } .wide { overflow: visible }
  .wide img { min-width: 0 } .plots { grid-template-columns: 1fr 1fr } .cards { grid-template-columns: repeat(3, 1fr) }
  h2 { break-after: avoid } * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""


class Html(str):
    """Markup, not a text."""


@dataclass(frozen=True)
class Shaded:
    """A table's cell whose ground is the darker, the nearer `share` is to 1."""

    text: str
    share: float


def words(text: str) -> Html:
    """A text as a reader shall see it: no character of it is markup, a line break is one."""
    if isinstance(text, Html):
        return text
    return Html(escape(text).replace("\r\n", "\n").replace("\n", "<br>"))


def page(title: str, *body: Html) -> str:
    """The whole file."""
    inside = "\n".join(body)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
{inside}
</body></html>
"""


def code(text: str) -> Html:
    """Something to type."""
    return Html(f"<code>{words(text)}</code>")


def quiet(text: str) -> Html:
    """Something said by the way, within a line."""
    return Html(f'<span class="quiet">{words(text)}</span>')


def note(text: str) -> Html:
    """A paragraph by the way."""
    return Html(f'<p class="quiet">{words(text)}</p>')


def missing(what: str, command: str) -> Html:
    """What is not there, and the command that makes it."""
    return Html(f'<p class="missing">{words(what)} is missing; {code(command)} makes it.</p>')


def facts(items: Mapping[str, str]) -> Html:
    """Terms with what is said of each."""
    made = "".join(f"<dt>{words(key)}</dt><dd>{words(value)}</dd>" for key, value in items.items())
    return Html(f"<dl>{made}</dl>")


def card(number: str, text: str, kind: str = "") -> Html:
    """A large figure above what it says. kind: "fm" for flow matching's colour."""
    return Html(f'<div class="{f"card {kind}".strip()}"><b>{words(number)}</b>{words(text)}</div>')


def cards(made: Sequence[Html]) -> Html:
    return Html(f'<div class="cards">{"".join(made)}</div>')


def bar(share: float, kind: str = "") -> Html:
    """A bar filled from 0 to 1; not at all where the share is nan. kind: "paper" for grey."""
    width = 0 if math.isnan(share) else min(max(share, 0), 1)
    return Html(f'<div class="bar"><i class="{kind}" style="width:{width:.1%}"></i></div>')


def picture(data: bytes, alt: str, kind: str = "png") -> Html:
    """An image inside the page. kind: png, or svg+xml, whose ids cannot meet another's that way."""
    return Html(f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">')


def wide(inside: Html) -> Html:
    """What may be wider than the page, and is then scrolled by itself."""
    return Html(f'<div class="wide">{inside}</div>')


def figure(title: str, said: str, drawn: Html, below: str = "") -> Html:
    """A picture below its title and a note, and above another note where there is one."""
    under = note(below) if below else ""
    return Html(f"<figure><figcaption>{words(title)}{quiet(said)}</figcaption>{drawn}{under}</figure>")


def figures(made: Sequence[Html]) -> Html:
    """Figures side by side, as many as there is room for."""
    return Html(f'<div class="plots">{"".join(made)}</div>')


def folded(summary: str, inside: Html) -> Html:
    """What is shown when its summary is clicked."""
    return Html(f"<details><summary>{words(summary)}</summary>{inside}</details>")


def table(heads: Sequence[str], rows: Sequence[Sequence[str | Shaded]], told: Collection[int] = ()) -> Html:
    """A table, scrolled by itself where it is wide. told: numbers of the columns of sentences, which stand to the left
    and wrap."""

    def kind(j: int) -> str:
        return ' class="text" dir="auto"' if j in told else ""

    def made(j: int, c: str | Shaded) -> str:
        if isinstance(c, Shaded):
            return f'<td style="background:rgba(0,114,178,{0.3 * c.share:.2f})">{words(c.text)}</td>'
        return f"<td{kind(j)}>{words(c)}</td>"

    head = "".join(f"<th{kind(j)}>{words(text)}</th>" for j, text in enumerate(heads))
    body = "".join(f"<tr>{''.join(made(j, c) for j, c in enumerate(row))}</tr>" for row in rows)
    return wide(Html(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"))
