"""profiles/ as one self-contained page, profiles/report.html, and the table between markers in
docs/benchmarks.md: `make report`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from bench import clocks, plots
from bench.chips import CHIPS, TRUST
from bench.records import PROFILES
from bench.step import CAPABILITIES, table
from emf.errors import as_command
from emf.files import read_json, write_text
from emf.show import page
from emf.show.page import Html, code, note, words
from emf.show.plot import plot

BENCHMARKS = PROFILES.parent / "docs" / "benchmarks.md"
NO_GPU = Html(f"No whole step has been timed on a GPU yet; {code('make gpu')} fills those parts.")


def from_markdown(text: str) -> Html:
    """A table of ours, of words and numbers alone."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return page.table(lines[0], lines[2:])


def spoken(rows: list[dict[str, Any]], key: str, form: str) -> str:
    return "; ".join(f"{r['provider']} {r[key]:{form}}" for r in rows if r.get(key) is not None)


def lead(cpu: dict[str, Any], devices: list[str]) -> Html:
    """What is claimed, in four cards."""
    rows = {r["provider"]: r for r in cpu["rows"]}
    one, paper = rows["dual 1"], rows["paper"]
    made = page.cards(
        [
            page.card(f"{one['time']:.2f}", "times plain flow matching's time, a tangent in every sample"),
            page.card(f"{paper['time']:.2f}", "times it: the released step, in the same run", "fm"),
            page.card(f"{one['saved_bytes_ratio']:.2f}", "times the bytes held for backward"),
            page.card(f"{one['flops_ratio']:.2f}", "times the operations; 1.33 is the limit of one dual pass"),
        ]
    )
    measured = words(f"Measured on {', '.join(devices)}.") if devices else NO_GPU
    return Html(f"""<h1>What a tangent costs</h1><p class="lead">A MeanFlow step needs du/dt through the whole network.
Here it travels with the value, once.</p>{made}{note(Html(f"These four: {words(about(cpu))}. {measured}"))}""")


def about(record: dict[str, Any]) -> str:
    head = record["head"]
    return (
        f"{head['parameters'] / 1e6:.0f}M parameters, {head['tokens']} tokens, batch {head['batch']}, "
        f"{head['dtype']}, {head['device']}, {head['rounds']} interleaved rounds, torch {head['torch']}, "
        f"commit {head['commit'] or 'unknown'}"
    )


def step_section(file: Path, can: dict[str, dict[str, str]]) -> Html:
    """Ratios of a whole step's providers to plain flow matching."""
    record = read_json(file)
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
    figures = []
    for title, said, key, unit, (low, high), form in kinds:
        if any(r.get(key) is not None for r in rows):
            draw = partial(plots.ratios(key, unit, low, high, log=form == ".0e"), record=record)
            figures.append(plot(title, said, f"{title}: {spoken(rows, key, form)}", draw, (4.8, 3.9)))
    without = "".join(f"<li>{words(k)}: {words(v)}</li>" for k, v in record["without"].items())
    left_out = f'{note("Not in this record:")}<ul class="quiet">{without}</ul>' if without else ""
    told = Html(
        f"{words(about(record))}. Blue: this project and plain flow matching on its model; orange: other ways. "
        f"{code(file.name)}"
    )
    title = words(f"A whole step, {file.parent.name}, {record['head']['size']}")
    made = from_markdown(table(record, can))
    return Html(f"<h2>{title}</h2>{note(told)}{page.figures(figures)}{made}{left_out}")


def capability_section(can: dict[str, dict[str, str]]) -> Html:
    rows = [[way, *(found[name] for name in CAPABILITIES)] for way, found in can.items()]
    told = Html(
        "Each combination is run and held to the same step without it: the same du/dt and gradients, and under "
        f"checkpointing less held ({code('bench/capabilities.py')}; tests run it again)."
    )
    made = page.table(["way", *CAPABILITIES], rows, told=range(1, 1 + len(CAPABILITIES)))
    return Html(f"<h2>What each way can be combined with</h2>{note(told)}{made}")


def profile_section(file: Path) -> Html:
    record = read_json(file)
    head, size = record["head"], (6.4, 3.4)
    whole = {phase: sum(kinds.values()) for phase, kinds in record["shares"].items()}
    first, *_ = record["roofline"]
    peak = record["peak_bytes"] / 2**20
    shares, roof, memory = (partial(draw, record=record) for draw in (plots.shares, plots.roof, plots.memory))
    alt = "; ".join(f"{k} {v:.0%}" for k, v in whole.items())
    said = "by phase and kind; the tangent is the forward's beyond that of a step without one"
    figures = [plot("Where the time goes", said, alt, shares, size)]
    alt = f"{first['op']}: {first['time_share']:.0%} of the forward, {first['product_share']:.0%} of the product's rate"
    figures.append(
        plot("Roofline of the forward's ops", "under this device's own measured roofs", alt, roof, (6.4, 3.8))
    )
    said = "allocated beyond weights and batch"
    figures.append(plot("Memory over the step", said, f"at most {peak:.0f} MiB", memory, size))
    told = Html(
        f"One dual step, {head['share']:.0%} of the samples with a tangent, {words(head['dtype'])}, commit "
        f"{words(head['commit'] or 'unknown')}. {code('make profile')} also writes the trace."
    )
    title = words(f"Where the rest goes, {file.parent.name}, {head['size']}")
    return Html(f"<h2>{title}</h2>{note(told)}{page.figures(figures)}")


def ops_section(file: Path) -> Html:
    """Every op alone on a GPU."""
    record = read_json(file)
    timed = [r for r in record["rows"] if "ms" in r]
    rows = []
    for r in timed:
        shares = [f"{r[k]:.0%}" if k in r else "" for k in ("copy_share", "product_share")]
        name = [r["op"], r["case"], r["provider"], r["mode"]]
        rows.append([*name, f"{r['ms']:.3f}", f"{r['to_lift']:.2f}", *shares, f"{r['error']:.0e}"])
    heads = ["op", "case", "provider", "mode", "ms", "x lift", "of a copy's rate", "of a product's rate", "error"]
    made = page.folded(f"{len(rows)} timings", page.table(heads, rows))
    return Html(f"<h2>{words(f'Every op alone, {file.parent.name}')}</h2>{made}")


def trust(found: dict[str, list[dict[str, Any]]]) -> Html:
    """What was published beside what is predicted, and our own clocks beside the simulated times."""
    rows = [
        [r["what"], f"{r['published']:g} {r['unit']}", f"{r['predicted']:g} {r['unit']}", f"{r['ratio']:.2f}"]
        for r in read_json(clocks.FILE)["rows"]
        if r["ratio"] is not None
    ]
    for device, measured in found.items():
        s = clocks.summary(measured)
        ratio = f"{s['median']:.2f} ({s['least']:.2f} to {s['most']:.2f})"
        rows.append([f"our own {s['launches']} launches on {device}", "the orange bars", "the blue bars", ratio])
    return page.table(["Trust", "published or measured", "predicted", "its time over the predicted"], rows)


def static_section() -> Html:
    """What the compiler makes of every kernel, and what binds it."""
    found = {arch: read_json(PROFILES / "static" / f"{arch}.json") for arch in CHIPS}
    measured = clocks.measured()
    figures = {}
    for arch in TRUST:
        rows = [r for r in found[arch] if r["simulated_us"] and r["op"] != "time_embedding"]
        rows = list({clocks.place(r): r for r in rows}.values())
        device = next((name for name in measured if clocks.arch_of(name) == arch), "")
        times = {clocks.place(r): r["us"] for r in measured.get(device, [])}
        slow = max(rows, key=lambda r: r["simulated_us"] / max(max(r["bounds_us"].values()), r["floor_us"]))
        alt = (
            f"{CHIPS[arch].name}: {len(rows)} launches; furthest from its bound is {slow['op']} {slow['kernel']} "
            f"{slow['launch']}, simulated {slow['simulated_us']:.0f} us, bound by {slow['binding']}"
        )
        title = f"{CHIPS[arch].name} ({arch}): every launch against its floor"
        said = f"bfloat16, B 4; {TRUST[arch]}" + f"; measured on {device}" * bool(device)
        draw = partial(plots.floors, rows=rows, clocks=times)
        figures[arch] = plot(title, said, alt, draw, (7.4, 1.2 + (0.26 if times else 0.2) * len(rows)))
    spills = {a: sum(r["spill_bytes"] > 0 and r["op"] != "time_embedding" for r in rows) for a, rows in found.items()}
    said = "; ".join(f"{arch}: {len(rows)} launches, {spills[arch]} spill" for arch, rows in found.items())
    keys = ["registers", "spill_bytes", "shared_bytes", "hgmma", "hmma", "ldg128", "ldg", "occupancy", "waves"]
    keys += ["binding", "floor_us", "simulated_us"]
    table_rows = [
        [r["op"], r["kernel"], r["case"], r["launch"], arch]
        + [f"{max(r['bounds_us'].values()):.1f}", *("" if r[k] is None else str(r[k]) for k in keys)]
        for arch, rows in found.items()
        for r in rows
    ]
    heads = ["op", "kernel", "case", "launch", "arch", "bound us", *(k.replace("_", " ") for k in keys)]
    told = Html(
        f"Compiled ahead of time, without a GPU ({code('make static')}): every time here is predicted from the machine "
        "code, unless it is called measured. A launch cannot be faster than the blue mark, whose unit is named, nor "
        "move its bytes faster than the black one, which covers the blue one where memory binds. What a bar has beyond "
        "both is latency that nothing hides. "
        f"{words(said)}; the sinusoid's range reduction keeps a stack of its own."
    )
    every = page.folded(f"All {len(table_rows)}", page.table(heads, table_rows))
    shown = page.wide(figures.pop("sm_90")) + page.folded("A100 and B200", Html("".join(figures.values())))
    return Html(f"<h2>What binds every kernel, predicted</h2>{note(told)}{trust(measured)}{shown}{every}")


def precision_section() -> Html:
    alt = "Relative error of u and of du/dt by depth, for four precisions, at three times"
    told = Html(f"A kernel's rounding imitated ({code('python -m bench.precision')}).")
    drawn = page.wide(page.picture((PROFILES / "precision.png").read_bytes(), alt))
    return Html(f"<h2>How exact a tangent is</h2>{note(told)}{drawn}")


def mutation_section() -> Html:
    rows = read_json(PROFILES / "mutations.json")
    rows = rows["rows"] if isinstance(rows, dict) else rows
    return Html(f"""<h2>Can the parity tests fail?</h2><p>{len(rows)} mutations of the kernels, one line each; a test
notices every one ({code("profiles/mutations.json")}, run one by one in {code("make test")}).</p>""")


def cpu_records() -> list[Path]:
    """Of the size "cpu", one for each kind of core."""
    return sorted((PROFILES / "cpu").glob("step-cpu-*.json"))


def render() -> str:
    can = read_json(PROFILES / "capabilities.json")["rows"]
    steps = sorted(PROFILES.glob("*/step-*.json"), key=lambda f: (f.parent.name != "cpu", f.name))
    devices = sorted({f.parent.name for f in [*steps, *PROFILES.glob("*/ops.json")]} - {"cpu"})
    sections = [lead(read_json(cpu_records()[0]), devices)]
    sections += [step_section(file, can) for file in steps]
    sections += [capability_section(can)]
    sections += [profile_section(file) for file in sorted(PROFILES.glob("*/profile-*.json"))]
    sections += [ops_section(file) for file in sorted(PROFILES.glob("*/ops.json"))]
    sections += [precision_section(), static_section(), mutation_section()]
    return page.page("What a tangent costs: EMF-MeanFlow", *sections)


def benchmarks() -> str:
    """docs/benchmarks.md with its generated tables renewed, one for each kind of core."""
    can = read_json(PROFILES / "capabilities.json")["rows"]
    records = [read_json(file) for file in cpu_records()]
    made = "\n\n".join(f"Cores with {r['head']['core']}:\n\n{table(r, can)}" for r in records)
    return re.sub(
        r"(<!-- step-cpu -->\n).*?(\n<!-- /step-cpu -->)",
        lambda found: found[1] + made + found[2],
        BENCHMARKS.read_text(),
        flags=re.DOTALL,
    )


def main() -> None:
    write_text(PROFILES / "report.html", render())
    write_text(BENCHMARKS, benchmarks())
    print(f"open {PROFILES / 'report.html'}; the table of docs/benchmarks.md is renewed")


if __name__ == "__main__":
    with as_command():
        main()
