"""How commands end: where the disk is full with one line and exit code 2, and no half of a file stays; Ctrl-C; a pipe.

A limit on the size of files stands for the full disk: the system refuses the write in the same place.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import sana
import torch
from digits_run import small_run
from exported import write_base
from full_disk import full
from geneval_cases import make_folder, record
from image_files import pairs, small_autoencoder, write_tar
from PIL import Image
from safetensors.torch import save_file
from training import train

from emf.cli.main import main
from emf.errors import report_errors
from emf.files import whole_folder
from emf.train.command import main as train_command

COMMANDS = {
    "generate": 'generate "a red seven" --run {run} --out {out}/pictures --device cpu',
    "release": "release {run} --out {out}/weights.safetensors",
    "export": "export {run} --out {out}/exported",
    "convert": "convert {here}/sana --out {out}/converted",
    "inspect": "data inspect {here}/a.tar --out {out}/inspected --size 8",
    "a listing": "data inspect {here}/a.tar --out {out}/inspected --size 8 --listings {out}/listings.json",
    "cache": "cache {here}/a.tar --vae {here}/vae --size 32 --out {out}/cache --device cpu",
    "geneval": "evaluate geneval {here}/images --detections {here}/found.jsonl --out {out}/scores",
    "pictures": "evaluate geneval --prompts {here}/p.jsonl --checkpoint {run} --images-only --out {out}/g --device cpu",
    "disentanglement": "analyze disentanglement a={run} --prompts {here}/p.jsonl --out {out}/analysis --device cpu",
    "encoders": "analyze encoders digits:random digits:bag-of-words --out {out}/analysis --device cpu",
    "answers": "evaluate dpg {here}/grids --questions {here}/dpg.csv --answers {here}/answers.jsonl --out {out}/scores",
    "report": "report {run}",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("here")
    run = small_run(folder / "run")
    keys = ("loss", "error", "lr", "it_s", "share", "memory_mib", "skipped")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(keys, 1)}) + "\n")
    sana.diffusers_model().save_pretrained(folder / "sana")
    small_autoencoder().save_pretrained(folder / "vae")
    write_tar(folder / "a.tar", pairs(2))
    spec = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a red seven"}
    record(folder / "found.jsonl", dict.fromkeys(make_folder(folder / "images", [spec]), []))
    (folder / "p.jsonl").write_text(json.dumps(spec) + "\n")
    (folder / "grids").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "grids" / "pair.png")
    questions = ["item_id,proposition_id,dependency,tuple,question_natural_language"]
    questions += [f"{item},1,0,entity - whole (dog),Is there a dog?" for item in ("first", "pair")]
    (folder / "dpg.csv").write_text("\n".join(questions) + "\n")
    answers = [{"filename": "pair.png", "crop": i, "answers": {1: "yes"}} for i in range(4)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folder


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands(
    words: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk without any room, and on one with a little: a whole file that was written before stays."""
    run, out = here / "run", tmp_path / "out"
    for room in (0, 200):
        out.mkdir(exist_ok=True)
        monkeypatch.setattr("sys.argv", ["emf", *shlex.split(words.format(run=run, here=here, out=out))])
        with pytest.raises(SystemExit) as end, full(room):
            main()
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 2 and len(said) == 1 and "cannot be written: File too large" in said[0], said
        assert str(run if words.startswith("report") else out) in said[0] and not (run / "report.html").exists()
        left = [file for file in out.rglob("*") if file.is_file()]
        assert not (left and not room) and not [
            file for file in left if file.suffix in (".part", ".safetensors", ".png")
        ]


def test_what_libraries_write_into_a_folder(tmp_path: Path) -> None:
    for writer in (
        lambda part: write_base(part),
        lambda part: save_file({"x": torch.zeros(9999)}, part / "x.safetensors"),
        lambda part: torch.save({"x": torch.zeros(9999)}, part / "x.pt"),
    ):
        expected = pytest.raises(ValueError, match="out cannot be written: ")
        with expected as error, full(1000), whole_folder(tmp_path / "out") as part:
            writer(part)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def fill_at_50_kilobytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


def test_a_checkpoint(recipe: list[str], tmp_path: Path) -> None:
    """What DeepSpeed writes by torch."""
    result = train(tmp_path, *recipe, "--out", str(tmp_path / "run"), before=fill_at_50_kilobytes)
    (line,) = (line for line in result.text.splitlines() if line.startswith("error:"))
    assert result.code == 2 and "Traceback" not in result.text, result.text
    assert f"{tmp_path}/run/checkpoints/step_0000003.part cannot be written: " in line, line


def test_errors_that_name_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file x")):
        with pytest.raises(SystemExit) as end, report_errors():
            raise error
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("error: a file cannot be written: ") and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="of ours"), report_errors():
        raise RuntimeError("of ours")


def test_ctrl_c_advises_what_the_command_has(capsys: pytest.CaptureFixture[str]) -> None:
    """Training alone has a --resume."""
    with pytest.raises(SystemExit) as end, report_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(SystemExit) as end, report_errors():
        raise KeyboardInterrupt("interrupted; go on with --resume")
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted; go on with --resume\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As in `emf generate ... | head -1`."""
    code = "from emf.errors import report_errors\nwith report_errors():\n  while True: print('x' * 99, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_a_config_that_no_file_could_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte that is not UTF-8, in a path or in a prompt."""
    for flag, value in (("data.listings", b"a\xff.json"), ("run.prompts", b"a \xff")):
        words = ["digits", f"--{flag}", os.fsdecode(value), "--run.eval-every", "5", "--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as end:
            train_command(words)
        assert end.value.code == 2 and not (tmp_path / "run").exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert flag in line


def ended(code: str, read: int | None = None, terminate: bool = False) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of Python code; `read`: lines, then stdout is closed; `terminate` comes after one."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    if terminate:
        process.stdout.readline()
        process.terminate()
    for _ in range(read or 0):
        process.stdout.readline()
    if read is not None:
        process.stdout.close()
        said = ""
    else:
        said = process.stdout.read()
        process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    return process.wait(60), said, errors


def test_what_is_printed_last_may_find_no_reader() -> None:
    """A few lines wait in the process until its end, as in `emf plan ... | head -1` and `emf --help | true`."""
    code = "import time\nfrom emf.errors import report_errors\nwith report_errors():\n  time.sleep(1); print('x')"
    assert ended(code, read=0) == (141, "", "")
    assert ended(code + "; raise SystemExit(0)", read=0) == (141, "", "")


def test_an_output_that_cannot_be_written() -> None:
    code = "import sys\nsys.stdout = open('/dev/full', 'w')\nfrom emf.errors import report_errors\n"
    code += "with report_errors(): print('x')"
    assert ended(code) == (2, "", "error: a file cannot be written: No space left on device\n")


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from emf.errors import cleaned_up, report_errors
from emf.files import whole_file
with report_errors(), cleaned_up(), whole_file(Path({str(tmp_path)!r}) / "x"):
    print("begun", flush=True)
    time.sleep(60)
"""
    assert ended(code, terminate=True) == (143, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ],
    ids=["Python's", "a GPU's", "torch's"],
)
def test_memory_that_is_full(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, report_errors():
        raise error
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: the memory is full (") and said.count("\n") == 1
    assert ": you tried to allocate 4000000000000000 bytes)" in said or "alloc_cpu" not in str(error)


def test_a_table_may_find_no_reader_either() -> None:
    """rich would end the process by itself, with another exit code."""
    code = "import time\nfrom emf.errors import report_errors\nfrom emf.show.table import console, terminal\n"
    code += "with report_errors():\n  time.sleep(1); console().print(terminal(['a'], [['b']] * 9999))"
    assert ended(code, read=0) == (141, "", "")


def test_sigterm_while_arguments_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("tyro.extras.subcommand_cli_from_dict", asked)
    monkeypatch.setattr("sys.argv", ["emf", "report", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 143
