"""The part of the Hugging Face Hub's HTTP interface that its client needs to make a repository, to fill it and to fetch
it, as a server of this machine's that keeps all in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name. `asked` holds each request's method, path and token."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON tree or bytes) of a request."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.files:
                return 409, {"error": "it is there", "url": f"{self.endpoint}/{name}"}
            self.files[name], self.private[name] = {}, asked.get("private") or asked.get("visibility") == "private"
            return 200, {"url": f"{self.endpoint}/{name}"}
        if parts[:2] == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if parts[:2] == ["api", "models"]:
            return self.model("/".join(parts[2:4]), parts[4:], body)
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if parts[2:3] == ["resolve"] and file in self.files.get(name, {}):
            return 200, self.files[name][file]
        return 404, {"error": f"{path} is not there"}

    def model(self, name: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        if name not in self.files:
            return 404, {"error": f"{name} is not there"}
        files = self.files[name]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": file} for file in sorted(files)]
            return 200, {"id": name, "sha": COMMIT, "private": self.private[name], "siblings": siblings}
        if rest[0] == "tree":
            return 200, [{"type": "file", "path": f, "size": len(x), "oid": oid(x)} for f, x in sorted(files.items())]
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        if rest[0] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.endpoint}/{name}/commit/{COMMIT}"
            return 200, {"commitUrl": url, "commitOid": COMMIT, "success": True, "hookOutput": ""}
        return 404, {"error": f"{rest} is not known here"}


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub without repositories, that answers at its `endpoint` while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = urlsplit(self.path).path
            hub.asked.append((self.command, path, self.headers.get("Authorization")))
            status, said = hub.answer(self.command, path, body)
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{oid(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = reply

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
