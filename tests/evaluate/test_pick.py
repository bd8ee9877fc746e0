"""PickScore: the formula against transformers' own CLIP, prompts of a folder, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import clip_tokenizer, tiny_clip

from emf.cli.main import main
from emf.evaluate.clip import center_square, normalized
from emf.evaluate.pick import read_prompts, run_pick

PROMPTS = {"00000_a.png": "a red dog", "00001_b.png": "\u201ctwo\u201d cats &amp; a bird", "00002_c.png": "three birds"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = tiny_clip()
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in PROMPTS:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / name)
    rows = [json.dumps({"file": name, "prompt": prompt, "steps": 1}) for name, prompt in PROMPTS.items()]
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    return folder


def test_the_score_is_clips_own_logit(clip: str, pictures: Path, tmp_path: Path) -> None:
    """Prompts go to the tokenizer as they are."""
    from transformers import AutoTokenizer, CLIPModel

    result = run_pick(pictures, tmp_path / "out", network=clip, tokenizer=clip, device="cpu", batch=2, name="x")
    model: Any = CLIPModel.from_pretrained(clip).eval()
    texts = AutoTokenizer.from_pretrained(clip)(
        [*PROMPTS.values()], padding="max_length", max_length=40, truncation=True
    )
    pixels = torch.stack([normalized(center_square(Image.open(pictures / name), 16)) for name in PROMPTS])
    with torch.no_grad():
        ids = torch.tensor(texts["input_ids"])
        at = ids.argmax(-1)  # where the text's state is taken
        states = model.text_model(input_ids=ids).last_hidden_state[torch.arange(3), at]
        text = torch.nn.functional.normalize(model.text_projection(states), dim=-1)
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        want = model.logit_scale.exp() * (text * torch.nn.functional.normalize(image, dim=-1)).sum(-1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "scored.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx(want.tolist(), abs=1e-4)
    assert [row["prompt"] for row in rows] == [*PROMPTS.values()]
    assert result.overall == pytest.approx(want.mean().item(), abs=1e-4)
    assert "| **x**, PickScore (transformers) |" in (tmp_path / "out" / "results.md").read_text()


def test_what_is_scored_stays_and_what_changed_is_scored_anew(
    clip: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = dict(network=clip, tokenizer=clip, device="cpu")
    first = run_pick(pictures, tmp_path / "out", **how)
    seen: list[str] = []
    from emf.evaluate import pick as module

    opened = module.open_image
    monkeypatch.setattr(module, "open_image", lambda path: (seen.append(path.name), opened(path))[1])
    assert run_pick(pictures, tmp_path / "out", **how).overall == first.overall and not seen
    text = (pictures / "manifest.jsonl").read_text()
    (pictures / "manifest.jsonl").write_text(text.replace("three birds", "a dog"))
    assert run_pick(pictures, tmp_path / "out", **how).overall != first.overall and seen == ["00002_c.png"]


def test_a_score_is_of_one_way_of_drawing(pictures: Path) -> None:
    with (pictures / "manifest.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file": "00000_a.png", "prompt": "a dog", "steps": 8}))
    with pytest.raises(ValueError, match=r"drawn in 2 ways .*: say --steps, or draw each into a folder of its own"):
        read_prompts(pictures)
    assert read_prompts(pictures, 1) == PROMPTS and read_prompts(pictures, 8) == {"00000_a.png": "a dog"}


@pytest.mark.parametrize("told", [{"size": "1152x896"}, {"image_tokens": "vllm"}, {"scale": 3}])
def test_sizes_engines_and_scales_are_not_scored_together(pictures: Path, told: dict[str, Any]) -> None:
    with (pictures / "manifest.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file": "00000_a.png", "prompt": "a dog", "steps": 1, **told}))
    with pytest.raises(ValueError, match=rf"drawn in 2 ways \({[*told][0]}\): say --steps, or draw each into a folder"):
        read_prompts(pictures, 1)


def test_a_network_that_cannot_score_is_one_line(clip: str, pictures: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    made = CLIPModel.from_pretrained(clip)
    made.visual_projection.weight.data[0, 0] = float("nan")
    made.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"visual_projection.weight of .*nan holds NaN or inf"):
        run_pick(pictures, tmp_path / "out", network=str(tmp_path / "nan"), tokenizer=clip, device="cpu")
    other = clip_tokenizer()
    other.add_tokens([f"dog{i}" for i in range(9)] + ["dog"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the tokenizer gives token 309, and CLIP knows 300"):
        run_pick(pictures, tmp_path / "out", network=clip, tokenizer=str(tmp_path / "other"), device="cpu")


def test_prompts_beside_pictures(pictures: Path) -> None:
    listed = read_prompts(pictures)
    (pictures / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match=r"00000_a.png has no prompt; expected manifest.jsonl, .* or 00000_a.txt"):
        read_prompts(pictures)
    for name, prompt in PROMPTS.items():
        (pictures / name).with_suffix(".txt").write_text(prompt + "\n")
    assert read_prompts(pictures) == listed == PROMPTS
    (pictures / "00001_b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"00001_b.png has no prompt: it is ''"):
        read_prompts(pictures)


def test_what_is_missing_is_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (pictures / "00002_c.png").unlink()
    for words, said in (
        ([str(pictures)], "00002_c.png is missing, which manifest.jsonl lists; generate it again"),
        ([str(tmp_path / "empty")], "holds no pictures"),
        ([str(tmp_path / "none")], "is no folder; expected that of the images to score"),
        ([], "give a folder of pictures, as emf generate writes one"),
    ):
        monkeypatch.setattr("sys.argv", ["emf", "evaluate", "pick", *words, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as end:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and said in line, line
