"""A file that is missing, one that may not be read and one that was torn are three things, and are told apart; only
what was read and found torn is to be moved away, and nothing is to be deleted."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_run import small_run
from exported import write_base

from emf.conditioning.load import load as load_encoder
from emf.data.shards import Shard
from emf.evaluate.clip import pretrained
from emf.files import check_readable, whole_folder
from emf.model.autoencoder import load_dcae
from emf.weights import checkpoints
from emf.weights.checkpoints import Made
from emf.weights.tensors import Weights, read_weights


@pytest.fixture(autouse=True)
def rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights count for the superuser too."""
    opened: Any = Path.open

    def allowed(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.exists() and not path.stat().st_mode & 0o400:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", allowed)
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read())


def said(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        act()
    line = str(error.value)
    assert "\n" not in line and "delete" not in line and "remove" not in line
    return line


READERS: dict[str, Callable[[Path], Any]] = {
    "read_weights": read_weights,
    "Weights": lambda file: Weights([file]),
    "a checkpoint": lambda file: checkpoints.read(file.parent),
    "a checkpoint's tensors": lambda file: checkpoints.stream(file.parent),
    "a shard of a cache": Shard,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_weights(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    file = small_run(tmp_path / "run") / "model.safetensors"
    data = file.read_bytes()
    file.chmod(0)
    line = said(lambda: read(file))
    assert f"{file} cannot be read: Permission denied" in line
    assert not any(word in line for word in ("broken", "torn", "not a ", "move"))
    file.chmod(0o600)
    file.write_bytes(data[: len(data) // 2])
    line = said(lambda: read(file))
    assert str(file) in line and any(word in line for word in ("torn", "not a ")) and "Permission" not in line
    assert ("is broken" in line and "move it away" in line) == (read is READERS["a checkpoint"])
    file.unlink()
    line = said(lambda: read(file))
    assert any(word in line for word in ("no file", "missing")) and "broken" not in line and "move" not in line


def test_how_a_checkpoint_was_made(tmp_path: Path) -> None:
    part = checkpoints.begin(tmp_path, 1)
    checkpoints.write_checkpoint(part, {"x": torch.zeros(2)}, "{}", Made(1, 1, 0))
    whole = checkpoints.finish(part, 1)
    assert checkpoints.read_made(whole) == Made(1, 1, 0)
    file = whole / checkpoints.MADE
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert checkpoints.read_made(whole) == Made(1, 1, 0)
    file.chmod(0)
    assert said(lambda: checkpoints.read_made(whole)) == f"resume: {file} cannot be read: Permission denied"
    file.chmod(0o600)
    file.write_text('{"step": 1')
    torn = f"resume: {whole} is broken ({file} is JSON that ends too early; it was torn); move it away"
    assert said(lambda: checkpoints.read_made(whole)).startswith(torn)
    file.write_text("[1]")
    assert f"is broken ({file} is no JSON object)" in said(lambda: checkpoints.read_made(whole))
    file.unlink()
    assert said(lambda: checkpoints.read_made(whole)) == f"resume: {file} does not exist"


def test_a_folder_of_checkpoints_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is to be resumed would start again, and drop the rows of its log."""
    part = checkpoints.begin(tmp_path, 1)
    checkpoints.write_checkpoint(part, {"x": torch.zeros(2)}, "{}", Made(1, 1, 0))
    assert checkpoints.finish(part, 1) == checkpoints.newest(tmp_path)

    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for read in (checkpoints.checkpoints, checkpoints.newest):
        line = said(lambda read=read: read(tmp_path))
        assert line == f"{tmp_path / checkpoints.FOLDER} cannot be read: Permission denied"


def test_folders_that_libraries_read(tmp_path: Path) -> None:
    """transformers and diffusers say of such a file that it is not there, or name no file."""
    import transformers

    base = write_base(tmp_path)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights.chmod(0)
    assert f"{weights} cannot be read: Permission denied" in said(lambda: load_dcae(base))
    sizes: Any = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=99)
    clip = tmp_path / "clip"
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)).save_pretrained(clip)
    (clip / "model.safetensors").chmod(0)
    for read in (
        lambda: load_encoder("clip", clip),
        lambda: pretrained(transformers.CLIPTextModel, str(clip), "x"),
    ):
        assert f"{clip / 'model.safetensors'} cannot be read: Permission denied" in said(read)


def test_check_readable(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "hidden").mkdir()
    (tmp_path / "a" / ".lock").touch(mode=0)
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    check_readable(tmp_path / "a")
    (tmp_path / "a" / "file").touch(mode=0)
    for path in (tmp_path / "a", tmp_path / "a" / "file"):
        assert said(lambda path=path: check_readable(path)) == f"{tmp_path}/a/file cannot be read: Permission denied"
    assert said(lambda: check_readable(tmp_path / "none")).endswith("none does not exist")


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_what_others_write_in_a_folder_has_the_umasks_mode(tmp_path: Path, umask: int) -> None:
    """safetensors, and so save_pretrained, writes files that the owner alone may read."""
    old = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as part:
            write_base(part / "base")
            (part / "link").symlink_to(tmp_path / "else")
    finally:
        os.umask(old)
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file() and not f.is_symlink()]
    assert any(f.suffix == ".safetensors" for f in files)
    assert {f.stat().st_mode & 0o777 for f in files} == {0o666 & ~umask}
