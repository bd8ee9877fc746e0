"""A small server of OpenAI's completions protocol with token ids, as vLLM and SGLang serve it, around a language model
of transformers; for tests and for bench.overlap. What it answers can be replaced, and what it was asked is kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from emf.conditioning.sampling import Sampling, pick

Answer = tuple[int, Any]
"""A status, and JSON, or bytes as they are."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any, seconds: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.seconds = model, tokenizer, seconds
        self.asked: list[dict[str, Any]] = []
        """Bodies of the completions asked for."""
        self.answer: Callable[[str, dict[str, Any], Callable[[], Answer]], Answer] = lambda path, body, own: own()
        """What answers (path, body, its own way to answer)."""
        self._one = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def own(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "vllm"}]}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return 200, {"tokens": ids, "count": len(ids), "max_model_len": 4096}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        time.sleep(self.seconds)  # several at once, as an engine draws
        ids = self.drawn(body)
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "length",
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }
        return 200, {"object": "text_completion", "model": body["model"], "choices": [choice]}

    @torch.no_grad()
    def drawn(self, body: dict[str, Any]) -> list[int]:
        """The model's tokens, by the seed of the request and random numbers of this server's own."""
        how = Sampling(body["temperature"], body["top_k"], body["top_p"])
        generator, ids = torch.Generator().manual_seed(body["seed"] + 7), list(body["prompt"])
        with self._one:
            for _ in range(body["max_tokens"]):
                logits = self.model(torch.tensor([ids])).logits[:, -1]
                ids.append(int(pick(logits, torch.rand(1, generator=generator), how)))
        return ids[len(body["prompt"]) :]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answered({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self.server.asked.append(body)
        self._answered(body)

    def _answered(self, body: dict[str, Any]) -> None:
        status, told = self.server.answer(self.path, body, lambda: self.server.own(self.path, body))
        text = told if isinstance(told, bytes) else json.dumps(told).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except ConnectionError:  # who asked has gone
            pass


@contextmanager
def served(model: Any, tokenizer: Any, seconds: float = 0.0) -> Iterator[Server]:
    with Server(model, tokenizer, seconds) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
