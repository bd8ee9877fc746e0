"""The report page: whole, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emf.config import Config, to_json
from emf.data.digits import TAGS
from emf.evaluate import run_page
from emf.evaluate.run_page import apart, write_report
from emf.recipes import RECIPES, digits, digits_base
from emf.show import page
from emf.show.plot import STYLE
from emf.show.sheet import captioned, write_sheet

FM = {1: 0.12, 4: 0.48, 30: 0.72}
EMF = {1: 0.43, 2: 0.58, 4: 0.69, 8: 0.71}


def score_rows(model: str, overall: dict[int, float]) -> list[dict[str, Any]]:
    spread = (0.25, 0.05, -0.12, 0.2, -0.18, -0.2)
    tags = {n: {tag: min(1, max(0, s + d)) for tag, d in zip(TAGS, spread, strict=True)} for n, s in overall.items()}
    return [{"model": model, "steps": n, "overall": s, "by_tag": tags[n]} for n, s in overall.items()]


SCORED: dict[str, Any] = {"rows": [], "ceiling": 0.97, "noise": 0.0, "shuffled": 0.03}
ROW = {"model": "fm", "steps": 1, "overall": 0.5, "by_tag": dict.fromkeys(TAGS, 0.5)}
LOGGED = dict.fromkeys(("step", "loss", "error", "lr", "it_s", "share", "memory_mib", "skipped"), 1)


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_run(
    run: Path,
    config: Config,
    scores: list[dict[str, Any]] | None = None,
    curve: dict[int, float] | None = None,
    seed: int = 0,
) -> Path:
    """A run's folder as train and evaluate leave it, without the training."""
    run.mkdir()
    (run / "config.json").write_text(to_json(config))
    emf = config.objective == "meanflow"
    rows: list[dict[str, Any]] = []
    for step in range(10, config.steps + 1, 10):
        wobble = 1 + 0.3 * math.sin(step * 12.9898 + seed)
        error = (1.4 if emf else 0.9) * math.exp(-3 * step / config.steps) * wobble + 0.2
        loss, share = (error / (error + 1e-3), 0.25 + 0.5 * step / config.steps) if emf else (error, 0)
        row = dict(step=step, loss=loss, error=error, lr=min(step / 30, 1) * config.optim.lr, it_s=1.4 * wobble)
        rows.append(row | dict(share=share, memory_mib=900, skipped=0))
    write_jsonl(run / "metrics.jsonl", rows)
    if curve:
        grown = {step: 1 - math.exp(-4 * step / config.steps) for step in range(100, config.steps + 1, 100)}
        rows = [{"step": step, "overall": {str(n): curve[n] * g for n in (1, 2, 4)}} for step, g in grown.items()]
        write_jsonl(run / "curve.jsonl", rows)
    if scores:
        (run / "scores.json").write_text(json.dumps(SCORED | {"rows": scores}))
    return run


@pytest.fixture
def emf_run(tmp_path: Path) -> Path:
    run = fake_run(tmp_path / "demo", digits(), score_rows("fm", FM) + score_rows("emf", EMF), EMF)
    columns = {"FM 1": [[[[51, 102, 153]]]], "EMF 1": [[[[255, 0, 0]]]]}
    write_sheet(run / "samples.png", captioned(["two red <sevens>"], columns), ["", *columns])
    return run


class Page(HTMLParser):
    """The elements of a page; asserts that each is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.images, self.links = list[str](), list[dict[str, str]](), list[str]()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {k: v or "" for k, v in attrs}
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "srcset")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(emf_run: Path) -> None:
    text = write_report(emf_run).read_text()
    page = Page(text)
    assert len(page.images) == 9 and all(len(image["alt"]) > 20 for image in page.images)
    assert all(link.startswith("data:image/") for link in page.links)
    for foreign in ("url(", "@import", "<script", "<link"):
        assert foreign not in text
    assert "is missing" not in text


def test_shares_of_the_gap_stand_beside_the_papers(emf_run: Path) -> None:
    text = write_report(emf_run).read_text()
    for here, paper in (("52 %", "62 %"), ("77 %", "87 %"), ("95 %", "98 %")):
        assert f"<b>{here}</b>" in text and f"the paper: {paper}" in text


def test_same_files_same_page(emf_run: Path) -> None:
    assert write_report(emf_run).read_bytes() == write_report(emf_run).read_bytes()


def test_flow_matching_run_without_curve(tmp_path: Path) -> None:
    text = write_report(fake_run(tmp_path / "base", digits_base(), score_rows("fm", FM))).read_text()
    assert len(Page(text).images) == 7
    assert "gap closed in" not in text and "0.72 in 30" in text and "curve.jsonl is missing" in text


def test_says_what_is_missing_and_what_makes_it(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "bare", digits())
    text = write_report(run).read_text()
    assert len(Page(text).images) == 6
    for file in ("scores.json", "samples.png"):
        assert f"{file} is missing; <code>emf evaluate digits {run}</code>" in text


@pytest.mark.parametrize(("objective", "how"), [("meanflow", ""), ("flow_matching", " --flow-matching")])
@pytest.mark.parametrize("vae", [None, Path("sana")])
def test_a_run_of_a_large_model_is_sent_to_a_benchmark(
    tmp_path: Path, objective: Any, how: str, vae: Path | None
) -> None:
    """What it advises is a command that such a run can take: the digits' scorer is for the digits' runs, and latents
    need an autoencoder."""
    config = replace(RECIPES["sana-1.5-1.6b"](), steps=20, objective=objective)
    config = replace(config, data=replace(config.data, vae=vae))
    how += "" if vae else " --vae SANA"
    run = fake_run(tmp_path / "large", config)
    text = write_report(run).read_text()
    command = f"emf evaluate geneval --prompts evaluation_metadata.jsonl --checkpoint {run}{how} --out DIR"
    assert command in text and "emf evaluate digits" not in text and "eval-every" not in text


def test_scores_of_an_earlier_step_say_so(emf_run: Path) -> None:
    """Everywhere that they or their samples are shown; and of which step they are, where they are the present's."""
    scores = json.loads((emf_run / "scores.json").read_text())

    def page(step: int | None) -> str:
        (emf_run / "scores.json").write_text(json.dumps(scores | ({} if step is None else {"step": step})))
        return write_report(emf_run).read_text()

    last = digits().steps
    text = page(last)
    assert "These are of" not in text and f"Weights of step {last}." in text and "When it was scored" not in text
    text = page(last - 100)
    assert text.count(f"These are of step {last - 100}; the run is at step {last}.") == 3
    assert "When it was scored: In 4 steps" in text and f"Weights of step {last - 100}." in text
    assert page(None).count(f"of a step that scores.json does not tell; the run is at step {last}.") == 3
    saved = emf_run / "checkpoints" / "step_0000400"  # what scores are of is saved: rows of metrics may go further
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").write_text('{"step": 400, "world": 1, "stage": 0}')
    assert "These are of" not in page(400) and "the run is at step 400" in page(last)
    (emf_run / "scores.json").write_text(json.dumps(scores | {"step": "x"}))
    with pytest.raises(ValueError, match="is not what"):
        write_report(emf_run)


@pytest.mark.parametrize("fm", [FM, {1: 0.12, 4: 0.5, 30: 0.89}, dict.fromkeys(FM, 0.6), dict.fromkeys(FM, 0.0)])
@pytest.mark.parametrize("points", [2, 15])
def test_no_label_lies_over_a_line(fm: dict[int, float], points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the scores during training, nor over another label, the legend or the picture's edge."""
    made: list[Callable[[Axes], None]] = []
    monkeypatch.setattr(run_page, "plot", lambda *told: made.append(told[-1]) or page.Html())
    curve = [{"step": 300 + 300 * i, "overall": {"1": 0.6, "2": 0.8, "4": 0.9 - 0.2 * (i % 2)}} for i in range(points)]
    run_page._curve_section(Path("run"), curve, {"rows": score_rows("fm", fm)}, asdict(digits()))
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        made[0](axes)
        figure.draw_without_rendering()
        texts = [text.get_window_extent() for text in axes.texts]
        legend = axes.get_legend()
        assert len(texts) == 2 and legend is not None
        paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    assert len(paths) == 5
    assert not any(path.intersects_bbox(text, filled=False) for path in paths for text in texts)
    assert not texts[0].overlaps(texts[1]) and not any(text.overlaps(legend.get_window_extent()) for text in texts)
    for box in texts:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0, box


def test_labels_of_the_two_lines_stand_apart() -> None:
    """The recorded run whose lines cross: each label is on the side of its point where the other line does not run."""
    fm, emf = {1: 0.277, 4: 0.89, 30: 0.887}, {1: 0.757, 2: 0.797, 4: 0.84, 8: 0.85}
    assert {n: apart(n, x, fm, True) for n, x in emf.items()} == {1: True, 2: True, 4: False, 8: False}
    assert {n: apart(n, x, emf, False) for n, x in fm.items()} == {1: False, 4: True, 30: False}
    assert apart(4, 0.5, {1: 0.5, 30: 0.5}, True) and not apart(4, 0.5, {}, False)


@pytest.mark.parametrize(("captions", "cautioned"), [(6, True), (299, True), (300, False), (None, False)])
def test_scores_of_few_captions_are_cautioned(emf_run: Path, captions: int | None, cautioned: bool) -> None:
    scores = json.loads((emf_run / "scores.json").read_text())
    (emf_run / "scores.json").write_text(json.dumps(scores | ({} if captions is None else {"captions": captions})))
    text = write_report(emf_run).read_text()
    assert (f"{captions} captions: too few to compare." in text) == cautioned == ("too few" in text)
    assert (f"{captions} captions were scored." in text) == (captions is not None)


def test_no_gap_is_no_share(tmp_path: Path) -> None:
    scores = score_rows("fm", dict.fromkeys(FM, 0.0)) + score_rows("emf", EMF)
    text = write_report(fake_run(tmp_path / "untrained", digits(), scores)).read_text()
    assert "no gap" in text and "nan" not in text.split("</style>")[1].split("data:image")[0]


def test_a_row_half_written_is_left_out(emf_run: Path) -> None:
    with (emf_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9990, "lo')
    assert "{0} of {0}".format(digits().steps) in write_report(emf_run).read_text()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl holds no row"),
        ("metrics.jsonl", "", "metrics.jsonl holds no row"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl:1 is no JSON object with step, loss"),
        ("curve.jsonl", "[]\n", "curve.jsonl:1 is no JSON object with step, overall"),
        (
            "metrics.jsonl",
            json.dumps(LOGGED | {"step": 10**400}) + "\n",
            "metrics.jsonl:1 has step 1000.*a whole number",
        ),
        ("curve.jsonl", '{"step": 1, "overall": {}}\n', "curve.jsonl:1 has scores of no steps"),
        ("curve.jsonl", '{"step": 1, "overall": {"\u0663": 0.5}}\n', "curve.jsonl:1 has a score of '\u0663' steps"),
        ("scores.json", '{"rows": []}', "scores.json is not what .*it is no JSON object with rows, ceiling"),
        ("scores.json", "[]", "scores.json is not what"),
        ("scores.json", "{", "scores.json is not what .*was torn; move it away"),
        ("scores.json", json.dumps(SCORED | {"rows": [3]}), "it has rows .3.; expected a list, each an object"),
        ("scores.json", json.dumps(SCORED), "its rows lack flow matching in 1 step; move it away and call that again"),
        ("scores.json", json.dumps(SCORED | {"rows": [ROW | {"by_tag": 3}]}), "row 1 of its rows has by_tag 3;"),
        (
            "scores.json",
            json.dumps(SCORED | {"rows": [ROW | {"overall": 7}]}),
            "row 1 of its rows has overall 7; expected",
        ),
        (
            "scores.json",
            json.dumps(SCORED | {"rows": [ROW | {"model": "x"}]}),
            "has model 'x'; expected one of fm, emf",
        ),
        ("config.json", "[]", "config.json is no JSON object"),
        ("config.json", '{"recipe": "digits", "flow": 3}', "config.json: flow is 3; expected a section"),
        ("config.json", None, "config: no file"),
    ],
)
def test_what_is_wrong_is_one_line(emf_run: Path, file: str, text: str | None, message: str) -> None:
    (emf_run / file).unlink() if text is None else (emf_run / file).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        write_report(emf_run)
    assert "\n" not in str(error.value)
    assert not (emf_run / "report.html").exists()
