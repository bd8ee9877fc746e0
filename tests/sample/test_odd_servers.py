"""Servers of image tokens whose answers are slow, torn, huge, nested or not fit for a terminal: one line of error each,
and never a key in it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from text_models import QWEN, TOKENIZER, blip3o

from bench.completions import Answer, Server, served
from emf.conditioning.sampling import Sampling
from emf.sample import token_server
from emf.sample.image_tokens import drawn_by
from emf.sample.token_server import TokenServer

DEEP = b"[" * 200_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(token_server, "PAUSES", (0.01,))
    with served(QWEN, TOKENIZER) as made:
        yield made


def only(at: str, answer: Answer) -> Any:
    return lambda path, body, own: answer if path == at else own()


def said_by(ask: Any) -> str:
    with pytest.raises(ValueError) as error:
        ask()
    said = str(error.value)
    assert said.startswith("image tokens: ") and said.isprintable() and len(said) < 700
    return said


@contextmanager
def raw(head: bytes, drip: bytes = b"") -> Iterator[str]:
    """A server that sends these bytes and closes, or then sends `drip` every 10 ms for as long as someone listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    taken, _ = listening.accept()
                    with taken:
                        taken.recv(65536)
                        taken.sendall(head)
                        while drip:
                            time.sleep(0.01)
                            taken.sendall(drip)
                except ConnectionError:
                    continue
                except OSError:  # closed
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("status", [200, 400])
def test_nested_too_deeply(server: Server, capsys: pytest.CaptureFixture[str], status: int) -> None:
    server.answer = only("/v1/models", (status, DEEP))
    assert ("nested too deeply: '[[[" if status == 200 else "answers 400: [[[") in said_by(
        lambda: TokenServer(server.url)
    )
    server.answer = only("/v1/completions", (status, DEEP))
    assert "[[[" in said_by(lambda: TokenServer(server.url).draw([[1]], 1, [0], Sampling()))
    server.answer = only("/tokenize", (status, DEEP))
    TokenServer(server.url).begin(blip3o(), Path())
    assert "is not checked" in capsys.readouterr().err


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_drips_ends(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_server, "REACHED", 0.3)
    with raw(head, b" ") as url:
        start = time.monotonic()
        assert said_by(lambda: TokenServer(url)).endswith("gives no whole answer within 0.3 s")
        assert time.monotonic() - start < 20


def test_an_answer_without_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_server, "LARGEST", 1000)
    server.answer = only("/v1/models", (200, b" " * 1001))
    assert "/v1/models answers more than 1000 bytes" in said_by(lambda: TokenServer(server.url))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "Remote end closed connection without response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "IncompleteRead"),
        (b"\x1b[31mSSH-2.0\r\n", "?[31mSSH-2.0"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n", "Invalid IPv6 URL"),
    ],
)
def test_a_server_that_closes_is_not_said_to_be_missing(head: bytes, reason: str) -> None:
    with raw(head) as url:
        said = said_by(lambda: TokenServer(url))
    assert "/v1/models gives no answer that can be read (" in said and reason in said and "start one" not in said


@pytest.mark.parametrize("error", [{"message": "out of\nmemory"}, "out of memory", ["out of memory"]])
def test_an_error_under_status_200_is_told(server: Server, error: Any) -> None:
    engine = TokenServer(server.url)
    server.answer = only("/v1/completions", (200, {"error": error}))
    said = said_by(lambda: engine.draw([[1]], 1, [0], Sampling()))
    assert "/v1/completions answers an error: " in said and "out of memory" in said


@pytest.mark.parametrize("answer", [(404, {}), (200, {"tokens": ["a"]}), (200, ["a"]), (200, {"ids": [1]})])
def test_a_vocabulary_that_is_not_checked_is_said(
    server: Server, capsys: pytest.CaptureFixture[str], answer: Answer
) -> None:
    engine = TokenServer(server.url)
    engine.begin(blip3o(), Path())
    assert capsys.readouterr().err == ""
    server.answer = only("/tokenize", answer)
    engine.begin(blip3o(), Path())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("image tokens: ") and "vocabulary is not checked" in err


def test_of_several_models_none_is_taken(server: Server) -> None:
    server.answer = only("/v1/models", (200, {"data": [{"id": "one"}, {"id": "t\x1bwo"}]}))
    assert "serves 2 models (one, t?wo); expected" in said_by(lambda: TokenServer(server.url))


@pytest.mark.parametrize("key", ["secret-word\n", "secret-wort\u20ac", "secret word"])
def test_a_key_that_cannot_be_sent_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("EMF_AR_KEY", key)
    said = said_by(lambda: TokenServer(server.url))
    assert "EMF_AR_KEY" in said and "secret" not in said


def test_a_servers_words_are_shown_in_one_line(server: Server) -> None:
    model = {"id": "a\x1b[31m\nb\ud800", "owned_by": "x\ty"}
    server.answer = only("/v1/models", (200, {"data": [model]}))
    engine = TokenServer(server.url)
    assert engine.said == "x y server, model a?[31m b?" and engine.model == model["id"]
    server.answer = only("/tokenize", (200, {"tokens": [1]}))
    assert "the model a?[31m b? of" in said_by(lambda: engine.begin(blip3o(), Path()))
    server.answer = only("/v1/completions", (400, {"error": {"message": "\ud800\x1b"}}))
    assert said_by(lambda: engine.draw([[1]], 1, [0], Sampling())).endswith("answers 400: ??")
    server.answer = only("/v1/completions", (200, {"choices": [{"token_ids": [10**400] * 6}]}))
    assert "gives the token 1000" in said_by(lambda: drawn_by(engine, blip3o(), ["a"], [0]))
