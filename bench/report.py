"""profiles/ as one self-contained page, profiles/report.html, and the tables between markers in README.md:
`make report`."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from bench import plots
from bench.ops import OUT
from bench.step import CAPABILITIES, table
from emf.show.run_page import EMF, FM, GREY, STYLE, page, plot

README = OUT.parent / "README.md"
NO_GPU = "No GPU has run this yet: no time here is a GPU's; <code>make gpu</code> fills those parts."
ARCHES = ("sm_80", "sm_90", "sm_100")


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def html_table(heads: list[str], rows: list[list[str]], text: bool = False) -> str:
    """text: cells but the first are sentences."""
    top, kind = "".join(f"<th>{escape(head)}</th>" for head in heads), ' class="text"' if text else ""
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell in rest)
        body += f"<tr><td>{escape(first)}</td>{cells}</tr>"
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def from_markdown(text: str) -> str:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return html_table(lines[0], lines[2:])


def drawn(title: str, note: str, alt: str, draw: Callable[..., None], record: Any, size: tuple[float, float]) -> str:
    return plot(title, note, alt, lambda axes: draw(axes, record), size)


def spoken(rows: list[dict[str, Any]], key: str, form: str) -> str:
    return "; ".join(f"{r['provider']} {r[key]:{form}}" for r in rows if r.get(key) is not None)


def lead(cpu: dict[str, Any], devices: list[str]) -> str:
    """What is claimed, in four cards."""
    rows = {r["provider"]: r for r in cpu["rows"]}
    one, paper = rows["dual 1"], rows["paper"]
    cards = [
        (f"{one['time']:.2f}", "times plain flow matching's time, a tangent in every sample", ""),
        (f"{paper['time']:.2f}", "times it: the released step, in the same run", " fm"),
        (f"{one['saved_bytes_ratio']:.2f}", "times the bytes held for backward", ""),
        (f"{one['flops_ratio']:.2f}", "times the operations; 1.33 is the limit of one dual pass", ""),
    ]
    made = "".join(f'<div class="card{kind}"><b>{number}</b>{escape(what)}</div>' for number, what, kind in cards)
    measured = f"Measured on {', '.join(devices)}." if devices else NO_GPU
    return f"""<h1>What a tangent costs</h1><p class="lead">A MeanFlow step needs du/dt through the whole network.
Here it travels with the value, once.</p><div class="cards">{made}</div>
<p class="quiet">These four: {about(cpu)}. {measured}</p>"""


def about(record: dict[str, Any]) -> str:
    head = record["head"]
    return (
        f"{head['parameters'] / 1e6:.0f}M parameters, {head['tokens']} tokens, batch {head['batch']}, "
        f"{head['dtype']}, {head['device']}, {head['rounds']} interleaved rounds, torch {head['torch']}, "
        f"commit {head['commit'] or 'unknown'}"
    )


def step_section(file: Path, can: dict[str, dict[str, str]]) -> str:
    """Ratios of a whole step's providers to plain flow matching."""
    record = read(file)
    rows, memory = record["rows"], "process" if record["head"]["device"] == "cpu" else "CUDA allocator"
    kinds = [
        ("Time", "median and range of pairwise ratios", "time", "x fm", ("time_low", "time_high"), ".2f"),
        ("Held for backward, at most", "bytes that autograd keeps", "saved_peak_bytes_ratio", "x fm", ("", ""), ".2f"),
        (
            f"Peak memory, {memory}",
            "beyond what was there before the step",
            "peak_bytes_ratio",
            "x fm",
            ("", ""),
            ".2f",
        ),
        ("Operations", "products, by formula", "flops_ratio", "x fm", ("", ""), ".2f"),
        ("Error of du/dt", "relative, against float64", "u_dot_error", "relative error", ("", ""), ".0e"),
    ]
    figures = ""
    for title, note, key, label, (low, high), form in kinds:
        if any(r.get(key) is not None for r in rows):
            draw = plots.ratios(key, label, low, high, log=form == ".0e")
            figures += drawn(title, note, f"{title}: {spoken(rows, key, form)}", draw, record, (4.8, 3.9))
    without = "".join(f"<li>{escape(k)}: {escape(v)}</li>" for k, v in record["without"].items())
    left_out = f'<p class="quiet">Not in this record:</p><ul class="quiet">{without}</ul>' if without else ""
    return f"""<h2>A whole step, {escape(file.parent.name)}, {escape(record["head"]["size"])}</h2><p class="quiet">
{escape(about(record))}. Blue: this project and plain flow matching on its model; orange: other ways.
<code>{escape(file.name)}</code></p><div class="plots">{figures}</div>{from_markdown(table(record, can))}{left_out}"""


def capability_section(can: dict[str, dict[str, str]]) -> str:
    rows = [[way, *(found[name] for name in CAPABILITIES)] for way, found in can.items()]
    return f"""<h2>What each way can be combined with</h2><p class="quiet">Each combination is run and held to the same
step without it: the same du/dt and gradients, and under checkpointing less held (<code>bench/capabilities.py</code>;
tests run it again).</p>{html_table(["way", *CAPABILITIES], rows, text=True)}"""


def profile_section(file: Path) -> str:
    record = read(file)
    head, size = record["head"], (6.4, 3.4)
    whole = {phase: sum(kinds.values()) for phase, kinds in record["shares"].items()}
    first, *_ = record["roofline"]
    peak = record["peak_bytes"] / 2**20
    said = "; ".join(f"{k} {v:.0%}" for k, v in whole.items())
    note = "by phase and kind; the tangent is the forward's beyond that of a step without one"
    figures = drawn("Where the time goes", note, said, plots.shares, record, size)
    said = (
        f"{first['op']}: {first['time_share']:.0%} of the forward, {first['product_share']:.0%} of the product's rate"
    )
    note = "under this device's own measured roofs"
    figures += drawn("Roofline of the forward's ops", note, said, plots.roof, record, (6.4, 3.8))
    note = "allocated beyond weights and batch"
    figures += drawn("Memory over the step", note, f"at most {peak:.0f} MiB", plots.memory, record, size)
    return f"""<h2>Where the rest goes, {escape(file.parent.name)}, {head["size"]}</h2><p class="quiet">One dual step,
{head["share"]:.0%} of the samples with a tangent, {head["dtype"]}, commit {head["commit"] or "unknown"}.
<code>make profile</code> also writes the trace.</p><div class="plots">{figures}</div>"""


def ops_section(file: Path) -> str:
    """Every op alone on a GPU."""
    record = read(file)
    timed = [r for r in record["rows"] if "ms" in r]
    rows = []
    for r in timed:
        shares = [f"{r[k]:.0%}" if k in r else "" for k in ("copy_share", "product_share")]
        name = [r["op"], r["case"], r["provider"], r["mode"]]
        rows.append([*name, f"{r['ms']:.3f}", f"{r['to_lift']:.2f}", *shares, f"{r['error']:.0e}"])
    heads = ["op", "case", "provider", "mode", "ms", "x lift", "of a copy's rate", "of a product's rate", "error"]
    return f"""<h2>Every op alone, {escape(file.parent.name)}</h2><details><summary>{len(rows)} timings</summary>
{html_table(heads, rows)}</details>"""


def static_section() -> str:
    """What the compiler makes of every kernel."""
    found = {arch: read(OUT / "static" / f"{arch}.json") for arch in ARCHES}

    def draw(axes: Axes) -> None:
        colors = dict(zip(ARCHES, (GREY, EMF, FM), strict=True))
        names = list(dict.fromkeys(f"{r['op']} {r['kernel'][1:]}" for r in found["sm_90"]))
        for shift, arch in zip((-0.22, 0, 0.22), ARCHES, strict=True):
            at = [(r["registers"], names.index(f"{r['op']} {r['kernel'][1:]}") + shift) for r in found[arch]]
            axes.scatter(*np.array(at).T, s=14, color=colors[arch], label=arch, linewidths=0)
        axes.axvline(255, color=GREY, linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="registers a thread (255: the most there are)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3)

    spills = {a: sum(r["spill_bytes"] > 0 and r["op"] != "time_embedding" for r in rows) for a, rows in found.items()}
    said = "; ".join(f"{arch}: {len(rows)} kernels, {spills[arch]} spill" for arch, rows in found.items())
    figure = plot("Registers of every kernel", "a dot a case, value alone and with tangents", said, draw, (6.4, 5.6))
    keys = ("registers", "spill_bytes", "shared_bytes", "hgmma", "hmma", "ldg128", "ldg")
    rows = [[r["op"], r["kernel"], r["case"], arch, *(str(r[k]) for k in keys)] for arch in ARCHES for r in found[arch]]
    heads = ["op", "kernel", "case", "arch", *(k.replace("_", " ") for k in keys)]
    return f"""<h2>What the compiler makes of every kernel</h2><p class="quiet">Compiled ahead of time, without a GPU
(<code>make static</code>). {said}; the sinusoid's range reduction keeps a stack of its own.</p>
<div class="plots">{figure}</div><details><summary>All {len(rows)}</summary>{html_table(heads, rows)}</details>"""


def precision_section() -> str:
    data = base64.b64encode((OUT / "precision.png").read_bytes()).decode()
    alt = "Relative error of u and of du/dt by depth, for four precisions, at three times"
    return f"""<h2>How exact a tangent is</h2><p class="quiet">A kernel's rounding imitated
(<code>python -m bench.precision</code>).</p>
<div class="wide"><img src="data:image/png;base64,{data}" alt="{alt}"></div>"""


def mutation_section() -> str:
    rows = read(OUT / "mutations.json")
    rows = rows["rows"] if isinstance(rows, dict) else rows
    return f"""<h2>Can the parity tests fail?</h2><p>{len(rows)} mutations of the kernels, one line each; a test notices
every one (<code>profiles/mutations.json</code>, run one by one in <code>make test</code>).</p>"""


def render() -> str:
    can = read(OUT / "capabilities.json")["rows"]
    steps = sorted(OUT.glob("*/step-*.json"), key=lambda f: (f.parent.name != "cpu", f.name))
    devices = sorted({f.parent.name for f in [*steps, *OUT.glob("*/ops.json")]} - {"cpu"})
    with matplotlib.rc_context(STYLE):
        sections = [lead(read(OUT / "cpu" / "step-cpu.json"), devices)]
        sections += [step_section(file, can) for file in steps]
        sections += [capability_section(can)]
        sections += [profile_section(file) for file in sorted(OUT.glob("*/profile-*.json"))]
        sections += [ops_section(file) for file in sorted(OUT.glob("*/ops.json"))]
        sections += [precision_section(), static_section(), mutation_section()]
    return page("What a tangent costs: EMF-MeanFlow", "\n".join(sections))


def readme() -> str:
    """README.md with its generated table renewed."""
    can = read(OUT / "capabilities.json")["rows"]
    made = table(read(OUT / "cpu" / "step-cpu.json"), can)
    return re.sub(
        r"(<!-- step-cpu -->\n).*?(\n<!-- /step-cpu -->)",
        lambda found: found[1] + made + found[2],
        README.read_text(),
        flags=re.DOTALL,
    )


def main() -> None:
    (OUT / "report.html").write_text(render(), encoding="utf-8")
    README.write_text(readme())
    print(f"open {OUT / 'report.html'}; the README's table is renewed")


if __name__ == "__main__":
    main()
