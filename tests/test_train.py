"""Training as a user runs it: ranks and ZeRO stages agree, a killed run continues, what is wrong ends it with one line.

The runs are processes of their own, forked from one that has imported emf.train (start-up is most of a short run); one
goes through the launcher.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parent.parent
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["emf.train", "pytest"])
TINY = [
    "--batch-size",
    "8",
    "--steps",
    "6",
    "--transformer.num-layers",
    "1",
    "--transformer.num-attention-heads",
    "2",
    "--transformer.num-cross-attention-heads",
    "1",
    "--transformer.caption-channels",
    "32",
    "--encoder.hidden-size",
    "32",
    "--encoder.intermediate-size",
    "32",
    "--encoder.num-hidden-layers",
    "1",
    "--encoder.num-attention-heads",
    "2",
    "--encoder.num-key-value-heads",
    "1",
    "--encoder.head-dim",
    "16",
    "--encoder.out-channels",
    "32",
    "--run.log-every",
    "1",
    "--run.save-every",
    "3",
    "--run.eval-every",
    "0",
    "--optim.warmup",
    "2",
    "--optim.ema",
    "0.5",
]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _child(arguments: list[str], environment: dict[str, str], output: Path, before: Callable[[], None] | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    from emf.train import main

    if before:
        before()
    main(arguments)


class Result(NamedTuple):
    code: int
    text: str


def train(
    folder: Path, *arguments: str, ranks: int = 1, before: Callable[[], None] | None = None, name: str = "out"
) -> Result:
    """`emf train ...` on some ranks; `before` runs in each of them first. The code is the first that is not 0."""
    output, port, processes = folder / f"{name}.txt", free_port(), []
    output.unlink(missing_ok=True)
    for rank in range(ranks):
        shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        environment = shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if ranks > 1 else {}
        process = FORKED.Process(target=_child, args=([*arguments], environment, output, before))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(600)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{arguments} hangs: {output.read_text()}")
    return Result(next((p.exitcode for p in processes if p.exitcode), 0) or 0, output.read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock and the machine say."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("it_s", "memory_mib")} for row in rows]


def averaged(run: Path, step: int = 6) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:07d}" / "model.safetensors")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow-matching run's weights."""
    folder = tmp_path_factory.mktemp("base")
    result = train(folder, "digits-base", "--out", str(folder / "run"), *TINY)
    assert result.code == 0, result.text
    return folder / "run" / "checkpoints" / "step_0000006" / "model.safetensors"


@pytest.fixture(scope="module")
def recipe(base: Path) -> list[str]:
    """What every MeanFlow run here is called with."""
    return ["digits", "--init", str(base), *TINY]


@pytest.fixture(scope="module")
def straight(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to compare with: one rank, no ZeRO, six steps without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    result = train(folder, *recipe, "--out", str(folder / "run"))
    assert result.code == 0, result.text
    return folder / "run"


def assert_same_training(run: Path, want: Path, base: Path) -> None:
    """Errors to 1e-4, averaged weights to 1 % of how far training moved them (Adam turns rounding into steps)."""
    got, expected = metrics(run), metrics(want)
    assert [row["step"] for row in got] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "error", "lr"):
        assert [row[key] for row in got] == pytest.approx([row[key] for row in expected], rel=1e-4), key
    start, a, b = load_file(base), averaged(run), averaged(want)
    assert a.keys() == b.keys()
    moved = torch.cat([(b[k] - start[k]).flatten() for k in start]).norm()
    apart = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    assert 0 < apart < 0.01 * moved or apart == 0 < moved, (apart, moved)


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


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulation"),
    [(0, 1, 2), (3, 1, 1), (0, 2, 1), (1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2), (3, 2, 1), (3, 2, 2)],
)
def test_ranks_stages_and_accumulation_agree(
    stage: int, ranks: int, accumulation: int, recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--zero.stage", str(stage), "--zero.accumulation", str(accumulation)]
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), *flags, ranks=ranks)
    assert result.code == 0, result.text
    assert_same_training(tmp_path / "run", straight, base)


def test_share_is_of_the_whole_batch(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    """Not of one rank's last micro-batch."""
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), "--zero.accumulation", "2", ranks=2)
    assert result.code == 0, result.text
    assert [row["share"] for row in metrics(tmp_path / "run")] == [row["share"] for row in metrics(straight)]


def test_checkpointing_of_activations_under_zero_3(
    recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--zero.stage", "3", "--transformer.checkpointing", "True"]
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), *flags, ranks=2)
    assert result.code == 0, result.text
    assert_same_training(tmp_path / "run", straight, base)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_keeps_float32_weights(
    stage: int, recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    flags = ["--zero.stage", str(stage), "--zero.dtype", "bfloat16"]
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), *flags, ranks=2 if stage else 1)
    assert result.code == 0, result.text
    got, want = ([row["error"] for row in metrics(run)] for run in (tmp_path / "run", straight))
    assert got == pytest.approx(want, rel=0.03) and got != want
    start, a, b = load_file(base), averaged(tmp_path / "run"), averaged(straight)
    frozen = {k for k in start if k.startswith(("encoder.", "transformer.time_embed."))}
    moved = {k: w for k, w in a.items() if k not in frozen}
    assert all(w.dtype == torch.float32 for w in a.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in moved.values())
    apart = torch.cat([(w - b[k]).flatten() for k, w in moved.items()]).norm()
    assert apart < 0.5 * torch.cat([(b[k] - start[k]).flatten() for k in moved if k in start]).norm()


def kill_in_second_save() -> None:
    """SIGKILL on every rank while step 6 is being written."""
    from emf import zero

    save = zero.save_file

    def torn(weights: dict[str, Tensor], file: Path) -> None:
        save(weights, file)
        if "0000006" in str(file):
            os.kill(os.getpid(), signal.SIGKILL)

    zero.save_file = torn


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


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_sharded_run_continues(
    stage: int, recipe: list[str], straight: Path, base: Path, tmp_path: Path
) -> None:
    run, flags = tmp_path / "run", ["--zero.stage", str(stage)]
    assert train(tmp_path, *recipe, "--out", str(run), *flags, ranks=2, before=kill_in_second_save).code
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_0000003", "step_0000006.part"]
    result = train(tmp_path, *recipe, "--out", str(run), *flags, "--resume", "True", ranks=2)
    assert result.code == 0 and "step 3/6" not in result.text, result.text
    assert_same_training(run, straight, base)


def test_the_launcher(recipe: list[str], straight: Path, base: Path, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        free_port(),
        "--module",
        "emf.train",
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | dict(PYTHONPATH=path, DS_ACCELERATOR="cpu")
    arguments = [*recipe, "--out", str(tmp_path / "run"), "--zero.stage", "3"]
    done = subprocess.run([*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_training(tmp_path / "run", straight, base)
    again = subprocess.run(
        [*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 2 and again.stderr.count("error: train:") == 1 and "Traceback" not in again.stderr, (
        again.stderr
    )


def test_config_json_runs_again(straight: Path, tmp_path: Path) -> None:
    result = train(tmp_path, str(straight / "config.json"), "--out", str(tmp_path / "run"))
    assert result.code == 0, result.text
    assert metrics(tmp_path / "run") == metrics(straight)
    assert (tmp_path / "run/config.json").read_bytes() == (straight / "config.json").read_bytes()


def _poison(step: int, micro: int) -> None:
    """One sample of a micro-batch of one step becomes NaN."""
    from emf import train as module

    make = module.make_batch

    def poisoned(config: Any, at: int, part: int, parts: int) -> Any:
        batch = make(config, at, part, parts)
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


def test_nan_stops_the_run_and_says_where(recipe: list[str], straight: Path, tmp_path: Path) -> None:
    from emf.recipes import from_file
    from emf.train import make_batch

    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), before=_poison_4)
    assert result.code == 3 and "Traceback" not in result.text, result.text
    (line,) = (line for line in result.text.splitlines() if line.startswith("error:"))
    batch = make_batch(from_file(straight / "config.json"), 3, 0, 1)
    for part in ("step 3", str(batch.t[1].item()), str(batch.r[1].item()), "step_0000003"):
        assert part in line, line
    assert metrics(tmp_path / "run") == metrics(straight)[:3]


def _poison_gradient_4() -> None:
    """One step's loss is finite and its gradient is not."""
    from emf import train as module

    make, losses, seen = module.make_batch, module.losses, []

    def counted(config: Any, at: int, part: int, parts: int) -> Any:
        seen.append(at)
        return make(config, at, part, parts)

    def poisoned(*args: Any) -> Any:
        loss, error = losses(*args)
        return (loss + (loss * 0).sqrt() if seen[-1] == 3 else loss), error

    module.make_batch, module.losses = counted, poisoned


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
    from emf.recipes import from_file
    from emf.train import make_batch

    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), ranks=2, before=_poison_4_late)
    assert result.code == 3 and result.text.count("error:") == 1 and "Traceback" not in result.text, result.text
    assert str(make_batch(from_file(straight / "config.json"), 3, 1, 2).t[1].item()) in result.text


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
        "stage": ["--resume", "True", "--zero.stage", "1"],
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
        "is not JSON": [written("torn.json", '{"recipe": ')],
        "expected an object": [written("list.json", [1])],
        "no multiple": [*recipe, "--zero.accumulation", "3"],
        "bf16.enabled": [*recipe, "--zero.json", auto],
        "none.json cannot be read": [*recipe, "--zero.json", str(tmp_path / "none.json")],
        "torn.json cannot be read": [*recipe, "--zero.json", str(tmp_path / "torn.json")],
        "no file": [*recipe, "--init", str(tmp_path / "none.safetensors")],
        "not a safetensors file": [*recipe, "--init", auto],
        "no transformer.time_embed": [*recipe, "--init", str(tmp_path / "other.safetensors")],
        "another model": [*recipe, "--init", str(tmp_path / "narrow.safetensors")],
        "is no folder": [*recipe, "--out", auto],
        "weights: " + str(tmp_path): [*recipe, "--init", str(tmp_path)],
        "use --zero.accumulation": [*recipe, "--zero.json", written("own.json", {"gradient_accumulation_steps": 2})],
        "did you mean zero_optimization": [*recipe, "--zero.json", written("typo.json", {"zero_optimisation": {}})],
        "list.json holds list": [*recipe, "--zero.json", str(tmp_path / "list.json")],
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


@pytest.mark.parametrize("file", ["checkpoint.json", "ema-0.safetensors", "engine/mp_rank_00_model_states.pt"])
def test_a_broken_checkpoint_is_one_line(recipe: list[str], straight: Path, file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    broken = run / "checkpoints" / "step_0000006" / file
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    result = train(tmp_path, *recipe, "--out", str(run), "--resume", "True")
    (line,) = (line for line in result.text.splitlines() if line.startswith("error:"))
    assert result.code == 2 and "step_0000006 is broken" in line and "Traceback" not in result.text, result.text
