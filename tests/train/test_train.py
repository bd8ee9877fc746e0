"""Training as a user runs it: a killed run continues, what is wrong ends it with one line, what is asked for is so."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import assert_same_training, averaged, files, kill_in_second_save, metrics, train

pytest.importorskip("deepspeed")


def test_what_a_run_writes(straight: Path, base: Path) -> None:
    assert sorted(p.name for p in straight.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]
    assert [p.name for p in sorted((straight / "checkpoints").iterdir())] == ["step_0000003", "step_0000006"]
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(rows[0].keys() >= {"loss", "error", "lr", "it_s", "share", "memory_mib"} for row in rows)
    assert 0 < rows[5]["share"] < 1 and rows[1]["lr"] == 1e-3 > rows[0]["lr"] > rows[5]["lr"] > 0
    start, end, half = load_file(base), averaged(straight), averaged(straight, 3)
    frozen = {k for k in start if k.startswith(("encoder.", "transformer.time_embed."))}
    raw = torch.load(straight / "checkpoints/step_0000006/engine/mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    for name, weight in end.items():
        if name in frozen:
            assert torch.equal(weight, start[name]), name
        elif name in start:
            assert not torch.equal(weight, start[name]), name
            assert not torch.equal(weight, half[name]), name
            assert not torch.equal(weight, raw[name]), name
    # the average lies between start and end, by the weights of a decay of 0.1, 2/11, 0.25 ... up to 0.5
    name = "transformer.proj_out.weight"
    assert (end[name] - raw[name]).norm() < (raw[name] - start[name]).norm()


def test_killed_run_continues_bitwise(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(tmp_path, *recipe, "--out", str(run), before=kill_in_second_save).code == -signal.SIGKILL
    saved = run / "checkpoints"
    assert sorted(p.name for p in saved.iterdir()) == ["step_0000003", "step_0000006.part"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a line torn by the kill
    result = train(tmp_path, *recipe, "--out", str(run), "--resume", "True")
    assert result.code == 0, result.text
    assert "step 4/6" in result.text and "step 3/6" not in result.text
    assert metrics(run) == metrics(straight)
    assert (
        files(saved / "step_0000006")["model.safetensors"]
        == files(straight / "checkpoints/step_0000006")["model.safetensors"]
    )
    assert sorted(p.name for p in saved.iterdir()) == ["step_0000003", "step_0000006"]
    # once more: nothing is left to do, and nothing changes
    before = files(run)
    assert train(tmp_path, *recipe, "--out", str(run), "--resume", "True").code == 0
    assert files(run) == before


def test_killed_before_the_first_checkpoint_starts_again(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((straight / name).read_bytes())
    (run / "checkpoints/step_0000003.part").mkdir(parents=True)
    result = train(tmp_path, *recipe, "--out", str(run), "--resume", "True")
    assert result.code == 0 and "step 1/6" in result.text, result.text
    assert metrics(run) == metrics(straight)


def ask_to_stop() -> None:
    """SIGTERM to the second rank, in the middle of step 4."""
    from emf.train import loop as module

    losses = module.losses

    def asked(config: Any, network: Any, batch: Any, progress: float) -> Any:
        if round(progress * config.steps) == 3 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(config, network, batch, progress)

    module.losses = asked


def test_sigterm_saves_and_ends_well(recipe: list[str], straight: Path, base: Path, tmp_path: Path) -> None:
    arguments = [*recipe, "--out", str(tmp_path / "run"), "--zero.stage", "2"]
    result = train(tmp_path, *arguments, ranks=2, before=ask_to_stop)
    assert result.code == 0 and result.text.count("asked to stop: saved") == 1, result.text
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step_0000003", "step_0000004"]
    result = train(tmp_path, *arguments, "--resume", "True", ranks=2)
    assert result.code == 0, result.text
    assert_same_training(tmp_path / "run", straight, base)


def test_without_an_average_the_weights_are_saved(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), "--optim.ema", "0")
    assert result.code == 0, result.text
    raw = torch.load(straight / "checkpoints/step_0000006/engine/mp_rank_00_model_states.pt", weights_only=False)
    got = averaged(tmp_path / "run")
    assert got.keys() == raw["module"].keys() and all(torch.equal(w, got[k]) for k, w in raw["module"].items())


def test_monitors_and_grids(recipe: list[str], tmp_path: Path) -> None:
    from PIL import Image

    run, prompts = tmp_path / "run", ["a red seven", "two blue threes"]
    flags = ["--steps", "2", "--run.eval-every", "2", "--run.eval-prompts", "1", "--run.prompts", *prompts]
    result = train(tmp_path, *recipe, "--out", str(run), *flags, "--run.monitor", "csv")
    assert result.code == 0, result.text
    sheet = Image.open(run / "samples" / "step_0000002.png")
    assert sheet.width > 3 * sheet.height  # two captions down, three samplers of average and weights across
    losses = next((run / "csv").glob("train_error*.csv")).read_text().splitlines()
    assert [float(line.split(",")[1]) for line in losses[1:]] == [row["error"] for row in metrics(run)]
    assert json.loads((run / "curve.jsonl").read_text())["overall"].keys() == {"1", "2", "4"}


def test_low_rank_adapters(recipe: list[str], base: Path, tmp_path: Path) -> None:
    """They, the two time embedders and the tables are trained, by the same numbers at any stage, also after a kill, and
    merge into plain weights."""
    from emf.recipes import from_file
    from emf.weights.export import merged
    from emf.weights.folders import load_run
    from emf.weights.start import started

    recipe = [*recipe, "--lora.rank", "2", "--lora.targets", "to_q", "to_v", "to_out.0", "--zero.stage"]
    killed = [*recipe, "1", "--out", str(tmp_path / "run1")]
    assert train(tmp_path, *killed, before=kill_in_second_save).code == -signal.SIGKILL
    for stage, ranks in ((0, 1), (1, 1), (2, 2), (3, 2)):
        out = ["--out", str(tmp_path / f"run{stage}"), "--resume", str(stage == 1)]
        result = train(tmp_path, *recipe, str(stage), *out, ranks=ranks)
        assert result.code == 0 and ("step 3/6" in result.text) == (stage != 1), result.text
    one, *more = ([row["error"] for row in metrics(tmp_path / f"run{stage}")] for stage in range(4))
    for other in more:
        assert other == pytest.approx(one, rel=1e-4)
    start = started(from_file(tmp_path / "run0/config.json")).state_dict()
    end = averaged(tmp_path / "run0")
    adapters = {k for k in end if ".lora_" in k}
    assert len(adapters) == 2 * 6 and all(end[k].norm() > 0 for k in adapters)
    full = ("transformer.time_embed_t.", "transformer.time_embed_r.")
    for name, value in end.items():
        moved = name.startswith(full) or name.endswith("scale_shift_table") or name in adapters
        assert torch.equal(value, start[name]) != moved, name
    config, network = load_run(tmp_path / "run0")
    z, t, c = torch.randn(2, 3, 18, 18), torch.tensor([0.3, 0.9]), torch.randn(2, 4, 32)
    want = network.transformer(z, t, t / 2, c)
    whole = type(network.transformer)(network.transformer.config)
    whole.load_state_dict(merged(network.transformer.state_dict(), config.lora.scale))
    assert torch.allclose(whole(z, t, t / 2, c), want, atol=1e-5)
    changed = whole.state_dict()["transformer_blocks.0.attn1.to_q.weight"]
    assert not torch.equal(changed, load_file(base)["transformer.transformer_blocks.0.attn1.to_q.weight"])


def test_config_json_runs_again(straight: Path, tmp_path: Path) -> None:
    result = train(tmp_path, str(straight / "config.json"), "--out", str(tmp_path / "run"))
    assert result.code == 0, result.text
    assert metrics(tmp_path / "run") == metrics(straight)
    assert (tmp_path / "run/config.json").read_bytes() == (straight / "config.json").read_bytes()


def _poison(step: int, micro: int) -> None:
    """One sample of a micro-batch of one step becomes NaN."""
    from emf.train import batch as module

    make = module.make_batch

    def poisoned(config: Any, feed: Any, at: int, part: int, parts: int) -> Any:
        batch = make(config, feed, at, part, parts)
        if (at, part) == (step, micro):
            batch.e[1] = float("nan")
        return batch

    module.make_batch = poisoned


def _poison_4() -> None:
    _poison(3, 0)


def _poison_4_late() -> None:
    _poison(3, 1)


def _poison_last() -> None:
    _poison(5, 0)


def batch_of(run: Path, step: int, part: int, parts: int) -> Any:
    from emf.data.feed import Digits
    from emf.recipes import from_file
    from emf.train.batch import make_batch

    config = from_file(run / "config.json")
    return make_batch(config, Digits(config.batches), step, part, parts)


def test_nan_stops_the_run_and_says_where(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), before=_poison_4)
    assert result.code == 3 and "Traceback" not in result.text, result.text
    (line,) = (line for line in result.text.splitlines() if line.startswith("error:"))
    batch = batch_of(straight, 3, 0, 1)
    for part in ("step 3", str(batch.t[1].item()), str(batch.r[1].item()), "step_0000003"):
        assert part in line, line
    assert metrics(tmp_path / "run") == metrics(straight)[:3]


def _poison_gradient_4() -> None:
    """One step's loss is finite and its gradient is not."""
    from emf.train import loop as module

    losses = module.losses

    def poisoned(config: Any, network: Any, batch: Any, progress: float) -> Any:
        loss, error, own = losses(config, network, batch, progress)
        return (loss + (loss * 0).sqrt() if round(progress * config.steps) == 3 else loss), error, own

    module.losses = poisoned


@pytest.mark.parametrize("flags", ["", "--zero.stage 1", "--zero.stage 3", "--zero.dtype bfloat16 --zero.stage 2"])
def test_a_gradient_that_is_not_finite_touches_nothing(recipe: list[str], flags: str, tmp_path: Path) -> None:
    out, ranks = ["--out", str(tmp_path / "run"), *flags.split()], 2 if "bfloat16" in flags else 1
    result = train(tmp_path, *recipe, *out, before=_poison_gradient_4, ranks=ranks)
    assert result.code == 3 and "Traceback" not in result.text, result.text
    assert "gradient is not finite at step 3" in result.text and "step_0000003" in result.text, result.text
    out[1] = str(tmp_path / "skipping")
    result = train(tmp_path, *recipe, *out, "--run.skip", "1", before=_poison_gradient_4, ranks=ranks)
    assert result.code == 0, result.text
    assert [row["step"] for row in metrics(tmp_path / "skipping")] == [1, 2, 3, 5, 6]
    assert all(x.isfinite().all() for x in averaged(tmp_path / "skipping").values())


def test_nan_on_the_other_rank_names_its_times_too(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), ranks=2, before=_poison_4_late)
    assert result.code == 3 and result.text.count("error:") == 1 and "Traceback" not in result.text, result.text
    assert str(batch_of(straight, 3, 1, 2).t[1].item()) in result.text


def test_absurd_learning_rate_stops_the_run(recipe: list[str], tmp_path: Path) -> None:
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), "--optim.lr", "1e30", "--optim.clip", "0")
    assert result.code == 3 and "loss is not finite at step" in result.text and "Traceback" not in result.text, (
        result.text
    )


def test_a_number_of_bad_steps_may_be_skipped(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    def skipping(name: str, before: Callable[[], None], *flags: str) -> list[dict[str, Any]]:
        result = train(tmp_path, *recipe, "--out", str(tmp_path / name), "--run.skip", "1", *flags, before=before)
        assert result.code == 0, result.text
        return metrics(tmp_path / name)

    plain = skipping("plain", _poison_4)
    assert [row["step"] for row in plain] == [1, 2, 3, 5, 6] and [row["skipped"] for row in plain] == [0, 0, 0, 1, 1]
    assert plain[:3] == metrics(straight)[:3] and plain[3]["error"] != metrics(straight)[4]["error"]
    # the first micro-batch's gradient must go with the bad second one's
    late = skipping("late", _poison_4_late, "--zero.accumulation", "2")
    assert [row["step"] for row in late] == [1, 2, 3, 5, 6]
    assert [row["error"] for row in late] == pytest.approx([row["error"] for row in plain], rel=1e-4)


def test_a_skipped_last_step_still_leaves_the_last_checkpoint(recipe: list[str], tmp_path: Path) -> None:
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), "--run.skip", "1", before=_poison_last)
    assert result.code == 0, result.text
    assert (tmp_path / "run/checkpoints/step_0000006/model.safetensors").is_file()


def test_a_run_is_never_overwritten(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    cases = {
        "holds a run already": [],
        "another model": ["--resume", "True", "--transformer.num-layers", "2"],
        "another run (seed": ["--resume", "True", "--seed", "9"],
        "another run (flow": ["--resume", "True", "--flow.sampler", "uniform"],
        "step 6 already": ["--resume", "True", "--steps", "5"],
    }
    before = files(straight)
    for message, flags in cases.items():
        result = train(tmp_path, *recipe, "--out", str(straight), *flags)
        assert result.code == 2 and message in result.text and "Traceback" not in result.text, result.text
        assert files(straight) == before


def test_checkpoints_without_config_json_are_a_run_too(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "config.json").unlink()
    before = files(run)
    result = train(tmp_path, *recipe, "--out", str(run))
    assert result.code == 2 and "Traceback" not in result.text, result.text
    assert files(run) == before


def test_wrong_input_is_one_line_and_writes_nothing(
    recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    tree = json.loads((straight / "config.json").read_text())

    def written(name: str, content: Any) -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    narrow = {k: v[:1].contiguous() if k.endswith("proj_out.bias") else v for k, v in load_file(base).items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    auto = written("auto.json", {"bf16": {"enabled": "auto"}})
    cases: dict[str, list[str]] = {
        "no recipe 'nothing'": ["nothing"],
        "missing.json": [str(tmp_path / "missing.json")],
        "is JSON that ends too early": [written("torn.json", '{"recipe": ')],
        "is not JSON": [written("toml.json", "recipe = 1")],
        "list.json is no JSON object": [written("list.json", [1])],
        "no multiple": [*recipe, "--zero.accumulation", "3"],
        "bf16.enabled": [*recipe, "--zero.json", auto],
        "none.json does not exist": [*recipe, "--zero.json", str(tmp_path / "none.json")],
        "torn.json is JSON that ends too early": [*recipe, "--zero.json", str(tmp_path / "torn.json")],
        "no file": [*recipe, "--init", str(tmp_path / "none.safetensors")],
        "not a whole safetensors file": [*recipe, "--init", auto],
        "no transformer.time_embed": [*recipe, "--init", str(tmp_path / "other.safetensors")],
        "another model": [*recipe, "--init", str(tmp_path / "narrow.safetensors")],
        "is no folder": [*recipe, "--out", auto],
        "weights: " + str(tmp_path): [*recipe, "--init", str(tmp_path)],
        "use --zero.accumulation": [*recipe, "--zero.json", written("own.json", {"gradient_accumulation_steps": 2})],
        "did you mean zero_optimization": [*recipe, "--zero.json", written("typo.json", {"zero_optimisation": {}})],
        f"zero.json: {tmp_path}/list.json is no JSON object": [
            *recipe,
            "--zero.json",
            str(tmp_path / "list.json"),
        ],
        "DeepSpeed refuses": [*recipe, "--zero.json", written("7.json", {"zero_optimization": {"stage": 7}})],
        "log_every 0": [*recipe, "--run.log-every", "0"],
        "save_every 0": [*recipe, "--run.save-every", "0"],
        "accumulation 0": [*recipe, "--zero.accumulation", "0"],
        "flow.share": [*recipe, "--flow.share", "2", "3"],
        "world.size 22": [*recipe, "--world.size", "22"],
        "stepz": [written("key.json", tree | {"stepz": 1})],
        "learning": [written("nested.json", tree | {"optim": tree["optim"] | {"learning-rate": 1}})],
        "fast": [written("type.json", tree | {"steps": "fast"})],
        "mean-flow": [written("choice.json", tree | {"objective": "mean-flow"})],
        "patch_size": [*recipe, "--transformer.patch-size", "5"],
        "dual_time": [*recipe, "--transformer.dual-time", "False"],
        "--stepz": [*recipe, "--stepz", "3"],
    }
    for message, arguments in cases.items():
        result = train(tmp_path, *arguments, *([] if "--out" in arguments else ["--out", str(tmp_path / "run")]))
        lines = result.text.strip().splitlines()
        assert (result.code, len(lines)) == (2, 1) and lines[0].startswith("error: ") and message in lines[0], (
            message,
            result,
        )
        assert not (tmp_path / "run").exists()
    two = train(tmp_path, *recipe, "--batch-size", "7", "--out", str(tmp_path / "run"), ranks=2)
    assert two.code == 2 and two.text.count("error:") == 1 and "no multiple of 2 ranks" in two.text, two


@pytest.mark.parametrize("file", ["checkpoint.json", "model.safetensors", "engine/mp_rank_00_model_states.pt"])
def test_a_broken_checkpoint_is_one_line(recipe: list[str], straight: Path, file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    broken = run / "checkpoints" / "step_0000006" / file
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    result = train(tmp_path, *recipe, "--out", str(run), "--resume", "True")
    (line,) = (line for line in result.text.splitlines() if line.startswith("error:"))
    assert result.code == 2 and "step_0000006 is broken" in line and "Traceback" not in result.text, result.text


def print_ranges() -> None:
    from contextlib import nullcontext

    import emf.train.ranges

    emf.train.ranges.nvtx.annotate = lambda name: print("range", name, flush=True) or nullcontext()


def test_every_part_of_a_step_is_a_range(recipe: list[str], tmp_path: Path) -> None:
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), "--steps", "1", before=print_ranges)
    assert result.code == 0, result.text
    seen = [line.removeprefix("range ") for line in result.text.splitlines() if line.startswith("range ")]
    assert seen[:4] == ["data", "forward", "encode", "block 0"]
    assert [s for s in seen[4:] if s in ("backward", "optimizer")] == ["backward", "optimizer"]
    assert "communication" in seen
