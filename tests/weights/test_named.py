"""Names on the Hugging Face Hub in the place of folders: a stand-in for the Hub on this machine, and its client's own
cache."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

pytest.importorskip("diffusers")
import sana
from exported import write_published
from fake_hub import COMMIT, Hub, serving
from huggingface_hub import errors

from emf.cli.weights import convert as convert_command
from emf.config import Config
from emf.evaluate.clip import pretrained
from emf.model.autoencoder import load_dcae
from emf.recipes import digits
from emf.train.paths import fetched
from emf.weights.converted import read_converted
from emf.weights.folders import load_base
from emf.weights.hub import AUTOENCODER, ENCODER, START, named

ASKED = f"/me/sana/resolve/{COMMIT}/"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with a SANA pipeline's folder as me/sana, and a client whose cache is empty."""
    folder = write_published(tmp_path / "published")
    sana.saved(sana.diffusers_model(), folder / "transformer", "single")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"no need of this")
    with serving() as hub:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        hub.files["me/sana"], hub.private["me/sana"] = files, False
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield hub


def asked_for(hub: Hub) -> set[str]:
    """The folders of the weights that were fetched since this was asked last; files of text are small."""
    found = {p.removeprefix(ASKED).rpartition("/")[0] for _, p, _ in hub.asked if p.endswith((".safetensors", ".bin"))}
    hub.asked.clear()
    return found


def one_line(act: Any, *needles: str) -> None:
    with pytest.raises(ValueError) as error:
        act()
    line = str(error.value)
    assert "\n" not in line and all(needle in line for needle in needles), line


def test_a_name_is_converted_and_remembered(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_command(Path("me/sana@main"), tmp_path / "out")
    assert asked_for(hub) == {"transformer"} and "diffusers SANA" in capsys.readouterr().out
    snapshot = tmp_path / "cache" / "models--me--sana" / "snapshots" / COMMIT
    assert read_converted(tmp_path / "out").source["path"] == str(snapshot)
    assert not (snapshot / "transformer" / "diffusion_pytorch_model.bin").exists()
    # what it is drawn with, and conversion had no need of, is fetched when it is
    config, _ = load_base(tmp_path / "out")
    assert config.condition.folder == config.data.vae == snapshot and asked_for(hub) == {"text_encoder", "vae"}
    shutil.rmtree(tmp_path / "cache")
    convert_command(Path("me/sana"), tmp_path / "once more")
    # without a network the cache serves what it has, and says what it lacks
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    convert_command(Path("me/sana"), tmp_path / "again")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    convert_command(Path("me/sana"), tmp_path / "offline")
    command = "`hf download me/sana --include 'vae/*.json' --include 'vae/*.safetensors'"
    one_line(lambda: named("me/sana", AUTOENCODER, "latent"), "latent: no folder me/sana", "cannot be reached", command)
    one_line(lambda: named("me/other@v1", ["a*"], "x"), "me/other --revision v1 --include 'a*' --local-dir other`")


def test_only_what_is_needed_is_fetched(hub: Hub) -> None:
    config = replace(digits(), init=Path("me/sana"))
    assert fetched(config, sizes=True).init is not None
    assert asked_for(hub) == set()
    load_dcae(named("me/sana", AUTOENCODER, "latent"))
    assert asked_for(hub) == {"vae"}
    assert (named("me/sana", ENCODER, "config") / "text_encoder" / "model.safetensors").is_file()
    assert asked_for(hub) == {"text_encoder"}
    one_line(lambda: named("me/sana", ["none*"], "config"), "me/sana on the Hub holds none of none*")


def test_ranks_that_ask_at_once_fetch_each_file_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's lock on a file lets one of a machine's ranks fetch it, and the others wait and read its cache. A
    thread stands for a rank: it opens the lock anew, as a process does. The answer is slow, so that they meet."""
    answer, together = hub.answer, threading.Barrier(3)

    def slow(method: str, path: str, body: bytes) -> tuple[int, Any]:
        time.sleep(0.3 if method == "GET" and path.endswith(".safetensors") else 0)
        return answer(method, path, body)

    def rank(_: int) -> Path:
        together.wait()
        return named("me/sana", AUTOENCODER, "config")

    monkeypatch.setattr(hub, "answer", slow)
    with ThreadPoolExecutor(3) as ranks:
        (folder,) = {*ranks.map(rank, range(3))}
    fetched = [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]
    assert sorted(fetched) == sorted({*fetched}) and any(path.endswith(".safetensors") for path in fetched)
    assert not [file for file in folder.parents[1].rglob("*.incomplete")]


def test_every_name_of_a_config_becomes_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []

    def fake(name: str, *, revision: str | None, repo_type: str, allow_patterns: list[str], library_name: str) -> str:
        calls.append((name, revision, repo_type, tuple(allow_patterns)))
        folder = tmp_path / name / str(revision)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({}))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    config: Config = digits()
    condition = replace(config.condition, folder=Path("google/gemma-2-2b-it@refs/pr/3"))
    data = replace(config.data, vae=Path("o/dc-ae@v1.0"))
    done = fetched(replace(config, init=Path("me/emf"), condition=condition, data=data))
    assert done.init == tmp_path / "me" / "emf" / "None" and done.data.vae == tmp_path / "o" / "dc-ae" / "v1.0"
    assert done.condition.folder == tmp_path / "google" / "gemma-2-2b-it" / "refs" / "pr" / "3"
    assert [call[0] for call in calls] == ["google/gemma-2-2b-it", "o/dc-ae", "me/emf"]
    assert [call[3] for call in calls] == [ENCODER, AUTOENCODER, START]
    one_line(lambda: pretrained(dict, "me/clip", "GenEval's colours"), "GenEval's colours: ")  # dict loads nothing
    assert calls[-1][:3] == ("me/clip", None, "model")
    # what is here goes before what is there, and what is no such name is left to its reader
    calls.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "sana").mkdir(parents=True)
    for path in ("here/sana", "digits-base", "/none/at-all", "a/b/c", "me/dig its", "../sana", ""):
        assert named(path, ENCODER, "x") == Path(path)
    assert named("here/sana@v2", ENCODER, "x") == tmp_path / "here" / "sana" / "v2" and len(calls) == 1


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (errors.GatedRepoError, "its owner must let you in"),
        (errors.RepositoryNotFoundError, "it has no such repository"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.LocalEntryNotFoundError, "it cannot be reached"),
        (OSError, "disk is full"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: Any, says: str) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind, "disk is full\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    one_line(
        lambda: named("me/none", START, "config: init"), "config: init: no folder me/none", f"({says}", "hf download"
    )
