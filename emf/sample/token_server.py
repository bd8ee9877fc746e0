"""Image tokens from a server with OpenAI's completions endpoint, as vLLM and SGLang serve one.

POST /v1/completions takes a prompt as a list of token ids. Of what is no part of OpenAI's own interface both servers
know top_k, ignore_eos and return_token_ids, by which choices[0].token_ids comes back (vLLM from 0.10.2 on:
vllm/entrypoints/openai/completion/protocol.py, CompletionRequest; SGLang:
python/sglang/srt/entrypoints/openai/serving_completions.py). SGLang reads the seed only where it was started with
--enable-deterministic-inference. Penalties and min_p are sent too: a server would take them from the folder's
generation_config.json otherwise. GET /v1/models names the model; POST /tokenize, of both but of no standard, shows
whether its vocabulary is this one.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from emf.conditioning.blip3o import Blip3oNext
from emf.conditioning.sampling import Sampling
from emf.files import parse_json, why

KEY = "EMF_AR_KEY"
"""The environment variable with the server's key, where it asks for one."""
REACHED, ANSWERED = 10.0, 600.0
"""Seconds that a server may take to say which model it has, and to draw the tokens of a picture, to the last byte."""
LARGEST = 2**24
"""Bytes of an answer, at most: the tokens of a picture are some thousands."""
PAUSES = (1.0, 2.0, 4.0)
"""Seconds before a request is made again that failed on the server's side."""
AT_ONCE = 64
"""Requests on their way, at most."""
START = "start one with `vllm serve FOLDER/language_model`, or name another with --ar-server"


class TokenServer:
    """A server by its address, as http://127.0.0.1:8000, with or without /v1. Raises ValueError where that is no
    address, and where no server of the protocol answers there."""

    def __init__(self, url: str) -> None:
        self.url = base_of(url)
        proxies = [urllib.request.ProxyHandler({})] if _is_here(self.url) else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)
        self._reached = False
        listed = self._ask("v1/models", None, REACHED)
        self._reached = True
        try:
            names = [str(one["id"]) for one in listed["data"]]
            self.model, kind = names[0], str(listed["data"][0].get("owned_by") or "unknown")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"image tokens: {self.url}/v1/models lists no model; {START}") from None
        if len(names) > 1:  # which of them is the run's cannot be known
            raise ValueError(
                f"image tokens: {self.url} serves {len(names)} models ({_short(', '.join(names))}); expected the run's "
                f"language model alone. {START[0].upper()}{START[1:]}"
            )
        self.said = _short(f"{kind} server, model {self.model}")

    def begin(self, encoder: Blip3oNext, folder: Path) -> None:
        """Raises ValueError where the server reads the row before the image tokens otherwise than the encoder does. A
        line on stderr says where that cannot be asked."""
        named = encoder.tokenizer.convert_ids_to_tokens([*encoder.head, encoder.tokens.image_start_token_id])
        text = encoder.prompt("a") + "".join(named)
        own = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        asked = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            read = self._ask("tokenize", asked, REACHED)
            tokens = read.get("tokens") if isinstance(read, dict) else None
            if not _are_ids(tokens):
                raise ValueError(f"image tokens: {self.url}/tokenize gives no token ids")
        except ValueError as error:  # a server without that endpoint
            print(f"{error}; so whether the server has the run's vocabulary is not checked", file=sys.stderr)
            return
        if tokens != own:
            raise ValueError(
                f"image tokens: the model {_short(self.model)} of {self.url} has another vocabulary than the run; "
                f"expected its language model. {START[0].upper()}{START[1:]}"
            )

    def draw(self, rows: list[list[int]], n: int, seeds: Sequence[int], sampling: Sampling) -> list[list[int]]:
        """See Engine.draw. A request a row, AT_ONCE of them on their way. An error of one ends all."""
        todo, done = iter(enumerate(zip(rows, seeds, strict=True))), SimpleQueue[tuple[int, Any]]()
        lock, given_up = threading.Lock(), threading.Event()

        def requests() -> None:
            while not given_up.is_set():
                with lock:
                    i, asked = next(todo, (-1, None))
                if asked is None:
                    return
                try:
                    done.put((i, self._row(*asked, n, sampling, given_up)))
                except Exception as error:
                    done.put((i, error))

        # daemons, so that an interrupted command does not wait for the server
        for _ in range(min(len(rows), AT_ONCE)):
            threading.Thread(target=requests, daemon=True).start()
        drawn: dict[int, list[int]] = {}
        try:
            while len(drawn) < len(rows):
                i, ids = done.get()
                if isinstance(ids, Exception):
                    raise ids
                drawn[i] = ids
        finally:
            given_up.set()
        return [drawn[i] for i in range(len(rows))]

    def _row(self, row: list[int], seed: int, n: int, sampling: Sampling, given_up: threading.Event) -> list[int]:
        """The ids that continue one row."""
        asked = {
            "model": self.model,
            "prompt": row,
            "max_tokens": n,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = self._ask("v1/completions", asked, ANSWERED, given_up)
        try:
            ids = answer["choices"][0]["token_ids"]
            if not _are_ids(ids):
                raise TypeError
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"image tokens: {self.url} gives no token ids back (choices[0].token_ids, asked for by "
                "return_token_ids); expected vLLM from 0.10.2 on, or a SGLang that knows it"
            ) from None
        return list(ids)

    def _ask(
        self, path: str, body: dict[str, Any] | None, seconds: float, given_up: threading.Event | None = None
    ) -> Any:
        """The JSON that the server answers; asked again after PAUSES where it says that the fault is its own, or goes
        away after it was there. Raises ValueError in one line."""
        for pause in (*PAUSES, None):
            try:
                return self._once(path, body, seconds)
            except _Again as error:
                if pause is None or not (self._reached or error.answered):
                    raise ValueError(str(error)) from None
            if given_up is None:
                time.sleep(pause)
            elif given_up.wait(pause):
                break
        raise ValueError(f"image tokens: {self.url}: given up")

    def _once(self, path: str, body: dict[str, Any] | None, seconds: float) -> Any:
        """In a thread of its own, for a socket's timeout starts anew with every byte that comes."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            if not (key.isascii() and key.isprintable()) or " " in key:  # what http.client says then shows the key
                raise ValueError(
                    f"image tokens: {KEY} holds a space, a line end or a letter outside ASCII; set it to the key alone"
                )
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        done = SimpleQueue[tuple[Any, Exception | None]]()

        def asked() -> None:
            try:
                done.put((self._answer(request, seconds), None))
            except Exception as error:
                done.put((None, error))

        threading.Thread(target=asked, daemon=True).start()
        try:
            answer, error = done.get(timeout=seconds)
        except Empty:
            answer, error = None, self._late(seconds)
        if error is not None:
            raise error
        return answer

    def _late(self, seconds: float) -> ValueError:
        return ValueError(f"image tokens: {self.url} gives no whole answer within {seconds:g} s")

    def _answer(self, request: urllib.request.Request, seconds: float) -> Any:
        """The JSON that a request is answered with. Raises _Again, and ValueError in one line."""
        where = request.full_url
        try:
            with self._opener.open(request, timeout=seconds) as response:
                text = response.read(LARGEST + 1)
                if response.length and len(text) <= LARGEST:  # a read of so many bytes takes a torn answer for a whole
                    raise http.client.IncompleteRead(text, response.length)
        except urllib.error.HTTPError as error:
            said = f"image tokens: {where} answers {error.code}: {_message(error)}"
            if error.code >= 500 or error.code == 429:
                raise _Again(said, answered=True) from None
            hint = f"; put its key into the environment variable {KEY}" if error.code in (401, 403) else ""
            if error.code < 400:
                place = _short(error.headers.get("Location", "another address"))
                said = f"image tokens: {where} answers {error.code}, a redirect to {place}"
                hint = "; give --ar-server the address itself where tokens are drawn"
            raise ValueError(said + hint) from None
        except TimeoutError:
            raise self._late(seconds) from None
        except urllib.error.URLError as error:  # before the request was sent
            if isinstance(error.reason, TimeoutError):
                raise self._late(seconds) from None
            said = why(error.reason) if isinstance(error.reason, BaseException) else str(error.reason)
            raise _Again(f"image tokens: no server answers at {self.url} ({_short(said)}); {START}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = f"image tokens: {where} gives no answer that can be read ({_short(why(error))})"
            raise _Again(f"{said}; is it the completions server?") from None
        if len(text) > LARGEST:
            raise ValueError(f"image tokens: {where} answers more than {LARGEST} bytes; is it the completions server?")
        try:
            answer = parse_json(text.decode(errors="replace"), f"what {where} answers")
        except ValueError as error:
            begun = f": {_decoded(text)!r}" * bool(text)
            raise ValueError(f"image tokens: {error}{begun}; is it the completions server?") from None
        if isinstance(answer, dict) and answer.get("error"):
            raise ValueError(f"image tokens: {where} answers an error: {_told(answer)}")
        return answer


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: urllib would send the key along to any host, and would make a GET of a POST."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Again(Exception):
    """A request that failed, and may not the next time. answered: by the server, which is therefore there."""

    def __init__(self, said: str, answered: bool = False) -> None:
        super().__init__(said)
        self.answered = answered


def base_of(url: str) -> str:
    """The address without /v1 and what follows. Raises ValueError where it is none."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # a port that is no number, a bracket without its other
        parts, port = urlsplit(""), None
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    whole = parts.scheme in ("http", "https") and _is_host(parts.hostname or "") and path.isascii()
    whole = whole and url.isprintable() and " " not in url
    if not whole or port == 0 or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            f"image tokens: {url!r} is no server's address; expected one as http://127.0.0.1:8000"
            + f", and a key in the environment variable {KEY}" * (parts.username is not None)
        )
    return f"{parts.scheme}://{parts.netloc}{path}"


def _is_host(name: str) -> bool:
    """Whether a name can be looked up: its parts between dots have 1 to 63 letters each."""
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


def _is_here(url: str) -> bool:
    """Whether an address is this machine's own, which no proxy stands before."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _are_ids(found: Any) -> bool:
    return isinstance(found, list) and all(type(i) is int for i in found)


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, or whatever there is."""
    try:
        text = error.read(LARGEST)
    except (OSError, http.client.HTTPException):
        text = b""
    try:
        return _told(parse_json(text.decode(), "an error"))
    except ValueError:
        return _decoded(text) or _short(str(error.reason))


def _told(tree: Any) -> str:
    """The message in the JSON of an error: vLLM's and SGLang's, or FastAPI's."""
    told = tree.get("error", tree) if isinstance(tree, dict) else tree
    found = told.get("message") or told.get("detail") or told if isinstance(told, dict) else told
    try:
        return _short(str(found))
    except RecursionError:
        return "JSON nested too deeply"


def _decoded(text: bytes) -> str:
    return _short(text[:2000].decode(errors="replace"))


def _short(text: str) -> str:
    """The beginning of a text, in one line that a terminal can show: what a server says may hold anything."""
    line = " ".join(text[:2000].split())
    return "".join(c if c.isprintable() else "?" for c in line)[:300]
